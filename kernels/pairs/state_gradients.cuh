// What the state of all tokens outside of a chunk adds to the gradients of the chunk's tokens. Of a token x (a query, a key) and its other vector y (w, v):
//   M_ab = S_ab . [y, 1's factor] for each pair of features, in registers;   d(x S x)_a = 2 sum_b M_ab x_b
// and of values sum_ab x_a x_b R_ab. Results are rounded and stored; the kernels of pairs add theirs.
#pragma once
#include "pairs/state_sums.cuh"

namespace linattn_pairs {

template <int K, int V, bool KEYS> struct ReaderShape {
  using S = FeatureState<K, V>;
  static constexpr bool NARROW = K == 32 && V == 32;  // twice as many warps share a multiprocessor
  static constexpr int TILES = NARROW || (KEYS && V == 128) ? 1 : 2, MIN_BLOCKS = NARROW ? 2 : 1, WARP_ROWS = 16 * TILES,
                       TOKENS = kWarps * WARP_ROWS;  // a warp's tokens, a block's
  static constexpr int ITEMS = V == 128 ? 4 : 8, STAGE_ROWS = 16 * ITEMS, STAGE = STAGE_ROWS * V * 2, STAGES = 3;
  static constexpr int PAIR_STAGES = S::ITEMS / ITEMS;
  static constexpr int CROSS = K > 16 ? K - 16 + 4 : 0;  // numbers a token: sums over b of M_ab x_b of the blocks above a's, on rows that meet no bank twice
  static constexpr int OWN = TOKENS * K * 2, OTHER = TOKENS * V * 2 > TOKENS * CROSS * 4 ? TOKENS * V * 2 : TOKENS * CROSS * 4;  // y, then the cross sums
  static constexpr int STAGES_AT = OWN + OTHER, MASSES_AT = STAGES_AT + STAGES * STAGE, TOTALS_AT = MASSES_AT + STAGES * STAGE_ROWS * 4, SHARED = TOTALS_AT + kWarps * 3 * 4;
};

// A warp's tokens.
template <int K, int V, bool KEYS> struct StateReader {
  using T = __nv_bfloat16;
  using E = Element<T>;
  using H = ReaderShape<K, V, KEYS>;
  using S = FeatureState<K, V>;
  static constexpr int TILES = H::TILES, BLOCKS = K / 16, VALUE_BLOCKS = V / 16;
  const int lane, warp, group, place;
  unsigned char *const shared;
  const uint32_t base;
  float factor[TILES][2];  // of the masses
  float acc[TILES][2 * BLOCKS][4], value_sums[KEYS ? TILES : 1][KEYS ? 2 * VALUE_BLOCKS : 1][4];
  uint32_t y[TILES][VALUE_BLOCKS][4];

  __device__ __forceinline__ StateReader(unsigned char *shared)
      : lane(threadIdx.x & 31), warp(warp_number()), group(lane >> 2), place(lane & 3), shared(shared), base(shared_address(shared)) {
    const Blocks<V> y_blocks(base + H::OWN, lane_down<V>(lane));
#pragma unroll
    for (int m = 0; m < TILES; ++m) {
#pragma unroll
      for (int n = 0; n < VALUE_BLOCKS; ++n) ldmatrix(y[m][n], y_blocks.at(0, n) + Tile<V>::rows_at(TILES * warp + m));
#pragma unroll
      for (int n = 0; n < 2 * BLOCKS; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[m][n][i] = 0.f;
      if constexpr (KEYS)
#pragma unroll
        for (int n = 0; n < 2 * VALUE_BLOCKS; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) value_sums[m][n][i] = 0.f;
    }
  }
  __device__ __forceinline__ int row(int m, int half) const { return H::WARP_ROWS * warp + 16 * m + 8 * half + group; }
  __device__ __forceinline__ uint32_t stripe(int m) const { return Tile<K>::rows_at(TILES * warp + m); }

  // [y, factor] . of 16 rows of the state at `stage`.
  __device__ __forceinline__ void multiply(float (&sums)[TILES][2][4], uint32_t stage, const float *masses, int item) const {
    const Blocks<V> across(stage, lane_across<V>(lane));
    const float2 masses_of[2] = {*reinterpret_cast<const float2 *>(masses + 16 * item + 2 * place), *reinterpret_cast<const float2 *>(masses + 16 * item + 2 * place + 8)};
#pragma unroll
    for (int m = 0; m < TILES; ++m)
#pragma unroll
      for (int t = 0; t < 2; ++t)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          sums[m][t][2 * half] = KEYS ? masses_of[t].x : masses_of[t].x * factor[m][half];
          sums[m][t][2 * half + 1] = KEYS ? masses_of[t].y : masses_of[t].y * factor[m][half];
        }
#pragma unroll
    for (int n = 0; n < VALUE_BLOCKS; ++n) {
      uint32_t rows[4];
      ldmatrix(rows, across.at(item, n));
#pragma unroll
      for (int m = 0; m < TILES; ++m) E::mma(sums[m][0], y[m][n], rows[0], rows[1]), E::mma(sums[m][1], y[m][n], rows[2], rows[3]);
    }
  }

  __device__ __forceinline__ void add_values(const uint32_t (&features)[TILES][4], uint32_t stage, int item) {
    const Blocks<V> down(stage, lane_down<V>(lane));
#pragma unroll
    for (int n = 0; n < VALUE_BLOCKS; ++n) {
      uint32_t rows[4];
      ldmatrix_transposed(rows, down.at(item, n));
#pragma unroll
      for (int m = 0; m < TILES; ++m) E::mma(value_sums[m][2 * n], features[m], rows[0], rows[1]), E::mma(value_sums[m][2 * n + 1], features[m], rows[2], rows[3]);
    }
  }

  // Four numbers a token, each the sum over the four lanes of a group: lane `place` gets the one of that number. By masks that the compiler knows nothing of: it would
  // make branches of what it knows to be one of two numbers, and shuffle in them.
  __device__ __forceinline__ float shared_out(const float (&x)[4]) const {
    const uint32_t odd = 0u - static_cast<uint32_t>(remade(place & 1)), upper = 0u - static_cast<uint32_t>(remade(place >> 1));
    const auto pick = [](uint32_t mask, float yes, float no) { return __uint_as_float((__float_as_uint(yes) & mask) | (__float_as_uint(no) & ~mask)); };
    const float first = pick(odd, x[1], x[0]) + __shfl_xor_sync(0xffffffffu, pick(odd, x[0], x[1]), 1);
    const float second = pick(odd, x[3], x[2]) + __shfl_xor_sync(0xffffffffu, pick(odd, x[2], x[3]), 1);
    return pick(upper, second, first) + __shfl_xor_sync(0xffffffffu, pick(upper, first, second), 2);
  }
  __device__ __forceinline__ float *cross(int m, int half, int a) const { return reinterpret_cast<float *>(shared + H::OWN) + row(m, half) * H::CROSS + a; }

  // Items of pairs (a .. a + 3, BLOCK). CROSS: a lies in a block before.
  template <int BLOCK, bool CROSS> __device__ __forceinline__ void add_items(const uint32_t (&x)[TILES][4], uint32_t stage, const float *masses, int item, int a) {
    uint2 near[TILES][2];
    float cross_sums[TILES][2][4] = {};
#pragma unroll
    for (int m = 0; m < TILES; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) near[m][half] = *reinterpret_cast<const uint2 *>(shared + Tile<K>::at(row(m, half), a / 8) + a % 8 * 2);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float sums[TILES][2][4];
      multiply(sums, stage, masses, item + i);
      if constexpr (KEYS) {
        uint32_t features[TILES][4];
#pragma unroll
        for (int m = 0; m < TILES; ++m)
#pragma unroll
          for (int j = 0; j < 4; ++j) features[m][j] = multiply_two(x[m][j], twice_of(near[m][j % 2], i));
        add_values(features, stage, item + i);
      }
#pragma unroll
      for (int m = 0; m < TILES; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float own = number_of(near[m][half], i) * (CROSS ? 1.f : 2.f);
#pragma unroll
          for (int t = 0; t < 2; ++t) {
            const uint32_t two = x[m][2 * t + half];
            const float left = sums[m][t][2 * half], right = sums[m][t][2 * half + 1];
            acc[m][2 * BLOCK + t][2 * half] = fmaf(left, own, acc[m][2 * BLOCK + t][2 * half]);
            acc[m][2 * BLOCK + t][2 * half + 1] = fmaf(right, own, acc[m][2 * BLOCK + t][2 * half + 1]);
            if constexpr (CROSS) cross_sums[m][half][i] = fmaf(left, E::low(two), fmaf(right, E::high(two), cross_sums[m][half][i]));
          }
        }
    }
    if constexpr (CROSS)
#pragma unroll
      for (int m = 0; m < TILES; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float sum = shared_out(cross_sums[m][half]);
          float *const cell = cross(m, half, a + place);
          *cell = a >= 16 * (BLOCK - 1) ? sum : *cell + sum;  // the first block above that of a
        }
  }

  // All pairs whose b is in BLOCK.
  template <int BLOCK> __device__ __forceinline__ void add_block(StateStages<K, V, H> &stages) {
    const Blocks<K> x_blocks(base, lane_down<K>(lane));
    uint32_t x[TILES][4];
#pragma unroll
    for (int m = 0; m < TILES; ++m) ldmatrix(x[m], x_blocks.at(0, BLOCK) + stripe(m));
#pragma unroll 1
    for (int first = 0; first < 16 * (BLOCK + 1); first += H::ITEMS) {
      const int number = stages.turn();
      const uint32_t stage = stages.rows_at(number);
      const float *const masses = stages.masses_at(shared, number);
#pragma unroll 1
      for (int item = 0; item < H::ITEMS; item += 4) {
        if (BLOCK > 0 && first < 16 * BLOCK) add_items<BLOCK, true>(x, stage, masses, item, first + item);
        else add_items<BLOCK, false>(x, stage, masses, item, first + item);
      }
    }
    if constexpr (BLOCK + 1 < BLOCKS) add_block<BLOCK + 1>(stages);
  }

  // What the lanes of a warp gathered for the blocks of a.
  __device__ __forceinline__ void add_cross() {
    if constexpr (BLOCKS > 1) {
      __syncwarp();
#pragma unroll
      for (int m = 0; m < TILES; ++m)
#pragma unroll
        for (int n = 0; n < 2 * (BLOCKS - 1); ++n)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float2 two = *reinterpret_cast<const float2 *>(cross(m, half, 8 * n + 2 * place));
            acc[m][n][2 * half] += two.x, acc[m][n][2 * half + 1] += two.y;
          }
    }
  }

  // Sums of values are of vectors as they are, not of unit length.
  __device__ __forceinline__ void scale_values(const float (&scale)[TILES][2]) {
    if constexpr (KEYS)
#pragma unroll
      for (int m = 0; m < TILES; ++m)
#pragma unroll
        for (int n = 0; n < 2 * VALUE_BLOCKS; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) value_sums[m][n][i] *= scale[m][i >> 1];
  }

  // The rows of x_a: acc becomes quadratic * acc + linear * S_a . [y, factor], and of values the sums of both. along: x . of either, where asked for.
  __device__ __forceinline__ void add_linear(StateStages<K, V, H> &stages, const float (&quadratic)[TILES][2], const float (&linear)[TILES][2], float (&along)[2][TILES][2]) {
    const int number = stages.turn();
    const uint32_t stage = stages.rows_at(number);
    const float *const masses = stages.masses_at(shared, number);
    const Blocks<K> x_blocks(base, lane_down<K>(lane));
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) {
      uint32_t x[TILES][4];
#pragma unroll
      for (int m = 0; m < TILES; ++m) ldmatrix(x[m], x_blocks.at(0, block) + stripe(m));
      float sums[TILES][2][4];
      multiply(sums, stage, masses, block);
      if constexpr (KEYS) add_values(x, stage, block);
#pragma unroll
      for (int m = 0; m < TILES; ++m)
#pragma unroll
        for (int t = 0; t < 2; ++t)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int half = i >> 1;
            const float own = i & 1 ? E::high(x[m][2 * t + half]) : E::low(x[m][2 * t + half]);
            float &sum = acc[m][2 * block + t][i];
            along[0][m][half] = fmaf(own, sums[m][t][i], along[0][m][half]), along[1][m][half] = fmaf(own, sum, along[1][m][half]);
            sum = quadratic[m][half] * sum + linear[m][half] * sums[m][t][i];
          }
    }
  }

  // y . of 16 tokens with a row of the state that all of them share.
  __device__ __forceinline__ float along_values(const float *line, int m, int half) const {
    float sum = 0.f;
#pragma unroll
    for (int n = 0; n < VALUE_BLOCKS; ++n)
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const float2 two = *reinterpret_cast<const float2 *>(line + 16 * n + 8 * t + 2 * place);
        sum += E::low(y[m][n][2 * t + half]) * two.x + E::high(y[m][n][2 * t + half]) * two.y;
      }
    return over_place(sum);
  }

  // The keys' sums of A dA over the queries behind the chunk.
  __device__ __forceinline__ void store_decay_sums(const float *columns, const float (&scale)[TILES][2], const float (&gate)[TILES][2], const float (&along)[2][TILES][2],
                                                   float *column_sums) const {
#pragma unroll
    for (int m = 0; m < TILES; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float unit = scale[m][half], linear = over_place(along[0][m][half]), quadratic = 0.5f * over_place(along[1][m][half]);
        const float sum = along_values(columns + S::VALUES, m, half) + columns[S::COUNT] + unit * (linear + unit * quadratic);
        if (place == 0) column_sums[row(m, half)] = gate[m][half] * sum;
      }
  }
};

// A block: 256 queries of one chunk, or keys (128 of narrow rows, or beside wide values). Queries also bring what the coefficients' gradients are made of, as rows_kernel does.
template <int K, int V, bool KEYS> __global__ void __launch_bounds__(kGradientThreads, ReaderShape<K, V, KEYS>::MIN_BLOCKS)
    state_reader_kernel(const __grid_constant__ StateArguments args) {
  using T = __nv_bfloat16;
  using H = ReaderShape<K, V, KEYS>;
  using S = FeatureState<K, V>;
  constexpr int TILES = H::TILES, VALUE_BLOCKS = V / 16;
  extern __shared__ __align__(1024) unsigned char shared[];
  const Gradients &g = args.of;
  const linattn_problem &p = g.problem;
  const int thread = threadIdx.x, heads = KEYS ? p.key_heads : p.query_heads, pair = blockIdx.x / args.tiles, tile = blockIdx.x % args.tiles;
  const int batch = pair / heads, head = pair % heads, key_head = KEYS ? head : head / (p.query_heads / p.key_heads), pieces = pieces_of<K, V>(p);
  const int64_t begin = (KEYS ? 0 : g.chunk) + static_cast<int64_t>(tile) * H::TOKENS;
  const int rows = static_cast<int>(min(p.length - begin, static_cast<int64_t>(H::TOKENS)));
  const int64_t record = (static_cast<int64_t>(batch) * p.key_heads + key_head) * args.chunks + begin / g.chunk;
  const float *const columns = args.columns + record * S::FLOATS;
  const uint32_t base = shared_address(shared);
  const linattn_tensor &own = KEYS ? p.key : p.query, &other = KEYS ? p.value : g.grad_out, &result = KEYS ? g.grad_key : g.grad_query;
  const int query_head = KEYS ? head * (p.query_heads / p.key_heads) : head;
  if (is_out_of_reach(g, !KEYS, batch, query_head, KEYS ? p.query_heads / p.key_heads : 1, begin, rows)) {
    zero_rows(head_of<T>(result, batch, head) + begin * result.token_stride, result.token_stride, rows, pieces, thread, kGradientThreads);
    if constexpr (KEYS) zero_rows(head_of<T>(g.grad_value, batch, head) + begin * g.grad_value.token_stride, g.grad_value.token_stride, rows, V / 8, thread, kGradientThreads);
    float *const sums = KEYS ? g.column_sums : g.row_sums;
    if (sums && thread < rows) sums[static_cast<int64_t>(pair) * p.length + begin + thread] = 0.f;
    if (!KEYS && thread < 3) g.partials[(static_cast<int64_t>(pair) * g.parts + g.row_tiles + tile) * 3 + thread] = 0.f;
    return;
  }
  StateStages<K, V, H> stages{args.rows + record * S::ROWS * V, columns, base, thread};
  copy_tile<K, H::TOKENS, kGradientThreads>(base, head_of<const T>(own, batch, head) + begin * own.token_stride, own.token_stride, rows, thread, pieces);
  copy_tile<V, H::TOKENS, kGradientThreads>(base + H::OWN, head_of<const T>(other, batch, head) + begin * other.token_stride, other.token_stride, rows, thread);
  copy_commit();
#pragma unroll
  for (int i = 0; i < H::STAGES - 1; ++i) stages.fetch();
  copy_wait<H::STAGES - 1>();
  __syncthreads();
  if (p.key_segments) {
    const GateReader own_gates(g.gates, p, !KEYS, batch, query_head, begin);
    zero_own_padding<K, kGradientThreads, H::TOKENS>(shared, own_gates, begin, thread);
    zero_own_padding<V, kGradientThreads, H::TOKENS>(shared + H::OWN, own_gates, begin, thread);
    __syncthreads();
  }

  StateReader<K, V, KEYS> work(shared);
  const Coefficients f(p, query_head);
  float scale[TILES][2], quadratic[TILES][2], linear[TILES][2], gate[TILES][2], along[2][TILES][2] = {};  // gate: of queries over their mass
#pragma unroll
  for (int m = 0; m < TILES; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t token = begin + work.row(m, half);
      const bool real = token < p.length;
      gate[m][half] = !real ? 0.f : is_gated(p) ? gate_of(g, !KEYS, batch, query_head, token) : 1.f;
      if constexpr (KEYS) {
        scale[m][half] = real ? g.key_scale[static_cast<int64_t>(pair) * g.padded + token] : 0.f;
        quadratic[m][half] = gate[m][half] * scale[m][half], linear[m][half] = gate[m][half];
      } else {
        const float *const numbers = g.query_numbers + static_cast<int64_t>(pair) * kNumbers * g.padded + token;
        scale[m][half] = real ? numbers[2 * g.padded] : 0.f, gate[m][half] *= real ? numbers[0] : 0.f;
        work.factor[m][half] = gate[m][half] != 0.f ? numbers[g.padded] * g.mass[static_cast<int64_t>(pair) * p.length + token] : 0.f;
        linear[m][half] = gate[m][half] * f.beta * scale[m][half], quadratic[m][half] = gate[m][half] * f.gamma * scale[m][half] * scale[m][half];
        work.factor[m][half] += work.along_values(columns + S::VALUES, m, half);  // the mean, which values are as far from
      }
    }

  work.template add_block<0>(stages);
  work.add_cross();
  work.scale_values(scale);
  work.add_linear(stages, quadratic, linear, along);
  work.scale_values(scale);
  copy_wait<0>();
  __syncthreads();  // nobody reads what lies where results are staged

  const Blocks<K> x_blocks(base, lane_down<K>(work.lane));
  T *const results = head_of<T>(result, batch, head) + begin * result.token_stride;
#pragma unroll
  for (int m = 0; m < TILES; ++m) {
    if (p.normalize_qk) project<T, K / 16>(work.acc[m], x_blocks, work.stripe(m), scale[m]);
    const float first = KEYS ? scale[m][0] : 1.f, second = KEYS ? scale[m][1] : 1.f;
    store_rows<T, K>(result, results, shared, x_blocks, work.stripe(m), work.acc[m], first, second, rows, TILES * work.warp + m, work.lane, pieces);
  }
  if constexpr (KEYS) {
    if (g.column_sums) work.store_decay_sums(columns, scale, gate, along, g.column_sums + static_cast<int64_t>(pair) * p.length + begin);
    const Blocks<V> y_blocks(base + H::OWN, lane_down<V>(work.lane));
    T *const values = head_of<T>(g.grad_value, batch, head) + begin * g.grad_value.token_stride;
#pragma unroll
    for (int m = 0; m < TILES; ++m) {
#pragma unroll
      for (int n = 0; n < 2 * VALUE_BLOCKS; ++n) {
        const float2 two = *reinterpret_cast<const float2 *>(columns + S::VALUES + 8 * n + 2 * work.place);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float &left = work.value_sums[m][n][2 * half], &right = work.value_sums[m][n][2 * half + 1];
          left = (left + two.x) * gate[m][half], right = (right + two.y) * gate[m][half];
        }
      }
      store_rows<T, V>(g.grad_value, values, shared + H::OWN, y_blocks, Tile<V>::rows_at(TILES * work.warp + m), work.value_sums[m], 1.f, 1.f, rows, TILES * work.warp + m,
                       work.lane);
    }
  } else {
    float sums[3] = {};
    const float count = columns[S::COUNT];
#pragma unroll
    for (int m = 0; m < TILES; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float unit = scale[m][half];
        const float of[3] = {gate[m][half] * work.factor[m][half] * count, gate[m][half] * unit * over_place(along[0][m][half]),
                             0.5f * gate[m][half] * unit * unit * over_place(along[1][m][half])};
        const int64_t token = begin + work.row(m, half);
        if (g.row_sums && work.place == 0 && token < p.length) g.row_sums[static_cast<int64_t>(pair) * p.length + token] = f.a * of[0] + f.beta * of[1] + f.gamma * of[2];
#pragma unroll
        for (int i = 0; i < 3; ++i) sums[i] += work.place == 0 ? of[i] : 0.f;
      }
    float *const totals = reinterpret_cast<float *>(shared + H::TOTALS_AT);
#pragma unroll
    for (int i = 0; i < 3; ++i) {
#pragma unroll
      for (int step = 16; step > 0; step /= 2) sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], step);
      if (work.lane == 0) totals[3 * work.warp + i] = sums[i];
    }
    __syncthreads();
    if (thread < 3) {
      float sum = 0.f;
      for (int w = 0; w < kWarps; ++w) sum += totals[3 * w + thread];
      g.partials[(static_cast<int64_t>(pair) * g.parts + g.row_tiles + tile) * 3 + thread] = sum;
    }
  }
}

template <int K, int V, bool KEYS> cudaError_t launch_reader(StateArguments args, cudaStream_t stream) {
  using H = ReaderShape<K, V, KEYS>;
  const linattn_problem &p = args.of.problem;
  const int64_t first = KEYS ? 0 : args.of.chunk, last = KEYS ? (args.chunks - 1) * args.of.chunk : p.length;
  args.tiles = static_cast<int32_t>((last - first + H::TOKENS - 1) / H::TOKENS);
  if (const cudaError_t failed = cudaFuncSetAttribute(state_reader_kernel<K, V, KEYS>, cudaFuncAttributeMaxDynamicSharedMemorySize, H::SHARED)) return failed;
  state_reader_kernel<K, V, KEYS><<<static_cast<unsigned>(p.batch * (KEYS ? p.key_heads : p.query_heads) * args.tiles), kGradientThreads, H::SHARED, stream>>>(args);
  return cudaPeekAtLastError();
}

}  // namespace linattn_pairs
