// Float32 where the state of a head fits the registers of a block: a block walks along a segment of the sequence, chunk after chunk, and keeps the
// state of what lies behind it. What it has brought into parts for the pairs of a chunk it uses again for the state.
//
// Two groups of four warps have 64 rows each. Forward, and for the gradient of the queries, they have the two halves of a chunk of 128 rows. For the
// gradients of keys and values, which walk from the end to the start, a chunk has 64 rows: one group makes dv of them, the other one dk, of the same columns.
#pragma once
#include "chunks/results.cuh"
#include "chunks/rows.cuh"

namespace linattn_chunks {

enum class Pass { kOut, kQuery, kColumns };
enum class Kind { kDirection, kPlain, kByMass };  // of vectors: brought to unit length where the call says so; as they are; divided by a mass each

constexpr float kUnitUp = 0x1p14f, kUnitDown = 0x1p-14f;  // the lift of what is no longer than one

// Sums or largest elements over the LANES lanes of a row, for COUNT rows at once: each step halves the rows that a lane still has. A lane ends with
// those of one row, `row_of`; `from` has a row's number for all its lanes.
template <int LANES, int COUNT> struct AcrossLanes {
  static_assert(COUNT <= LANES && (COUNT & (COUNT - 1)) == 0, "");
  template <typename Join> static __device__ __forceinline__ float join(float (&x)[COUNT], int lane, const Join &both) {
    int step = 1;
#pragma unroll
    for (int half = COUNT / 2; half > 0; half /= 2, step *= 2) {
      const bool upper = lane & step;
#pragma unroll
      for (int i = 0; i < half; ++i) {
        const float mine = upper ? x[i + half] : x[i], other = upper ? x[i] : x[i + half];
        x[i] = both(mine, __shfl_xor_sync(0xffffffffu, other, step));
      }
    }
#pragma unroll
    for (; step < LANES; step *= 2) x[0] = both(x[0], __shfl_xor_sync(0xffffffffu, x[0], step));
    return x[0];
  }
  static __device__ __forceinline__ float sum(float (&x)[COUNT], int lane) {
    return join(x, lane, [](float a, float b) { return a + b; });
  }
  static __device__ __forceinline__ float peak(float (&x)[COUNT], int lane) {
    return join(x, lane, [](float a, float b) { return fmaxf(a, b); });
  }
  // The bits of a number below COUNT the other way round.
  static constexpr __device__ __forceinline__ int row_of(int lane) {
    int row = 0;
    for (int step = 1, half = COUNT / 2; half > 0; half /= 2, step *= 2) row += lane & step ? half : 0;
    return row;
  }
  static __device__ __forceinline__ bool first(int lane) { return lane % LANES < COUNT; }
  static __device__ __forceinline__ float from(float x, int row, int lane) { return __shfl_sync(0xffffffffu, x, lane / LANES * LANES + row_of(row)); }
};

struct WalkArguments {
  linattn_problem problem;
  Vectors x[2], tiles[2];  // rows of either group; what columns hold
  Written written[2];      // by either group
  linattn_tensor out;      // kQuery: o, for e
  const float *grad_mass;
  float *error, *partials;
  const float *states;     // before each segment (behind it: kColumns), or null
  int64_t segment;         // tokens
  int32_t segments;
};

template <typename T, int D> constexpr bool kWalks = kSplit<T> && (D == 32 || D == 64 || D == 128);

template <int D> struct WalkShape {
  static constexpr int ROWS = 64, KEYS = 64, WARPS = 8, GROUP_WARPS = 4, THREADS = 32 * WARPS, BLOCKS = D / 16, STEPS = KEYS / 16, MIN_BLOCKS = D <= 64 ? 2 : 1;
  static constexpr int PLANE = KEYS * D * 2, TILE = 2 * PLANE, X = 0, TILES = 2 * TILE, LANDING = TILES + 2 * TILE;
  // Of the state, which takes the place of the tiles, a warp has 16 rows and COLUMNS blocks of 16 columns.
  static constexpr int STRIPES = D / 16, SPLIT = WARPS / STRIPES < BLOCKS ? WARPS / STRIPES : BLOCKS, COLUMNS = BLOCKS / SPLIT, STATE_PLANE = D * D * 2;
  static constexpr int PARTS = WARPS * 2 * D;  // of the margins
  static constexpr bool PARTS_IN_TILE = 2 * STATE_PLANE + PARTS * 4 <= 2 * TILE;
  struct Small {
    alignas(16) float worth[2][KEYS], shift[KEYS];
    float mass[KEYS], error[KEYS];  // as they land
    float x_worth[2 * ROWS], x_shift[2 * ROWS], peaks[WARPS], totals[WARPS][2];
    alignas(16) float margins[2][D], parts[PARTS_IN_TILE ? 4 : PARTS];
  };
  static constexpr int SHARED = LANDING + 2 * TILE + static_cast<int>(sizeof(Small));
};

// A tile of tokens: where they begin, and how many there are.
struct Tokens {
  int64_t first;
  int count;
};

// The work of a block. Every member is a register.
template <int D, Pass PASS, bool UNIT> struct Walk {
  using T = float;
  using S = WalkShape<D>;
  using Small = typename S::Small;
  using RowsOfGroup = WarpRows<D, S::ROWS, S::GROUP_WARPS>;
  template <typename Mine> using Across = AcrossLanes<RowLanes<D>::LANES, Mine::BATCH>;
  using Columns = WarpRows<D, S::KEYS, S::WARPS>;
  static constexpr bool kBack = PASS == Pass::kColumns;
  static constexpr int kChunk = kBack ? S::ROWS : 2 * S::ROWS, kFours = RowLanes<D>::FOURS;
  static constexpr int kFeatures = PASS == Pass::kQuery ? 1 : 0;  // the tile of which the state has a row each feature
  static constexpr bool kGroups = kWarpgroups<D>;
  static constexpr Kind kTiles[2] = {PASS == Pass::kQuery ? Kind::kPlain : Kind::kDirection, PASS == Pass::kOut     ? Kind::kPlain
                                                                                             : PASS == Pass::kQuery ? Kind::kDirection
                                                                                                                    : Kind::kByMass};
  template <Role ROLE> static constexpr Kind kRowsKind = ROLE == Role::kQuery ? Kind::kByMass : ROLE == Role::kKey ? Kind::kPlain : Kind::kDirection;
  template <Kind KIND> static constexpr bool kIsUnit = UNIT && KIND == Kind::kDirection;

  const WalkArguments &args;
  const linattn_problem &p;
  unsigned char *const shared;
  Small &small;
  const int thread, lane_id, warp, of_group, group, place;
  const uint32_t base, down, across, x_tile;
  const int row_heads, shares, pair, segment, batch, row_head, key_head;
  const int64_t from, to, first_number;  // first_number: of a query row's head
  const int chunks;
  const float a, b_tau;
  const int stripe, first_column;        // of the warp's part of the state
  const bool keeps;                      // whether the warp has a part of it
  float state[2 * S::COLUMNS][4] = {}, margins[2][4 * kFours] = {}, margin_start = 0.f, count_start = 0.f;
  float acc[2 * S::BLOCKS][4], total[2], sums[2] = {0.f, 0.f};
  int64_t begin = 0;  // the chunk at work

  __device__ __forceinline__ Walk(const WalkArguments &args, unsigned char *shared)
      : args(args), p(args.problem), shared(shared), small(*reinterpret_cast<Small *>(shared + S::LANDING + 2 * S::TILE)), thread(threadIdx.x), lane_id(thread & 31),
        warp(warp_number()), of_group(warp / S::GROUP_WARPS), group(lane_id >> 2), place(lane_id & 3), base(shared_address(shared)), down(lane_down<D>(lane_id)),
        across(lane_across<D>(lane_id)), x_tile(base + S::X + of_group * S::TILE), row_heads(kBack ? p.key_heads : p.query_heads), shares(p.query_heads / p.key_heads),
        pair(blockIdx.x / args.segments), segment(blockIdx.x % args.segments), batch(pair / row_heads), row_head(pair % row_heads), key_head(kBack ? row_head : row_head / shares),
        from(segment * args.segment), to(min(p.length, from + args.segment)), first_number(static_cast<int64_t>(pair) * p.length),
        chunks(static_cast<int>((to - from + kChunk - 1) / kChunk)), a(kBack ? 0.f : coefficient(0, row_head)), b_tau(kBack ? 1.f : slope_of(row_head)), stripe(warp % S::STRIPES),
        first_column(warp / S::STRIPES * 16 * S::COLUMNS), keeps(warp < S::STRIPES * S::SPLIT) {}

  __device__ __forceinline__ float coefficient(int which, int head) const { return p.coefficients[which * p.query_heads + head]; }
  __device__ __forceinline__ float slope_of(int head) const { return coefficient(1, head) * coefficient(3, head); }

  __device__ __forceinline__ void run() {
    const bool given = args.states;
    if (given) load_state();
    const int tiles = p.causal ? static_cast<int>((to - from + S::KEYS - 1) / S::KEYS) : 0, iterations = kBack ? tiles * shares : tiles;
    if (iterations > 0) start(0, tiles);
    int iteration = 0;
#pragma unroll 1
    for (int chunk = remade(0); chunk < chunks; ++chunk) {
      begin = from + static_cast<int64_t>(kBack ? chunks - 1 - chunk : chunk) * kChunk;
      const int rows = static_cast<int>(min(to - begin, static_cast<int64_t>(kChunk))), offset = kBack ? 0 : of_group * S::ROWS;
      if (chunk > 0) __syncthreads();  // everyone has left the chunk before this one
      by_role([&](auto role) { measure<kRowsKind<role.kRole>>(rows - offset); });
      const bool behind = given || (chunk > 0 && p.causal);
      if (behind) gather_state(chunk);
#pragma unroll
      for (int n = 0; n < 2 * S::BLOCKS; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[n][i] = 0.f;
      total[0] = total[1] = 0.f;
      if (behind) by_role([&](auto role) { enter<role.kRole>(multiply_by_state<role.kRole>()); });
      const int of_chunk = kBack ? shares : (rows + S::KEYS - 1) / S::KEYS;
#pragma unroll 1
      for (int i = 0; p.causal && i < of_chunk; ++i, ++iteration) add_tile(iteration, tiles, iteration + 1 < iterations, begin + offset);
      by_role([&](auto role) {
        put_results<T, D, role.kRole>(p, args.written[kBack ? of_group : 0],
                                      {place, offset + 16 * (warp % S::GROUP_WARPS) + group, rows, batch, row_head, begin, first_number + begin}, b_tau, acc, total, sums);
      });
    }
    copy_wait<0>();
    if constexpr (PASS == Pass::kQuery) put_sums<S::WARPS>(sums, small.totals, args.partials + 2 * static_cast<int64_t>(blockIdx.x), warp, lane_id);
  }

  template <Role ROLE> struct Of {
    static constexpr Role kRole = ROLE;
  };
  template <typename Work> __device__ __forceinline__ void by_role(const Work &work) const {
    if constexpr (PASS == Pass::kOut) {
      work(Of<Role::kOut>{});
    } else if constexpr (PASS == Pass::kQuery) {
      work(Of<Role::kQuery>{});
    } else {
      if (of_group == 0) work(Of<Role::kValue>{});
      else work(Of<Role::kKey>{});
    }
  }

  __device__ __forceinline__ int head_of_tile(int iteration) const { return kBack ? key_head * shares + iteration % shares : key_head; }
  __device__ __forceinline__ Tokens tokens(int iteration, int tiles) const {
    const int64_t first = from + static_cast<int64_t>(kBack ? tiles - 1 - iteration / shares : iteration) * S::KEYS;
    return {first, static_cast<int>(min(to - first, static_cast<int64_t>(S::KEYS)))};
  }
  __device__ __forceinline__ void start(int iteration, int tiles) const {
    const Tokens at = tokens(iteration, tiles);
    const int head = head_of_tile(iteration);
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const linattn_tensor &tensor = args.tiles[which].tensor;
      start_rows<T, D, S::KEYS, S::WARPS>(0, base + S::LANDING + which * S::TILE, head_of<const T>(tensor, batch, head) + at.first * tensor.token_stride, tensor.token_stride,
                                          at.count, thread);
    }
    if (kBack && thread < S::KEYS) {
      const int64_t number = (static_cast<int64_t>(batch) * p.query_heads + head) * p.length + at.first + (thread < at.count ? thread : 0);
      copy_number_async(shared_address(small.mass + thread), args.tiles[1].mass + number, thread < at.count);
      copy_number_async(shared_address(small.error + thread), args.error + number, thread < at.count);
    }
    copy_commit();
  }

  __device__ __forceinline__ void load_state() {
    const float *const at = args.states + ((static_cast<int64_t>(batch) * p.key_heads + key_head) * args.segments + (p.causal ? segment : 0)) * kStateFloats<D>;
    if (keeps)
#pragma unroll
      for (int n = 0; n < 2 * S::COLUMNS; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float2 two = two_of(at + (16 * stripe + group + 8 * half) * D + first_column + 8 * n + 2 * place);
          state[n][2 * half] = two.x, state[n][2 * half + 1] = two.y;
        }
    if (thread < 2 * D) margin_start = at[D * D + (thread / D == kFeatures ? 0 : D) + thread % D];
    count_start = at[D * D + 2 * D];
  }

  // What a vector counts beside what memory holds of it; what it is multiplied by before it is split, and what undoes its lift: vectors of unit length
  // lie below one, others are brought near it by their largest element. A lane has those of one row of the batch.
  struct Scale {
    float own, up, down;
  };
  template <Kind KIND, typename Mine> static __device__ __forceinline__ Scale weigh(const Row<D> (&x)[Mine::BATCH], const Mine &mine, int lane_id, float mass) {
    using Lanes = Across<Mine>;
    float measure[Mine::BATCH];
    if constexpr (kIsUnit<KIND>) {
#pragma unroll
      for (int i = 0; i < Mine::BATCH; ++i) measure[i] = x[i].dot(x[i]);
      const float own = inverse_length(Lanes::sum(measure, lane_id));
      return {own, own * kUnitUp, kUnitDown};
    } else {
#pragma unroll
      for (int i = 0; i < Mine::BATCH; ++i) measure[i] = x[i].peak();
      const float peak = Lanes::peak(measure, lane_id), own = KIND == Kind::kByMass ? inverse_or_zero(mass) : 1.f;
      const Lift lift = lift_from(peak * fabsf(own), kPeak);
      if constexpr (KIND == Kind::kPlain) return {own, lift.up, lift.down};
      const float up = own * lift.up;
      return {own, fabsf(up) > 0x1p127f ? copysignf(0x1p127f, up) : up, lift.down};  // nothing stays nothing, however far it is lifted
    }
  }

  // The rows of a group: `rows` of them are left from its first one on.
  template <Kind KIND> __device__ __forceinline__ void measure(int rows) {
    using Mine = RowsOfGroup;
    using Lanes = Across<Mine>;
    const Mine mine(warp % S::GROUP_WARPS, lane_id);
    const linattn_tensor &of = args.x[kBack ? of_group : 0].tensor;
    const int offset = kBack ? 0 : of_group * S::ROWS;
    const T *const source = head_of<const T>(of, batch, row_head) + (begin + offset) * of.token_stride;
    const int64_t number = first_number + begin + offset;
    mine.batches([&](int first) {
      Row<D> x[Mine::BATCH], out[Mine::BATCH];
      const int own_row = mine.row(first + Lanes::row_of(lane_id));  // of which this lane will have the numbers
      float mass = 0.f, error = 0.f;
      if constexpr (PASS == Pass::kQuery) {
        const int64_t at = own_row < rows ? number + own_row : first_number;
        mass = args.x[0].mass[at], error = args.grad_mass ? args.grad_mass[at] : 0.f;
      }
      mine.each(first, [&](int i, int row) { x[i].read(source + row * of.token_stride, mine.lanes, row < rows); });
      if constexpr (PASS == Pass::kQuery) {
        const T *const outs = head_of<const T>(args.out, batch, row_head) + (begin + offset) * args.out.token_stride;
        mine.each(first, [&](int i, int row) { out[i].read(outs + row * args.out.token_stride, mine.lanes, row < rows); });
      }
      const Scale scale = weigh<KIND>(x, mine, lane_id, mass);
      if constexpr (PASS == Pass::kQuery) {
        float along[Mine::BATCH];
#pragma unroll
        for (int i = 0; i < Mine::BATCH; ++i) along[i] = x[i].dot(out[i]);
        error -= Lanes::sum(along, lane_id) * scale.own;
        if (Lanes::first(lane_id)) {
          small.x_shift[of_group * S::ROWS + own_row] = own_row < rows ? error : 0.f;
          if (own_row < rows) args.error[number + own_row] = error;
        }
      }
      if (!kIsUnit<KIND> && Lanes::first(lane_id)) small.x_worth[of_group * S::ROWS + own_row] = scale.down;
      mine.each(first, [&](int i, int) { x[i].put(shared + S::X + of_group * S::TILE, S::PLANE, mine, first + i, Lanes::from(scale.up, i, lane_id)); });
    });
  }
  // What undoes the lifts of a lane's two rows, and what stands beside their products with columns.
  template <Role ROLE> __device__ __forceinline__ float worth_of_row(int half) const { return kIsUnit<kRowsKind<ROLE>> ? kUnitDown : small.x_worth[16 * warp + group + 8 * half]; }
  template <Role ROLE> __device__ __forceinline__ float shift_of_row(int half) const {
    return ROLE == Role::kOut ? a : ROLE == Role::kQuery ? small.x_shift[16 * warp + group + 8 * half] : 1.f;
  }

  // All warps' parts of the state come together: its sums as a tile in parts, behind `state_lift`, and its margins.
  float state_down = 1.f;
  __device__ __forceinline__ void gather_state(int chunk) {
    float peak = 0.f;
#pragma unroll
    for (int n = 0; n < 2 * S::COLUMNS; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) peak = fmaxf(peak, fabsf(state[n][i]));
    peak = warp_peak(peak);
    if (lane_id == 0) small.peaks[warp] = peak;
    float *const parts = S::PARTS_IN_TILE ? reinterpret_cast<float *>(shared + S::TILES + 2 * S::STATE_PLANE) : small.parts;
    const RowLanes<D> lanes(lane_id);
#pragma unroll
    for (int which = 0; which < 2; ++which)
#pragma unroll
      for (int i = 0; i < 4 * kFours; ++i) {
        float sum = margins[which][i];
#pragma unroll
        for (int step = RowLanes<D>::LANES; step < 32; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
        if (lanes.row == 0 && lanes.has(i / 4)) parts[(warp * 2 + which) * D + lanes.column(i / 4) + i % 4] = sum;
      }
    __syncthreads();
    const Lift lift = lift_from(peak_of_warps<S::WARPS>(small.peaks), kPeak);
    state_down = lift.down;
    if (keeps)
#pragma unroll
      for (int n = 0; n < 2 * S::COLUMNS; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t high, low;
          split_two(high, low, state[n][2 * half] * lift.up, state[n][2 * half + 1] * lift.up);
          unsigned char *const at = shared + S::TILES + place_of<D>(16 * stripe + group + 8 * half, first_column + 8 * n + 2 * place);
          *reinterpret_cast<uint32_t *>(at) = high;
          *reinterpret_cast<uint32_t *>(at + S::STATE_PLANE) = low;
        }
    if (thread < 2 * D) {
      float sum = margin_start;
#pragma unroll
      for (int w = 0; w < S::WARPS; ++w) sum += parts[w * 2 * D + thread];
      (&small.margins[0][0])[thread] = sum;
    }
    warpgroup_publish();
    __syncthreads();
  }

  // acc = x S, or x S^T; returns what undoes the lift.
  template <Role ROLE> __device__ __forceinline__ float multiply_by_state() {
    if constexpr (kGroups) {
      warpgroup_keep(acc);
      warpgroup_begin();
#pragma unroll
      for (int block = 0; block < S::BLOCKS; ++block) {
        const uint32_t columns = Tile<D>::columns_at(2 * block), s = base + S::TILES;
        if constexpr (kAcross<ROLE>) {
          constexpr int kWidth = D < 64 ? D : 64;
#pragma unroll
          for (int row = 0; row < D; row += kWidth)
            group_multiply<T, D, kWidth, false>(part_of<kWidth / 8>(acc, row / 8), x_tile + columns, S::PLANE, s + Tile<D>::rows_at(row / 16) + columns, S::STATE_PLANE, block > 0);
        } else {
          group_multiply<T, D, D, true>(acc, x_tile + columns, S::PLANE, s + Tile<D>::rows_at(block), S::STATE_PLANE, block > 0);
        }
      }
      warpgroup_commit();
      warpgroup_wait<0>();
      warpgroup_keep(acc);
    } else {
      const Blocks<D> x_blocks(x_tile + Tile<D>::rows_at(warp % S::GROUP_WARPS), down), s_blocks(base + S::TILES, kAcross<ROLE> ? across : down);
#pragma unroll
      for (int k = 0; k < S::BLOCKS; ++k) {
        Fragment<T> x, other;
        x.load(x_blocks.at(0, k), S::PLANE);
#pragma unroll
        for (int n = 0; n < S::BLOCKS; ++n) {
          if constexpr (kAcross<ROLE>) other.load(s_blocks.at(n, k), S::STATE_PLANE);
          else other.load_transposed(s_blocks.at(k, n), S::STATE_PLANE);
          multiply(acc[2 * n], x, other, 0);
          multiply(acc[2 * n + 1], x, other, 1);
        }
      }
    }
    return state_down;
  }

  // What the rows weigh of it, and the state's margins.
  template <Role ROLE> __device__ __forceinline__ void enter(float down) {
    const float weight = kAcross<ROLE> ? 1.f : b_tau, worth[2] = {worth_of_row<ROLE>(0) * weight, worth_of_row<ROLE>(1) * weight};
    const float enter[2] = {down * worth[0], down * worth[1]}, shift[2] = {shift_of_row<ROLE>(0), shift_of_row<ROLE>(1)};
    float along[2] = {0.f, 0.f};
    const float *const gathered = small.margins[ROLE == Role::kKey ? 0 : 1], *const summed = small.margins[0];
    const Blocks<D> x_blocks(x_tile + Tile<D>::rows_at(warp % S::GROUP_WARPS), this->down);
#pragma unroll
    for (int block = 0; block < S::BLOCKS; ++block) {
      Fragment<T> x;
      if constexpr (kTotals<ROLE>) x.load(x_blocks.at(0, block), S::PLANE);
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const int at = 16 * block + 8 * t + 2 * place;
        const float2 more = two_of(gathered + at);
        float (&sum)[4] = acc[2 * block + t];
#pragma unroll
        for (int half = 0; half < 2; ++half)
          sum[2 * half] = fmaf(sum[2 * half], enter[half], shift[half] * more.x), sum[2 * half + 1] = fmaf(sum[2 * half + 1], enter[half], shift[half] * more.y);
        if constexpr (kTotals<ROLE>) {
          const float2 other = two_of(summed + at);
#pragma unroll
          for (int part = 0; part < 2; ++part)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const uint32_t two = x.part[part][2 * t + half];
              along[half] = fmaf(Element<__half>::low(two), other.x, fmaf(Element<__half>::high(two), other.y, along[half]));
            }
        }
      }
    }
    if constexpr (kTotals<ROLE>) {
      const float count = count_start + (p.causal ? static_cast<float>(begin - from) : 0.f);
#pragma unroll
      for (int half = 0; half < 2; ++half) total[half] = along[half] * worth[half] + (place == 0 ? shift[half] * count : 0.f);
    }
  }

  // A tile of columns: its pairs with the rows, from `first_row` of the head on, and what it adds to the state.
  __device__ __forceinline__ void add_tile(int iteration, int tiles, bool more, int64_t first_row) {
    const Tokens at = tokens(iteration, tiles);
    const int head = head_of_tile(iteration);
    copy_wait<0>();
    __syncthreads();  // everyone has left the tile before this one
    arrive(head);
    warpgroup_publish();
    __syncthreads();
    if (more) start(iteration + 1, tiles);
    by_role([&](auto role) { add_pairs<role.kRole>(at, head, static_cast<int>(first_row - at.first)); });
    if (keeps) add_to_state(kBack ? slope_of(head) : 1.f);
  }

  // What has landed is measured, split, and added to the margins.
  __device__ __forceinline__ void arrive(int head) {
    if (kBack && thread < S::KEYS) small.shift[thread] = small.error[thread] * slope_of(head);
    arrive_tile<0>(kBack ? slope_of(head) : 1.f);
    arrive_tile<1>(kBack ? coefficient(0, head) : 1.f);
  }
  template <int WHICH> __device__ __forceinline__ void arrive_tile(float counts) {
    using Lanes = Across<Columns>;
    constexpr Kind kKind = kTiles[WHICH];
    const Columns mine(warp, lane_id);
    const float *const landed = reinterpret_cast<const float *>(shared + S::LANDING + WHICH * S::TILE);
    Row<D> x[Columns::BATCH];
    mine.each(0, [&](int i, int row) { x[i].read(landed + row * D, mine.lanes, true); });
    const int own_row = mine.row(Lanes::row_of(lane_id));
    const Scale scale = weigh<kKind>(x, mine, lane_id, kKind == Kind::kByMass ? small.mass[own_row] : 1.f);
    if (!kIsUnit<kKind> && Lanes::first(lane_id)) small.worth[WHICH][own_row] = scale.down;
    const float weight = scale.own * (kBack ? WHICH == 0 ? counts * small.error[own_row] : counts : 1.f);
    float *const margin = margins[WHICH];
    mine.each(0, [&](int i, int) {
      x[i].put(shared + S::TILES + WHICH * S::TILE, S::PLANE, mine, i, Lanes::from(scale.up, i, lane_id));
      const float own = kKind == Kind::kPlain ? 1.f : Lanes::from(weight, i, lane_id);
#pragma unroll
      for (int f = 0; f < kFours; ++f) {
        margin[4 * f] = fmaf(own, x[i].x[f].x, margin[4 * f]), margin[4 * f + 1] = fmaf(own, x[i].x[f].y, margin[4 * f + 1]);
        margin[4 * f + 2] = fmaf(own, x[i].x[f].z, margin[4 * f + 2]), margin[4 * f + 3] = fmaf(own, x[i].x[f].w, margin[4 * f + 3]);
      }
    });
  }

  // `gap`: from the tile's first token to the group's first row.
  template <Role ROLE> __device__ __forceinline__ void add_pairs(const Tokens &at, int head, int group_gap) {
    const int gap = group_gap + 16 * (warp % S::GROUP_WARPS);
    const int first = kGroups ? 0 : kLater<ROLE> ? max(gap, 0) / 16 : 0;
    const int last = kGroups ? S::STEPS : kLater<ROLE> ? (at.count + 15) / 16 : min((gap + 31) / 16, (at.count + 15) / 16);
    if (kGroups ? group_gap <= -S::KEYS : first >= last) return;
    constexpr int kWidth = D <= 64 ? 32 : 64;  // columns at a time of a sum that is begun anew: as many as there are registers for
    constexpr int kY = ROLE == Role::kKey ? 1 : 0;
    const uint32_t y_tile = base + S::TILES + kY * S::TILE, z_tile = base + S::TILES + (1 - kY) * S::TILE;
    float s[2 * S::STEPS][4] = {};
    multiply_by_columns(s, y_tile, first, last);
    float worth[2];
    Fragment<T> weights[S::STEPS];
    weigh_pairs<ROLE>(weights, worth, s, head, gap, first, last);
    if constexpr (kGroups) gather_by_group<T, D, S::STEPS, kWidth>(acc, z_tile, S::PLANE, worth, weights);
    else gather<T, D, S::STEPS>(acc, Blocks<D>(z_tile, down), S::PLANE, first, last, worth, [&](Fragment<T> &x, int k) { x = weights[k]; });
  }
  // The largest of a tile's worths, or e.
  __device__ __forceinline__ float most_of(const float *numbers) const { return warp_peak(fmaxf(fabsf(numbers[lane_id]), fabsf(numbers[lane_id + 32]))); }

  // s, products of lifted vectors, becomes the pairs' weights, as the factor that gathers. What a row's weights may come to, not what they do, says how
  // they are lifted: that is at most 2^8 D above what the rounding of vectors leaves uncertain at the same scale, and parts have room for 2^17.
  template <Role ROLE>
  __device__ __forceinline__ void weigh_pairs(Fragment<T> (&weights)[S::STEPS], float (&worth)[2], float (&s)[2 * S::STEPS][4], int head, int gap, int first, int last) {
    constexpr int kY = ROLE == Role::kKey ? 1 : 0, kZ = 1 - kY;
    constexpr bool kYUnit = kIsUnit<kTiles[kY]>, kZUnit = kIsUnit<kTiles[kZ]>, kAlike = kIsUnit<kRowsKind<ROLE>> && kYUnit;  // rows are bounded alike
    const float *const y_worth = small.worth[kY], *const z_worth = small.worth[kZ];
    const float slope = ROLE == Role::kQuery ? 1.f : kBack ? slope_of(head) : b_tau, level = ROLE == Role::kValue ? coefficient(0, head) : 0.f;
    const float z_most = kZUnit ? kUnitDown : most_of(z_worth), y_most = kYUnit ? 1.f : most_of(y_worth), shift_most = ROLE == Role::kKey ? most_of(small.shift) : 0.f;
    float enter[2], shift[2], up[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      enter[half] = worth_of_row<ROLE>(half) * slope * (kYUnit ? kUnitDown : 1.f);
      shift[half] = ROLE == Role::kValue ? level : ROLE == Role::kKey ? 0.f : shift_of_row<ROLE>(half);
      const float bound = fmaf(fabsf(enter[half]) * y_most, 0x1p30f * D, ROLE == Role::kKey ? shift_most : fabsf(shift[half])) * z_most;
      const Lift lift = lift_from(bound, kPeak);
      worth[half] = lift.down, up[half] = kZUnit ? lift.up * kUnitDown : lift.up;
    }
#pragma unroll
    for (int step = 0; step < S::STEPS; ++step) {
      if (step < first || step >= last) continue;
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const int at = 16 * step + 8 * t + 2 * place;
        float2 y{1.f, 1.f}, add{0.f, 0.f};
        if constexpr (!kYUnit) y = two_of(y_worth + at);
        if constexpr (ROLE == Role::kKey) add = two_of(small.shift + at);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float &weight = s[2 * step + t][i];
          if constexpr (!kYUnit) weight *= i & 1 ? y.y : y.x;
          weight = fmaf(weight, enter[i >> 1], ROLE == Role::kKey ? i & 1 ? add.y : add.x : shift[i >> 1]);
        }
      }
    }
    if (kLater<ROLE> || gap < S::KEYS - 1) hide<ROLE>(s, gap, first, last);
#pragma unroll
    for (int step = 0; step < S::STEPS; ++step) {
      if (step < first || step >= last) continue;
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        float2 z{1.f, 1.f};
        if constexpr (!kZUnit) z = two_of(z_worth + 16 * step + 8 * t + 2 * place);
        if constexpr (kAlike) z.x *= up[0], z.y *= up[0];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float left = s[2 * step + t][2 * half], right = s[2 * step + t][2 * half + 1];
          if constexpr (kTotals<ROLE>) total[half] += left + right;
          if constexpr (!kZUnit) left *= z.x, right *= z.y;
          if constexpr (!kAlike) left *= up[half], right *= up[half];
          split_two(weights[step].part[0][2 * t + half], weights[step].part[1][2 * t + half], left, right);
        }
      }
    }
  }
  // Nothing of the columns that a row does not see. (Those behind the last token hold nothing.)
  template <Role ROLE> __device__ __forceinline__ void hide(float (&s)[2 * S::STEPS][4], int gap, int first, int last) const {
#pragma unroll
    for (int step = 0; step < S::STEPS; ++step) {
      if (step < first || step >= last) continue;
#pragma unroll
      for (int t = 0; t < 2; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int beyond = 16 * step + 8 * t + (i & 1) - (gap + group + 8 * (i >> 1) - 2 * place);
          if (kLater<ROLE> ? beyond < 0 : beyond > 0) s[2 * step + t][i] = 0.f;
        }
    }
  }
  __device__ __forceinline__ void multiply_by_columns(float (&s)[2 * S::STEPS][4], uint32_t y_tile, int first, int last) const {
    if constexpr (kGroups) {
      warpgroup_keep(s);
      warpgroup_begin();
#pragma unroll
      for (int block = 0; block < S::BLOCKS; ++block) {
        const uint32_t columns = Tile<D>::columns_at(2 * block);
        group_multiply<T, D, S::KEYS, false>(s, x_tile + columns, S::PLANE, y_tile + columns, S::PLANE, block > 0);
      }
      warpgroup_commit();
      warpgroup_wait<0>();
      warpgroup_keep(s);
    } else {
      const Blocks<D> x_blocks(x_tile + Tile<D>::rows_at(warp % S::GROUP_WARPS), down), y_blocks(y_tile, across);
#pragma unroll
      for (int block = 0; block < S::BLOCKS; ++block) {
        Fragment<T> x, y;
        x.load(x_blocks.at(0, block), S::PLANE);
#pragma unroll
        for (int step = 0; step < S::STEPS; ++step) {
          if (step < first || step >= last) continue;
          y.load(y_blocks.at(step, block), S::PLANE);
          multiply(s[2 * step], x, y, 0);
          multiply(s[2 * step + 1], x, y, 1);
        }
      }
    }
  }

  // The lifts of a token's two vectors, as a factor at most one of its features; a lane gets those of the tokens that its fragments have.
  __device__ __forceinline__ float scales_of_tokens(uint32_t (&scale)[S::STEPS][2]) const {
    static_assert(S::KEYS == 64, "two tokens a lane");
    float near = 1.f, far = 1.f, down = 1.f;
    if constexpr (kIsUnit<kTiles[0]>) down *= kUnitDown;
    else near *= small.worth[0][lane_id], far *= small.worth[0][lane_id + 32];
    if constexpr (kIsUnit<kTiles[1]>) down *= kUnitDown;
    else near *= small.worth[1][lane_id], far *= small.worth[1][lane_id + 32];
    const uint32_t most = max(__float_as_uint(warp_peak(fmaxf(near, far))) >> 23, 1u);
    const float up = __uint_as_float((254 - most) << 23);
    const uint32_t both = Element<__half>::pack(near * up, far * up);
#pragma unroll
    for (int step = 0; step < 2; ++step)
#pragma unroll
      for (int right = 0; right < 2; ++right) {
        const uint32_t even = __shfl_sync(0xffffffffu, both, 16 * step + 8 * right + 2 * place), odd = __shfl_sync(0xffffffffu, both, 16 * step + 8 * right + 2 * place + 1);
        scale[step][right] = (even & 0xffffu) | odd << 16, scale[step + 2][right] = even >> 16 | (odd & 0xffff0000u);
      }
    return __uint_as_float(most << 23) * down;
  }
  __device__ __forceinline__ void add_to_state(float slope) {
    uint32_t scale[S::STEPS][2];
    const float down = scales_of_tokens(scale) * slope;
    const Blocks<D> features(base + S::TILES + kFeatures * S::TILE, across), others(base + S::TILES + (1 - kFeatures) * S::TILE, this->down);
    constexpr int GROUP = S::COLUMNS < 4 ? S::COLUMNS : 4;
#pragma unroll
    for (int begin = 0; begin < S::COLUMNS; begin += GROUP) {
      float fresh[2 * GROUP][4] = {};
#pragma unroll
      for (int step = 0; step < S::STEPS; ++step) {
        Fragment<T> x, other;
        x.load_transposed(features.at_column(step, stripe), S::PLANE);
#pragma unroll
        for (int part = 0; part < 2; ++part)
#pragma unroll
          for (int i = 0; i < 4; ++i) x.part[part][i] = multiply_two_halves(x.part[part][i], scale[step][i / 2]);
#pragma unroll
        for (int q = 0; q < GROUP; ++q) {
          other.load_transposed(others.at_column(step, first_column / 16 + begin + q), S::PLANE);
          multiply(fresh[2 * q], x, other, 0);
          multiply(fresh[2 * q + 1], x, other, 1);
        }
      }
#pragma unroll
      for (int n = 0; n < 2 * GROUP; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) state[2 * begin + n][i] = fmaf(fresh[n][i], down, state[2 * begin + n][i]);
    }
  }
};

template <int D, Pass PASS, bool UNIT> __global__ void __launch_bounds__(WalkShape<D>::THREADS, WalkShape<D>::MIN_BLOCKS) walk_kernel(const __grid_constant__ WalkArguments args) {
  extern __shared__ __align__(1024) unsigned char shared[];
  Walk<D, PASS, UNIT>(args, shared).run();
}

}  // namespace linattn_chunks
