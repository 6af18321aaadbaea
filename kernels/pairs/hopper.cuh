// Every pair of tokens by wgmma, a warpgroup 64 of a block's queries: forward.cuh for Hopper.
//
// A tile's products with the queries and those of the tile before with the values are on their way together; while the second are, the first become
// weights. P = a + beta s + gamma s^2 is made as gamma ((s + h)^2 + e), h = beta / 2 gamma, e = a / gamma - h^2: two operations a pair, gamma once a row.
#pragma once
#include "tile/warpgroup.cuh"
#include "pairs/gates.cuh"

namespace linattn_pairs {

constexpr int kKeyStages = 5;  // a tile whose values are still read, two in work, two on their way
constexpr float kSquares = 64.f;  // b^2 over a c up to which h^2 and e together lose no more than 4 of float32's bits

constexpr int kGroupThreads = 256;  // two warpgroups

enum Gates { NO_GATES, DECAY, RUNS };  // what multiplies weights: nothing; a decay alone; runs of tokens, with a decay or without

template <int K, int V, Gates GATES> struct OutputShape {
  static constexpr int MIN_BLOCKS = V <= 64 ? 2 : 1;
  static constexpr int ROW_TILE = kRows * (K > V ? K : V) * 2;  // queries, and then results
  static constexpr int KEYS = kKeys * K * 2, STAGE = KEYS + kKeys * V * 2;
  static constexpr int SCALES_AT = ROW_TILE + kKeyStages * STAGE, GATES_AT = SCALES_AT + kKeyStages * kKeys * 4;
  static constexpr int SHARED = GATES_AT + (GATES ? sizeof(StagedGates<kKeyStages>) : 0);
};

// Tiles of keys, values and keys' scales on their way to a stage.
template <typename T, int K, int V, Gates GATES> struct KeyStream {
  using S = OutputShape<K, V, GATES>;
  const linattn_problem &p;
  const T *keys, *values;  // of the head
  const float *scales;
  const uint32_t shared;
  const int thread;

  __device__ __forceinline__ KeyStream(const Arguments &args, const Place &own, uint32_t shared, int thread)
      : p(args.problem), keys(head_of<const T>(p.key, own.batch, own.key_head)), values(head_of<const T>(p.value, own.batch, own.key_head)),
        scales(args.key_scale + (static_cast<int64_t>(own.batch) * p.key_heads + own.key_head) * args.padded), shared(shared), thread(thread) {}
  __device__ __forceinline__ uint32_t stage_at(int tile) const { return shared + S::ROW_TILE + tile % kKeyStages * S::STAGE; }

  // No address is kept from tile to tile: registers are short, and what a thread's part is, is soon made again.
  template <int D> __device__ __forceinline__ void fetch(uint32_t tile, const T *rows, int64_t stride, int count, int pieces) const {
    const int thread = remade(this->thread);
    constexpr int kPieces = D / 8, kStep = kGroupThreads / kPieces;
    if constexpr (kKeys % kStep == 0 && kStep % 16 == 0) {
      if (count >= kKeys && pieces == kPieces) {
        const T *source = rows + thread / kPieces * stride + thread % kPieces * 8;
        const uint32_t target = tile + Tile<D>::at(thread / kPieces, thread % kPieces);
#pragma unroll
        for (int i = 0; i < kKeys / kStep; ++i, source += kStep * stride) copy_async(target + i * (kStep / 16) * Tile<D>::kBlockBytes, source, true);
        return;
      }
    }
    copy_tile<D, kKeys, kGroupThreads>(tile, rows, stride, count, thread, pieces);
  }
  __device__ __forceinline__ void fetch(int tile) const {
    const int64_t first = static_cast<int64_t>(tile) * kKeys;
    const int count = static_cast<int>(min(p.length - first, static_cast<int64_t>(kKeys)));
    const uint32_t stage = stage_at(tile);
    fetch<K>(stage, keys + first * p.key.token_stride, p.key.token_stride, count, pieces_of<K, V>(p));
    fetch<V>(stage + S::KEYS, values + first * p.value.token_stride, p.value.token_stride, count, V / 8);
    if (thread < kKeys / 4) copy_async(shared + S::SCALES_AT + tile % kKeyStages * kKeys * 4 + thread * 16, scales + first + thread * 4, true);
  }
};

// What makes a weight of a product, for a lane's two rows: a number of each, and the unit that weights are in.
struct RowWeights {
  bool squares;  // of all rows of the block
  float a, shift[2], rest[2], size[2];

  // f's numbers, times what float16 needs; factor: what makes s of q . k^, for a query of zeros anything but 0.
  __device__ __forceinline__ void set(float a_of_head, float b, float c, const float (&factor)[2], bool narrow) {
    a = a_of_head;
    bool fits = !narrow && c > 0.f && b * b <= kSquares * a * c;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float gamma = c * factor[half] * factor[half];
      fits = fits && gamma >= 0x1p-40f && gamma <= 0x1p40f;  // float32 holds sums of weights over gamma
    }
    squares = __shfl_sync(0xffffffffu, !__syncthreads_or(!fits), 0);  // so that the compiler knows, too, that all lanes agree
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float beta = b * factor[half], gamma = c * factor[half] * factor[half];
      if (squares) shift[half] = 0.5f * b / (c * factor[half]), rest[half] = a / gamma - shift[half] * shift[half], size[half] = gamma;
      else shift[half] = beta, rest[half] = gamma, size[half] = 1.f;
    }
  }
  template <bool SQUARES> __device__ __forceinline__ float of(float s, float key_scale, int half) const {
    if constexpr (SQUARES) {
      const float u = fmaf(s, key_scale, shift[half]);
      return fmaf(u, u, rest[half]);
    } else {
      const float t = s * key_scale;
      return fmaf(fmaf(rest[half], t, shift[half]), t, a);
    }
  }
};

// A warp's 16 rows.
template <typename T, int K, int V, Gates GATES> struct OutputRows {
  static constexpr bool GATED = GATES != NO_GATES;
  using S = OutputShape<K, V, GATES>;
  using E = Element<T>;
  using Others = StagedGates<kKeyStages>;
  static constexpr int KEY_BLOCKS = K / 16, VALUE_BLOCKS = V / 16, TOKEN_BLOCKS = kKeys / 16;

  const linattn_problem &p;
  unsigned char *const shared;
  const uint32_t row_tile;
  const int lane, warp, group, place;
  const int64_t begin, group_begin;  // the first row of the block, and of the warpgroup
  float shrink, mass[2], lost[2] = {}, acc[2 * VALUE_BLOCKS][4];
  uint32_t q[KEY_BLOCKS][4];
  RowWeights weight;
  OwnGates<1> gates;

  __device__ __forceinline__ OutputRows(const linattn_problem &p, const Place &own, unsigned char *shared)
      : p(p), shared(shared), row_tile(shared_address(shared)), lane(threadIdx.x & 31), warp(warp_number()), group(lane >> 2), place(lane & 3), begin(own.begin),
        group_begin(own.begin + 64 * (warp / 4)) {
    mass[0] = mass[1] = 0.f;
#pragma unroll
    for (int block = 0; block < 2 * VALUE_BLOCKS; ++block)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[block][i] = 0.f;
  }

  __device__ __forceinline__ void load_queries() {
    const Blocks<K> blocks(row_tile, lane_down<K>(lane));
#pragma unroll
    for (int block = 0; block < KEY_BLOCKS; ++block) ldmatrix(q[block], blocks.at(0, block) + Tile<K>::rows_at(warp));
  }

  // scale: 1 / |q| of the lane's rows; 0 where they have no direction, or a length whose square is beyond float32.
  __device__ __forceinline__ void set_weights(const Place &own, float (&scale)[2]) {
    const float *const of_head = p.coefficients + own.head;
    const float temperature = of_head[3 * p.query_heads], a = of_head[0], b = of_head[p.query_heads], c = of_head[2 * p.query_heads];
    shrink = weight_scale<T>(a, b, c, temperature);
    scale[0] = scale[1] = 1.f;
    if (p.normalize_qk) {
      row_products<T>(scale[0], scale[1], q, Blocks<K>(row_tile, lane_across<K>(lane)), Tile<K>::rows_at(warp), lane);
      scale[0] = inverse_norm(scale[0]), scale[1] = inverse_norm(scale[1]);
    }
    const float factor[2] = {temperature * near_one(scale[0]), temperature * near_one(scale[1])};
    weight.set(a * shrink, b * shrink, c * shrink, factor, E::kNarrow);
    bring_near_one(scale);
  }
  // A query is multiplied by a power of two, which loses nothing, so that no product with a key that float32 holds is beyond it; one whose scale is 0 becomes 0.
  static __device__ __forceinline__ float power_below(float scale) { return E::kNarrow ? 1.f : __uint_as_float(__float_as_uint(scale) & 0x7f800000u); }
  static __device__ __forceinline__ float near_one(float scale) { return scale == 0.f ? 1.f : scale / power_below(scale); }
  __device__ __forceinline__ void bring_near_one(const float (&scale)[2]) {
    if constexpr (!E::kNarrow) {
      const uint32_t power[2] = {E::pack(power_below(scale[0]), power_below(scale[0])), E::pack(power_below(scale[1]), power_below(scale[1]))};
#pragma unroll
      for (int block = 0; block < KEY_BLOCKS; ++block)
#pragma unroll
        for (int i = 0; i < 4; ++i) q[block][i] = multiply_two(q[block][i], power[i % 2]);
    }
  }

  __device__ __forceinline__ void multiply_keys(float (&s)[2 * TOKEN_BLOCKS][4], uint32_t stage) {
    const uint64_t keys = warpgroup_operand<K>(stage);
    warpgroup_keep(s);
    warpgroup_begin();
#pragma unroll
    for (int block = 0; block < KEY_BLOCKS; ++block) WarpgroupProduct<T, kKeys, false>::run(s, q[block], warpgroup_moved(keys, Tile<K>::columns_at(2 * block)), block > 0);
    warpgroup_commit();
  }
  __device__ __forceinline__ void multiply_values(const uint32_t (&weights)[TOKEN_BLOCKS][4], uint32_t stage) {
    const uint64_t values = warpgroup_operand<V>(stage + S::KEYS, Tile<V>::kPanelBytes);
    warpgroup_keep(acc);
    warpgroup_begin();
#pragma unroll
    for (int block = 0; block < TOKEN_BLOCKS; ++block) WarpgroupProduct<T, V, true>::run(acc, weights[block], warpgroup_moved(values, Tile<V>::rows_at(block)), true);
    warpgroup_commit();
  }

  // Whether not all pairs of a tile are seen, or gated alike.
  __device__ __forceinline__ bool is_near(int tile, const Others *others) const {
    const int64_t first = static_cast<int64_t>(tile) * kKeys;
    if constexpr (GATES == RUNS) return is_diagonal(tile) || __shfl_sync(0xffffffffu, told(others, tile % kKeyStages, MIXED), 0);
    if constexpr (GATES == DECAY) return is_diagonal(tile);
    return first + kKeys > p.length || (p.causal && first + kKeys - 1 > group_begin);
  }
  __device__ __forceinline__ bool is_diagonal(int tile) const { return p.causal && static_cast<int64_t>(tile) * kKeys >= begin; }

  // A tile's products into its weights.
  template <bool SQUARES, bool NEAR> __device__ __forceinline__ void weigh(float (&s)[2 * TOKEN_BLOCKS][4], int tile, const Others *others) {
    const int stage = tile % kKeyStages;
    const int64_t first = static_cast<int64_t>(tile) * kKeys;
    const float *const scales = reinterpret_cast<const float *>(shared + S::SCALES_AT) + stage * kKeys + 2 * place;
    const int end = static_cast<int>(min(p.length - first, static_cast<int64_t>(kKeys)));
    const int row = 16 * (warp % 4) + group, last = p.causal ? static_cast<int>(group_begin - first) + row : kKeys;  // key of the tile that the first row sees
    const bool diagonal = is_diagonal(tile);
#pragma unroll
    for (int n = 0; n < 2 * TOKEN_BLOCKS; ++n) {
      const int column = 8 * n + 2 * place;
      const float2 scale = *reinterpret_cast<const float2 *>(scales + 8 * n);
#pragma unroll
      for (int i = 0; i < 4; ++i) s[n][i] = weight.template of<SQUARES>(s[n][i], i & 1 ? scale.y : scale.x, i >> 1);
      if constexpr (GATED && NEAR) {
        const float2 exponent = *reinterpret_cast<const float2 *>(others->exponent[stage] + column);
        int2 run = make_int2(1, 1);
        if constexpr (GATES == RUNS) run = *reinterpret_cast<const int2 *>(others->run[stage] + column);
#pragma unroll
        for (int i = 0; i < 4; ++i)
          s[n][i] = gates.times(s[n][i], 0, i >> 1, i & 1 ? exponent.y : exponent.x, i & 1 ? run.y : run.x, column + (i & 1) <= last + 8 * (i >> 1), diagonal);
      } else if constexpr (GATED) {
        const float2 factor = *reinterpret_cast<const float2 *>(others->factor[stage] + column);
#pragma unroll
        for (int i = 0; i < 4; ++i) s[n][i] *= i & 1 ? factor.y : factor.x;
      } else if constexpr (NEAR) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (column + (i & 1) >= end || column + (i & 1) > last + 8 * (i >> 1)) s[n][i] = 0.f;
      }
      if (NEAR && (GATED || tile == 0)) lost[0] += lost_by_rounding<T>(s[n][0], s[n][1]), lost[1] += lost_by_rounding<T>(s[n][2], s[n][3]);
      mass[0] += s[n][0] + s[n][1], mass[1] += s[n][2] + s[n][3];
    }
  }

  static __device__ __forceinline__ void round(uint32_t (&weights)[TOKEN_BLOCKS][4], const float (&s)[2 * TOKEN_BLOCKS][4]) {
#pragma unroll
    for (int n = 0; n < 2 * TOKEN_BLOCKS; ++n) weights[n / 2][n % 2 * 2] = E::pack(s[n][0], s[n][1]), weights[n / 2][n % 2 * 2 + 1] = E::pack(s[n][2], s[n][3]);
  }

  // The first tile's products and weights.
  template <bool SQUARES, bool NEAR> __device__ __forceinline__ void begin_with(int tile, uint32_t stage, uint32_t (&weights)[TOKEN_BLOCKS][4], const Others *others) {
    float s[2 * TOKEN_BLOCKS][4];
    multiply_keys(s, stage);
    warpgroup_wait<0>();
    warpgroup_keep(s);
    weigh<SQUARES, NEAR>(s, tile, others);
    round(weights, s);
  }
  // A tile's weights times its values, beside the next one's products and weights. own: whether the block's own tokens begin with the next; what lies before
  // takes its own factor all at once then, and pairs among the block's own one by one.
  template <bool SQUARES, bool NEAR, typename Beside>
  __device__ __forceinline__ void go_on(int next, uint32_t stage, uint32_t next_stage, uint32_t (&weights)[TOKEN_BLOCKS][4], const Others *others, bool own, Beside beside) {
    float s[2 * TOKEN_BLOCKS][4];
    multiply_keys(s, next_stage);
    multiply_values(weights, stage);
    beside();
    warpgroup_wait<1>();
    warpgroup_keep(s);
    if (GATED && NEAR && own) {
#pragma unroll
      for (int half = 0; half < 2; ++half) mass[half] *= gates.factor[0][half], lost[half] *= gates.factor[0][half];
    }
    weigh<SQUARES, NEAR>(s, next, others);
    warpgroup_keep(s);  // all of it before the wait
    warpgroup_wait<0>();
    warpgroup_keep(acc);
    if (GATED && NEAR && own) {
#pragma unroll
      for (int block = 0; block < 2 * VALUE_BLOCKS; ++block)
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[block][i] *= gates.factor[0][i >> 1];
    }
    round(weights, s);
  }
  __device__ __forceinline__ void end_with(uint32_t stage, const uint32_t (&weights)[TOKEN_BLOCKS][4]) {
    multiply_values(weights, stage);
    warpgroup_wait<0>();
    warpgroup_keep(acc);
  }

  // The means and masses. A warp stages its results over queries, which everybody has in registers.
  __device__ __forceinline__ void store(const Arguments &args, const Place &own) {
    float *const mass_rows = args.mass + (static_cast<int64_t>(own.batch) * p.query_heads + own.head) * p.length + own.begin;
    T *const results = head_of<T>(args.out, own.batch, own.head) + own.begin * args.out.token_stride;
    const bool stored = own.begin >= args.chunk;  // what states have added lies there
    float finish[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      mass[half] += __shfl_xor_sync(0xffffffffu, mass[half], 1);
      mass[half] += __shfl_xor_sync(0xffffffffu, mass[half], 2);
      lost[half] += __shfl_xor_sync(0xffffffffu, lost[half], 1);
      lost[half] += __shfl_xor_sync(0xffffffffu, lost[half], 2);
      mass[half] *= weight.size[half], lost[half] *= weight.size[half];
      if (GATES == RUNS && gates.is_padding(0, half)) mass[half] = 0.f;
      const int row = 16 * warp + 8 * half + group;
      if (stored) {
        if (row < own.rows) mass[half] += mass_rows[row];
        __syncwarp();  // all have read what one of them overwrites
#pragma unroll
        for (int n = 0; n < 2 * VALUE_BLOCKS; ++n) acc[n][2 * half] *= weight.size[half], acc[n][2 * half + 1] *= weight.size[half];
      }
      if (place == 0 && row < own.rows) mass_rows[row] = mass[half] / shrink;
      const float divisor = mass[half] - lost[half];
      finish[half] = mass[half] == 0.f || divisor == 0.f ? 0.f : (stored ? 1.f : weight.size[half]) / divisor;
    }
    if (stored) add_stored<T, V>(acc, results, args.out.token_stride, 16 * warp + group, own.rows, place);
    const Blocks<V> blocks(row_tile, lane_down<V>(lane));
#pragma unroll
    for (int block = 0; block < VALUE_BLOCKS; ++block)
      store_block<T, V>(blocks.at(0, block) + Tile<V>::rows_at(warp), acc[2 * block], acc[2 * block + 1], finish[0], finish[1], lane);
    __syncwarp();
    for (int index = lane; index < 16 * (V / 8); index += 32) {
      const int row = 16 * warp + index / (V / 8), piece = index % (V / 8);
      if (row < own.rows) *reinterpret_cast<uint4 *>(results + row * args.out.token_stride + piece * 8) = *reinterpret_cast<const uint4 *>(shared + Tile<V>::at(row, piece));
    }
  }
};

// Gates of two tiles on their way, a thread a token; and which tiles a block looks at.
template <Gates GATES> struct GateStream {
  using Others = StagedGates<kKeyStages>;
  Others *const others;
  const GateReader queries, keys;
  const int thread;
  GateCopy on_way;
  int32_t low = 0, high = 0;  // the runs of the block's own tokens

  __device__ __forceinline__ GateStream(const Arguments &args, const Place &own, Others *others, int thread)
      : others(others), queries(args.gates, args.problem, true, own.batch, own.head, own.begin - 1), keys(args.gates, args.problem, false, own.batch, own.head, own.begin - 1),
        thread(thread) {}

  // Of the tiles from `first` to `end`, the first that holds a key of the block's runs, and behind the last.
  __device__ __forceinline__ void look(const Place &own, int &first, int &end) {
    range_of_runs<kGroupThreads>(*others, queries, own.begin, own.rows, low, high, thread);
    int begin = end, behind = first;
    for (int64_t token = static_cast<int64_t>(first) * kKeys + thread; token < static_cast<int64_t>(end) * kKeys; token += kGroupThreads) {
      const int32_t run = keys.run_of(token);
      if (run <= 0 || run < low || run > high) continue;
      begin = min(begin, static_cast<int>(token / kKeys)), behind = max(behind, static_cast<int>(token / kKeys) + 1);
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) begin = min(begin, __shfl_xor_sync(0xffffffffu, begin, step)), behind = max(behind, __shfl_xor_sync(0xffffffffu, behind, step));
    __syncthreads();  // everybody has read the block's runs
    if (thread % 32 == 0) others->lowest[thread / 32] = begin, others->highest[thread / 32] = behind;
    __syncthreads();
#pragma unroll
    for (int warp = 0; warp < kGroupThreads / 32; ++warp) begin = min(begin, others->lowest[warp]), behind = max(behind, others->highest[warp]);
    first = __shfl_sync(0xffffffffu, begin, 0), end = __shfl_sync(0xffffffffu, behind, 0);
  }

  __device__ __forceinline__ void start(int tile, int end) {
    tile += thread / kKeys;
    if (thread < 2 * kKeys && tile < end) on_way.load(keys, static_cast<int64_t>(tile) * kKeys, thread % kKeys);
  }
  __device__ __forceinline__ void write(int tile, int end) const {
    tile += thread / kKeys;
    if (thread >= 2 * kKeys || tile >= end) return;
    const int stage = tile % kKeyStages, place = thread % kKeys;
    if constexpr (GATES == RUNS) on_way.store(*others, false, stage, low, high, place);
    else others->exponent[stage][place] = on_way.exponent(false), others->factor[stage][place] = on_way.factor(false);
  }
  __device__ __forceinline__ bool is_padded(int tile) const { return told(others, tile % kKeyStages, PADDED); }
};

// What a block walks over: its tiles from `first` to `end`, two at a time on their way, and their gates.
template <typename T, int K, int V, Gates GATES> struct OutputWalk {
  using S = OutputShape<K, V, GATES>;
  using Rows = OutputRows<T, K, V, GATES>;
  const KeyStream<T, K, V, GATES> &keys;
  GateStream<GATES> &gates;
  unsigned char *const shared;
  const int first, end;

  __device__ __forceinline__ void start(int tile) const {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (tile + i < end) keys.fetch(tile + i);
    copy_commit();
    if constexpr (GATES != NO_GATES) gates.start(tile, end);
  }
  __device__ __forceinline__ void write_gates(int tile) const {
    if constexpr (GATES != NO_GATES) gates.write(tile, end);
  }
  // Behind the wait for the copies of two tiles: everybody's are here, and what lies where the next go has been read.
  __device__ __forceinline__ void arrive(int tile) const {
    warpgroup_publish();
    __syncthreads();
    if constexpr (GATES == RUNS) {
      const bool padded = gates.is_padded(tile) || (tile + 1 < end && gates.is_padded(tile + 1));
      if (!__shfl_sync(0xffffffffu, padded, 0)) return;
      for (int each = tile; each < min(tile + 2, end); ++each)
        if (gates.is_padded(each)) zero_padding<V, kGroupThreads>(shared + S::ROW_TILE + each % kKeyStages * S::STAGE + S::KEYS, gates.others->run[each % kKeyStages], keys.thread);
      warpgroup_publish();
      __syncthreads();
    }
  }

  // Rows see the tiles before `mine`; own: that with which the block's own tokens begin, beside a decay.
  template <bool SQUARES> __device__ __forceinline__ void go(Rows &rows, int mine, int own) const {
    uint32_t weights[Rows::TOKEN_BLOCKS][4];
    if (first < mine) {
      if (rows.is_near(first, gates.others)) rows.template begin_with<SQUARES, true>(first, keys.stage_at(first), weights, gates.others);
      else rows.template begin_with<SQUARES, false>(first, keys.stage_at(first), weights, gates.others);
    }
    for (int tile = first; tile < end; ++tile) {
      const int next = tile + 1;
      const bool turn = (next - first) % 2 == 0;  // to the next two
      if (turn && next < end) {
        copy_wait<0>();
        arrive(next);
        start(next + 2);
      }
      const uint32_t stage = keys.stage_at(tile), next_stage = keys.stage_at(next);
      const auto beside = [&] {
        if (turn) write_gates(next + 2);
      };
      if (next < mine) {
        if (rows.is_near(next, gates.others)) rows.template go_on<SQUARES, true>(next, stage, next_stage, weights, gates.others, next == own, beside);
        else rows.template go_on<SQUARES, false>(next, stage, next_stage, weights, gates.others, false, beside);
      } else {
        beside();
        if (tile < mine) rows.end_with(stage, weights);
      }
    }
  }
};

}  // namespace linattn_pairs
