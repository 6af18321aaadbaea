// Rows gather what the columns they see hold, and what the state of all columns outside of their chunk does: whole chunks side by side, the state before
// each of them in memory.
#pragma once
#include "chunks/sum.cuh"
#include "chunks/results.cuh"

namespace linattn_chunks {

// Columns of a head come in tiles of KEYS: y, whose products with the rows are weighed, and z, which is gathered.
template <typename T, int D> struct Columns {
  using S = RowShape<T, D>;
  using Small = typename S::Small;
  const T *y, *z;
  int64_t y_stride, z_stride, first_number;  // of the head's first token among the masses and e
  __device__ __forceinline__ Columns(const RowArguments &args, int batch, int head, int query_head)
      : y(head_of<const T>(args.y.tensor, batch, head)), z(head_of<const T>(args.z.tensor, batch, head)), y_stride(args.y.tensor.token_stride),
        z_stride(args.z.tensor.token_stride), first_number((static_cast<int64_t>(batch) * args.problem.query_heads + query_head) * args.problem.length) {}
  __device__ __forceinline__ void start(uint32_t shared, int stage, int64_t token, int count, int thread) const {
    const uint32_t tiles = shared + S::TILES + stage * 2 * S::TILE, landing = shared + S::LANDING;
    start_rows<T, D, S::KEYS, S::WARPS>(tiles, landing, y + token * y_stride, y_stride, count, thread);
    start_rows<T, D, S::KEYS, S::WARPS>(tiles + S::TILE, landing + S::KEYS * D * 4, z + token * z_stride, z_stride, count, thread);
    copy_commit();
  }
  // What has landed is measured, and split where it must be.
  template <bool ERROR> __device__ __forceinline__ void arrive(unsigned char *shared, Small &small, const RowArguments &args, int stage, int64_t token, int count, int warp,
                                                               int lane_id) const {
    using Mine = WarpRows<D, S::KEYS, S::WARPS>;
    const Mine mine(warp, lane_id);
    const int64_t number = first_number + token;
    if (ERROR && threadIdx.x < S::KEYS) small.shift[threadIdx.x] = static_cast<int>(threadIdx.x) < count ? args.error[number + threadIdx.x] : 0.f;
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      unsigned char *const tile = shared + S::TILES + (stage * 2 + which) * S::TILE;
      const float *const landed = reinterpret_cast<const float *>(shared + S::LANDING) + which * S::KEYS * D;
      const Vectors &of = which == 0 ? args.y : args.z;
      float *const worths = which == 0 ? small.y_worth : small.z_worth;
      mine.batches([&](int first) {
        Row<D> x[Mine::BATCH];
        Worth worth[Mine::BATCH];
        if constexpr (kSplit<T>) mine.each(first, [&](int i, int row) { x[i].read(landed + row * D, mine.lanes, true); });
        else if (of.unit) mine.each(first, [&](int i, int) { x[i].read_tile(tile, mine, first + i); });
        weigh<T>(worth, x, mine, first, of, number, count);
        mine.each(first, [&](int i, int row) {
          if constexpr (kSplit<T>) x[i].put(tile, S::PLANE, mine, first + i, worth[i].lift.up);
          if (mine.lanes.lane == 0) worths[row] = worth[i].own * worth[i].lift.down;
        });
      });
    }
  }
};

// acc += (weights z) factor: COUNT blocks of 16 tokens or features, those from `first` to `last`; a block of weights is what `weigh` says.
template <typename T, int D, int COUNT, typename Weigh>
__device__ __forceinline__ void gather(float (&acc)[D / 8][4], const Blocks<D> &z, int plane, int first, int last, const float (&factor)[2], const Weigh &weigh) {
  constexpr int BLOCKS = D / 16, GROUP = kSplit<T> ? 2 : BLOCKS;
#pragma unroll
  for (int begin = 0; begin < BLOCKS; begin += GROUP) {
    float fresh[kSplit<T> ? 2 * GROUP : 1][4] = {};
#pragma unroll
    for (int k = 0; k < COUNT; ++k) {
      if (k < first || k >= last) continue;
      Fragment<T> weights, other;
      weigh(weights, k);
#pragma unroll
      for (int q = 0; q < GROUP; ++q) {
        if (begin + q >= BLOCKS) continue;
        other.load_transposed(z.at(k, begin + q), plane);
#pragma unroll
        for (int t = 0; t < 2; ++t)
          if constexpr (kSplit<T>) multiply(fresh[2 * q + t], weights, other, t);
          else multiply(acc[2 * (begin + q) + t], weights, other, t);
      }
    }
    if constexpr (kSplit<T>) {
#pragma unroll
      for (int n = 0; n < 2 * GROUP; ++n)
        if (2 * begin + n < 2 * BLOCKS)
#pragma unroll
          for (int i = 0; i < 4; ++i) acc[2 * begin + n][i] = fmaf(fresh[n][i], factor[i / 2], acc[2 * begin + n][i]);
    }
  }
}
// What stands beside a tile's columns, a number each: what y and z are worth, and kKey's e.
struct TileNumbers {
  const float *y_worth, *z_worth, *shift;
};

// The weights of the rows with a tile's columns, as the factor that gathers: s holds the products, of which a lane has two columns of each block of
// eight; steps of 16 columns outside of [first, last) are seen by no row of the warp.
template <typename T, int D, Role ROLE>
__device__ __forceinline__ void weigh_pairs(Fragment<T> (&weights)[RowShape<T, D>::KEYS / 16], float (&worth)[2], float (&total)[2], float (&s)[RowShape<T, D>::KEYS / 8][4],
                                            const TileNumbers &numbers, float slope, const float (&enter)[2], const float (&own_shift)[2], int gap, int count, int first, int last,
                                            int group, int place) {
  constexpr int STEPS = RowShape<T, D>::KEYS / 16;
  // The columns that a lane's rows see, counted from its own first one.
  int least[2], most[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = gap + group + 8 * half;
    least[half] = kLater<ROLE> ? row - 2 * place : 0, most[half] = (kLater<ROLE> ? count - 1 : min(row, count - 1)) - 2 * place;
  }
  float peak[2] = {0.f, 0.f};
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    if (step < first || step >= last) continue;
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      const int at = 16 * step + 8 * t + 2 * place;
      const float2 y_worth = two_of(numbers.y_worth + at), z_worth = two_of(numbers.z_worth + at);
      float2 shift{0.f, 0.f};
      if constexpr (ROLE == Role::kKey) shift = two_of(numbers.shift + at);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int half = i >> 1, column = 16 * step + 8 * t + (i & 1);
        float weight = fmaf(s[2 * step + t][i] * (i & 1 ? y_worth.y : y_worth.x), enter[half], ROLE == Role::kKey ? i & 1 ? shift.y : shift.x : own_shift[half]);
        if (column > most[half] || (kLater<ROLE> && column < least[half])) weight = 0.f;
        if constexpr (ROLE == Role::kKey) weight *= slope;
        if constexpr (kTotals<ROLE> && (kSplit<T> || ROLE == Role::kQuery)) total[half] += weight;
        weight *= i & 1 ? z_worth.y : z_worth.x;
        s[2 * step + t][i] = weight;
        if constexpr (kSplit<T>) peak[half] = fmaxf(peak[half], fabsf(weight));
      }
    }
  }
  Lift lift[2] = {{1.f, 1.f}, {1.f, 1.f}};
  if constexpr (kSplit<T>) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      peak[half] = fmaxf(peak[half], __shfl_xor_sync(0xffffffffu, peak[half], 1));
      peak[half] = fmaxf(peak[half], __shfl_xor_sync(0xffffffffu, peak[half], 2));
      lift[half] = lift_from(peak[half], kPeak);
    }
  }
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    if (step < first || step >= last) continue;
#pragma unroll
    for (int t = 0; t < 2; ++t)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float left = s[2 * step + t][2 * half], right = s[2 * step + t][2 * half + 1];
        if constexpr (kSplit<T>) {
          split_two(weights[step].part[0][2 * t + half], weights[step].part[1][2 * t + half], left * lift[half].up, right * lift[half].up);
        } else {
          const uint32_t two = Element<T>::pack(left, right);
          weights[step].part[0][2 * t + half] = two;
          // The mass is the sum of the rounded weights, so that a constant v comes back as itself.
          if constexpr (ROLE == Role::kOut) total[half] += Element<T>::low(two) + Element<T>::high(two);
        }
      }
  }
  worth[0] = lift[0].down, worth[1] = lift[1].down;
}

// The work of a block: what each of its rows holds is measured, the state enters, and the pairs inside the chunk are added. Every member is a
// register.
template <typename T, int D, Role ROLE> struct Rows {
  using S = RowShape<T, D>;
  using Part = typename Factor<T>::Part;
  using Mine = WarpRows<D, S::ROWS, S::WARPS>;
  static constexpr int BLOCKS = S::BLOCKS, STEPS = S::KEYS / 16;
  static constexpr bool kGroups = kWarpgroups<D>;
  // The state comes in slabs of as many rows as a tile has; a thread fetches its part of a slab in pieces of eight fours at most.
  static constexpr int kSlabs = (BLOCKS + STEPS - 1) / STEPS, kEach = ((D < S::KEYS ? D : S::KEYS) * D / 4 + S::THREADS - 1) / S::THREADS;
  static constexpr int kPieces = (kEach + 7) / 8, kFours = (kEach + kPieces - 1) / kPieces;
  // The rounded state takes the place that the second stage, or all, of the columns will have.
  static constexpr int kPlace = S::TILES + (S::STAGES - 1) * 2 * S::TILE;

  const RowArguments &args;
  const linattn_problem &p;
  unsigned char *const shared;
  typename S::Small &small;
  const int thread, lane_id, warp, group, place, row0;
  const uint32_t base, down, across;
  const int row_heads, shares, pair, batch, row_head, key_head;
  const int64_t begin;
  const int rows;
  const int64_t chunk, from, to;
  const int tiles, iterations;
  const float a, b_tau;
  const float *const state;
  const T *const x_rows;
  const int64_t first_number;  // of a query's row
  const Blocks<D> x_blocks;
  const uint32_t x_group;      // the rows of the warpgroup
  float4 held[kFours];         // a piece of the state on its way
  float acc[2 * BLOCKS][4] = {}, total[2] = {0.f, 0.f};

  __device__ __forceinline__ Rows(const RowArguments &args, unsigned char *shared)
      : args(args), p(args.problem), shared(shared), small(*reinterpret_cast<typename S::Small *>(shared + S::LANDING + S::LANDING_BYTES)), thread(threadIdx.x),
        lane_id(thread & 31), warp(warp_number()), group(lane_id >> 2), place(lane_id & 3), row0(16 * warp + group), base(shared_address(shared)), down(lane_down<D>(lane_id)),
        across(lane_across<D>(lane_id)), row_heads(kLater<ROLE> ? p.key_heads : p.query_heads), shares(p.query_heads / p.key_heads), pair(blockIdx.x / args.row_tiles),
        batch(pair / row_heads), row_head(pair % row_heads), key_head(kLater<ROLE> ? row_head : row_head / shares),
        begin(static_cast<int64_t>(blockIdx.x % args.row_tiles) * S::ROWS), rows(static_cast<int>(min(p.length - begin, static_cast<int64_t>(S::ROWS)))),
        chunk(p.causal ? begin / args.chunk : 0), from(kLater<ROLE> ? begin : chunk * args.chunk), to(kLater<ROLE> ? min(p.length, (chunk + 1) * args.chunk) : begin + rows),
        tiles(p.causal ? static_cast<int>((to - from + S::KEYS - 1) / S::KEYS) : 0), iterations(kLater<ROLE> ? tiles * shares : tiles),
        a(kLater<ROLE> ? 0.f : coefficient(0, row_head)), b_tau(kLater<ROLE> ? 1.f : coefficient(1, row_head) * coefficient(3, row_head)),
        state(args.states ? args.states + ((static_cast<int64_t>(batch) * p.key_heads + key_head) * args.chunks + chunk) * kStateFloats<D> : nullptr),
        x_rows(head_of<const T>(args.x.tensor, batch, row_head) + begin * args.x.tensor.token_stride), first_number(static_cast<int64_t>(pair) * p.length + begin),
        x_blocks(base + S::X + Tile<D>::rows_at(warp), down), x_group(base + S::X + Tile<D>::rows_at(warp / 4 * 4)) {}

  __device__ __forceinline__ void run() {
    if constexpr (!kSplit<T>) {
      start_rows<T, D, S::ROWS, S::WARPS>(base + S::X, 0, x_rows, args.x.tensor.token_stride, rows, thread);
      copy_commit();
    }
    if (iterations > 0) start(0);
    if (state) fetch(0, 0);
    measure();
    if (state) enter(multiply_by_state());
    for (int iteration = 0; iteration < iterations; ++iteration) add_pairs(iteration);
    if (iterations == 0) copy_wait<0>();
    float sums[2] = {0.f, 0.f};
    put_results<T, D, ROLE>(p, args.written, {place, row0, rows, batch, row_head, begin, first_number}, b_tau, acc, total, sums);
    if constexpr (ROLE == Role::kQuery) put_sums<S::WARPS>(sums, small.totals, args.partials + 2 * static_cast<int64_t>(blockIdx.x), warp, lane_id);
  }

  __device__ __forceinline__ float coefficient(int which, int head) const { return p.coefficients[which * p.query_heads + head]; }
  __device__ __forceinline__ int64_t token_of(int iteration) const { return from + static_cast<int64_t>(iteration % tiles) * S::KEYS; }
  __device__ __forceinline__ int count_of(int64_t token) const { return static_cast<int>(min(p.length - token, static_cast<int64_t>(S::KEYS))); }
  __device__ __forceinline__ Columns<T, D> columns_of(int iteration) const {
    return Columns<T, D>(args, batch, kLater<ROLE> ? key_head * shares + iteration / tiles : key_head, kLater<ROLE> ? key_head * shares + iteration / tiles : row_head);
  }
  __device__ __forceinline__ void start(int iteration) const {
    const int64_t token = token_of(iteration);
    columns_of(iteration).start(base, iteration % S::STAGES, token, count_of(token), thread);
  }
  __device__ __forceinline__ void fetch(int slab, int piece) {
#pragma unroll
    for (int i = 0; i < kFours; ++i) {
      const int index = thread + (piece * kFours + i) * S::THREADS;
      held[i] = slab * S::KEYS + index / (D / 4) < D && index < S::KEYS * D / 4 ? four_of(state + slab * S::KEYS * D + 4 * index) : make_float4(0.f, 0.f, 0.f, 0.f);
    }
  }

  // The rows themselves: their norms or masses, and for the gradient of the queries e = dL/dg - w . o.
  __device__ __forceinline__ void measure() const {
    const Mine mine(warp, lane_id);
    mine.batches([&](int first) {
      Row<D> x[Mine::BATCH], out[Mine::BATCH];
      Worth worth[Mine::BATCH];
      mine.each(first, [&](int i, int row) { x[i].read(x_rows + row * args.x.tensor.token_stride, mine.lanes, row < rows); });
      if constexpr (ROLE == Role::kQuery)
        mine.each(first, [&](int i, int row) { out[i].read(head_of<const T>(args.out, batch, row_head) + (begin + row) * args.out.token_stride, mine.lanes, row < rows); });
      weigh<T>(worth, x, mine, first, args.x, first_number, rows);
      if constexpr (ROLE == Role::kQuery) {
        float along[Mine::BATCH] = {};
        mine.each(first, [&](int i, int) { along[i] = x[i].dot(out[i]); });
        mine.sums(along);
        if (mine.lanes.lane == 0)
          mine.each(first, [&](int i, int row) {
            const float error = row < rows ? (args.grad_mass ? args.grad_mass[first_number + row] : 0.f) - along[i] * worth[i].own : 0.f;
            small.row_shift[row] = error;
            if (row < rows) args.error[first_number + row] = error;
          });
      }
      mine.each(first, [&](int i, int row) {
        if constexpr (kSplit<T>) x[i].put(shared + S::X, S::X_PLANE, mine, first + i, worth[i].lift.up);
        if (mine.lanes.lane == 0) {
          small.x_worth[row] = worth[i].own * worth[i].lift.down;
          if constexpr (ROLE != Role::kQuery) small.row_shift[row] = ROLE == Role::kOut ? a : 1.f;
        }
      });
    });
  }

  // acc = x S, the state slab by slab; what undoes the lift of the rounded state.
  __device__ __forceinline__ float multiply_by_state() {
    Lift lift{1.f, 1.f};
    if constexpr (kSplit<T>) {
      lift = lift_of_state();
    } else {
      copy_wait<0>();
      __syncthreads();
    }
#pragma unroll
    for (int slab = 0; slab < BLOCKS; slab += STEPS) {
      const int blocks = BLOCKS - slab < STEPS ? BLOCKS - slab : STEPS;
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        if (slab > 0 || piece > 0 || (kSplit<T> && kSlabs * kPieces > 1)) fetch(slab / STEPS, piece);
        if (slab > 0 && piece == 0) __syncthreads();
#pragma unroll
        for (int i = 0; i < kFours; ++i) {
          const int index = thread + (piece * kFours + i) * S::THREADS;
          if (index / (D / 4) < blocks * 16) put_state(index / (D / 4), index % (D / 4) * 4, held[i], lift.up);
        }
      }
      warpgroup_publish();
      __syncthreads();
      if constexpr (kGroups) multiply_slab_by_group(slab);
      else multiply_slab(slab, blocks);
    }
    return lift.down;
  }
  __device__ __forceinline__ Lift lift_of_state() {
    float peak = 0.f;
#pragma unroll
    for (int piece = 0; piece < kSlabs * kPieces; ++piece) {
      if (piece > 0) fetch(piece / kPieces, piece % kPieces);
#pragma unroll
      for (int i = 0; i < kFours; ++i) peak = fmaxf(peak, peak_of(held[i]));
    }
    peak = warp_peak(peak);
    if (lane_id == 0) small.peaks[warp] = peak;
    __syncthreads();
    return lift_from(peak_of_warps<S::WARPS>(small.peaks), kPeak);
  }
  __device__ __forceinline__ void put_state(int row, int column, const float4 &x, float up) const {
    if constexpr (kSplit<T>) put_four(shared + kPlace + place_of<D>(row, column), S::PLANE, x, up);
    else *reinterpret_cast<uint2 *>(shared + kPlace + place_of<D>(row, column)) = make_uint2(pack_bf16(x.x, x.y), pack_bf16(x.z, x.w));
  }
  __device__ __forceinline__ void multiply_slab_by_group(int slab) {
    warpgroup_keep(acc);
    warpgroup_begin();
    if constexpr (kAcross<ROLE>) {
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block) {
        const uint32_t columns = Tile<D>::columns_at(2 * block);
        constexpr int kWidth = D < 64 ? D : 64;
        group_multiply<T, D, kWidth, false>(part_of<kWidth / 8>(acc, 2 * slab), x_group + columns, S::X_PLANE, base + kPlace + columns, S::PLANE, block > 0);
      }
    } else {
#pragma unroll
      for (int k = 0; k < STEPS; ++k)
        if (slab + k < BLOCKS)
          each_range<D>([&](auto range) {
            constexpr int kFirst = decltype(range)::kFirst, kCount = decltype(range)::kCount;
            group_multiply<T, D, kCount, true>(part_of<kCount / 8>(acc, kFirst / 8), x_group + Tile<D>::columns_at(2 * (slab + k)), S::X_PLANE,
                                               base + kPlace + Tile<D>::rows_at(k) + Tile<D>::columns_at(kFirst / 8), S::PLANE, slab + k > 0);
          });
    }
    warpgroup_commit();
    warpgroup_wait<0>();
    warpgroup_keep(acc);
  }
  __device__ __forceinline__ void multiply_slab(int slab, int blocks) {
    const Blocks<D> s_down(base + kPlace, down), s_across(base + kPlace, across);
    constexpr float kWhole[2] = {1.f, 1.f};
    if constexpr (!kAcross<ROLE>) {
      gather<T, D, STEPS>(acc, s_down, S::PLANE, 0, blocks, kWhole, [&](Fragment<T> &x, int k) { x.load(x_blocks.at(0, slab + k), S::X_PLANE); });
    } else {
#pragma unroll
      for (int k = 0; k < STEPS; ++k) {
        if (slab + k >= BLOCKS) continue;
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block) {
          Fragment<T> x, other;
          x.load(x_blocks.at(0, block), S::X_PLANE);
          other.load(s_across.at(k, block), S::PLANE);
          multiply(acc[2 * (slab + k)], x, other, 0);
          multiply(acc[2 * (slab + k) + 1], x, other, 1);
        }
      }
    }
  }

  // What the rows weigh of it, and the state's margins.
  __device__ __forceinline__ void enter(float state_down) {
    float enter[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) enter[half] = state_down * small.x_worth[row0 + 8 * half] * (kAcross<ROLE> ? 1.f : b_tau);
    const float shift[2] = {small.row_shift[row0], small.row_shift[row0 + 8]};
    const float *const column = state + D * D, *const line = column + D, *const gathered = kAcross<ROLE> ? column : line, *const summed = kAcross<ROLE> ? line : column;
    float along[2] = {0.f, 0.f};
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) {
      Fragment<T> x;
      if constexpr (kTotals<ROLE>) x.load(x_blocks.at(0, block), S::X_PLANE);
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
          for (int part = 0; part < S::PARTS; ++part)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const uint32_t two = x.part[part][2 * t + half];
              along[half] = fmaf(Element<Part>::low(two), other.x, fmaf(Element<Part>::high(two), other.y, along[half]));
            }
        }
      }
    }
    if constexpr (kTotals<ROLE>) {
      const float count = state[D * D + 2 * D];
#pragma unroll
      for (int half = 0; half < 2; ++half) total[half] = along[half] * small.x_worth[row0 + 8 * half] * (kAcross<ROLE> ? 1.f : b_tau) + (place == 0 ? shift[half] * count : 0.f);
    }
  }

  // The pairs of the rows with a tile of columns.
  __device__ __forceinline__ void add_pairs(int iteration) {
    const int stage = iteration % S::STAGES, head = kLater<ROLE> ? key_head * shares + iteration / tiles : row_head;
    const int64_t token = token_of(iteration);
    const int count = count_of(token);
    copy_wait<0>();
    warpgroup_publish();
    __syncthreads();  // everyone has left the tile before this one
    columns_of(iteration).template arrive<ROLE == Role::kKey>(shared, small, args, stage, token, count, warp, lane_id);
    if (iteration + 1 < iterations) start(iteration + 1);
    warpgroup_publish();
    __syncthreads();

    // Of the tile's steps of 16 columns, those that some row of the warp sees; all, where some row of the warpgroup sees any.
    const int gap = static_cast<int>(begin + 16 * warp - token), group_gap = gap - warp % 4 * 16;
    const int first = kGroups ? 0 : kLater<ROLE> ? max(gap, 0) / 16 : 0, last = kGroups ? STEPS : kLater<ROLE> ? (count + 15) / 16 : min((gap + 31) / 16, (count + 15) / 16);
    if (kGroups ? (kLater<ROLE> ? group_gap >= count : group_gap <= -64) : first >= last) return;
    const uint32_t tile = base + S::TILES + stage * 2 * S::TILE;
    float s[2 * STEPS][4] = {};
    multiply_by_columns(s, tile, first, last);
    const float slope = kLater<ROLE> ? coefficient(1, head) * coefficient(3, head) : kAcross<ROLE> ? 1.f : b_tau, level = kLater<ROLE> ? coefficient(0, head) : a;
    const float enter[2] = {small.x_worth[row0] * (kAcross<ROLE> ? 1.f : slope), small.x_worth[row0 + 8] * (kAcross<ROLE> ? 1.f : slope)};
    const float own_shift[2] = {ROLE == Role::kValue ? level : small.row_shift[row0], ROLE == Role::kValue ? level : small.row_shift[row0 + 8]};
    float worth[2];
    Fragment<T> weights[STEPS];
    weigh_pairs<T, D, ROLE>(weights, worth, total, s, {small.y_worth, small.z_worth, small.shift}, slope, enter, own_shift, gap, count, first, last, group, place);
    if constexpr (kGroups) gather_by_group<T, D, STEPS>(acc, tile + S::TILE, S::PLANE, worth, weights);
    else gather<T, D, STEPS>(acc, Blocks<D>(tile + S::TILE, down), S::PLANE, first, last, worth, [&](Fragment<T> &x, int k) { x = weights[k]; });
  }
  __device__ __forceinline__ void multiply_by_columns(float (&s)[2 * STEPS][4], uint32_t tile, int first, int last) const {
    if constexpr (kGroups) {
      warpgroup_keep(s);
      warpgroup_begin();
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block) {
        const uint32_t columns = Tile<D>::columns_at(2 * block);
        group_multiply<T, D, S::KEYS, false>(s, x_group + columns, S::X_PLANE, tile + columns, S::PLANE, block > 0);
      }
      warpgroup_commit();
      warpgroup_wait<0>();
      warpgroup_keep(s);
    } else {
      const Blocks<D> y_blocks(tile, across);
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block) {
        Fragment<T> x, y;
        x.load(x_blocks.at(0, block), S::X_PLANE);
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
          if (step < first || step >= last) continue;
          y.load(y_blocks.at(step, block), S::PLANE);
          multiply(s[2 * step], x, y, 0);
          multiply(s[2 * step + 1], x, y, 1);
        }
      }
    }
  }
};

template <typename T, int D, Role ROLE>
__global__ void __launch_bounds__(RowShape<T, D>::THREADS) rows_kernel(const __grid_constant__ RowArguments args) {
  extern __shared__ __align__(1024) unsigned char shared[];
  Rows<T, D, ROLE>(args, shared).run();
}

}  // namespace linattn_chunks
