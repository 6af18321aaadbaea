// What the state of all tokens before a chunk adds to the output of the chunk's queries: sums of values and masses, which the kernels of pairs add theirs to.
#pragma once
#include "pairs/state_sums.cuh"

namespace linattn_pairs {

template <int K, int V> struct OutputShape {
  using S = FeatureState<K, V>;
  static constexpr int TILES = 2, WARP_ROWS = 16 * TILES, TOKENS = kWarps * WARP_ROWS;
  static constexpr int ITEMS = V == 128 ? 4 : 8, STAGE_ROWS = 16 * ITEMS, STAGE = STAGE_ROWS * V * 2, STAGES = 3, PAIR_STAGES = S::ITEMS / ITEMS;
  static constexpr int OWN = TOKENS * (K > V ? K : V) * 2;  // queries, and then results
  static constexpr int STAGES_AT = OWN, MASSES_AT = STAGES_AT + STAGES * STAGE, SHARED = MASSES_AT + STAGES * STAGE_ROWS * 4;
};

// A warp's queries.
template <int K, int V> struct StateOutput {
  using E = Element<__nv_bfloat16>;
  using H = OutputShape<K, V>;
  static constexpr int TILES = H::TILES, BLOCKS = K / 16, VALUE_BLOCKS = V / 16;
  const int lane, warp, group, place;
  const unsigned char *const shared;
  const uint32_t base;
  float acc[TILES][2 * VALUE_BLOCKS][4] = {}, mass[TILES][2] = {};

  __device__ __forceinline__ explicit StateOutput(const unsigned char *shared)
      : lane(threadIdx.x & 31), warp(warp_number()), group(lane >> 2), place(lane & 3), shared(shared), base(shared_address(shared)) {}
  __device__ __forceinline__ int row(int m, int half) const { return H::WARP_ROWS * warp + 16 * m + 8 * half + group; }

  // `features` of one item: its rows' sums of values, and of masses times `factor`, from the numbers x of a block that the features are of.
  __device__ __forceinline__ void add(const uint32_t (&features)[TILES][4], const uint32_t (&x)[TILES][4], const float (&factor)[TILES][2], uint32_t stage, const float *masses,
                                      int item) {
    const Blocks<V> down(stage, lane_down<V>(lane));
#pragma unroll
    for (int n = 0; n < VALUE_BLOCKS; ++n) {
      uint32_t rows[4];
      ldmatrix_transposed(rows, down.at(item, n));
#pragma unroll
      for (int m = 0; m < TILES; ++m) E::mma(acc[m][2 * n], features[m], rows[0], rows[1]), E::mma(acc[m][2 * n + 1], features[m], rows[2], rows[3]);
    }
    const float2 near = *reinterpret_cast<const float2 *>(masses + 16 * item + 2 * place), far = *reinterpret_cast<const float2 *>(masses + 16 * item + 2 * place + 8);
#pragma unroll
    for (int m = 0; m < TILES; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t left = x[m][half], right = x[m][2 + half];
        const float sum = E::low(left) * near.x + E::high(left) * near.y + E::low(right) * far.x + E::high(right) * far.y;
        mass[m][half] = fmaf(sum, factor[m][half], mass[m][half]);
      }
  }

  // All pairs of features whose b is in BLOCK, then those of the blocks behind.
  template <int BLOCK> __device__ __forceinline__ void add_block(StateStages<K, V, H> &stages) {
    const Blocks<K> x_blocks(base, lane_down<K>(lane));
    uint32_t x[TILES][4];
#pragma unroll
    for (int m = 0; m < TILES; ++m) ldmatrix(x[m], x_blocks.at(0, BLOCK) + Tile<K>::rows_at(TILES * warp + m));
#pragma unroll 1
    for (int first = 0; first < 16 * (BLOCK + 1); first += H::ITEMS) {
      const int number = stages.turn();
#pragma unroll 1
      for (int item = 0; item < H::ITEMS; item += 4) {
        const int a = first + item;
        uint2 near[TILES][2];
#pragma unroll
        for (int m = 0; m < TILES; ++m)
#pragma unroll
          for (int half = 0; half < 2; ++half) near[m][half] = *reinterpret_cast<const uint2 *>(shared + Tile<K>::at(row(m, half), a / 8) + a % 8 * 2);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          uint32_t features[TILES][4];
          float factor[TILES][2];
#pragma unroll
          for (int m = 0; m < TILES; ++m) {
            factor[m][0] = number_of(near[m][0], i), factor[m][1] = number_of(near[m][1], i);
#pragma unroll
            for (int j = 0; j < 4; ++j) features[m][j] = multiply_two(x[m][j], twice_of(near[m][j % 2], i));
          }
          add(features, x, factor, stages.rows_at(number), stages.masses_at(shared, number), item + i);
        }
      }
    }
    if constexpr (BLOCK + 1 < BLOCKS) add_block<BLOCK + 1>(stages);
  }

  __device__ __forceinline__ void scale(const float (&factor)[TILES][2]) {
#pragma unroll
    for (int m = 0; m < TILES; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        mass[m][half] *= factor[m][half];
#pragma unroll
        for (int n = 0; n < 2 * VALUE_BLOCKS; ++n) acc[m][n][2 * half] *= factor[m][half], acc[m][n][2 * half + 1] *= factor[m][half];
      }
  }

  // The features x_a themselves, times `factor`.
  __device__ __forceinline__ void add_linear(StateStages<K, V, H> &stages, const float (&factor)[TILES][2]) {
    const int number = stages.turn();
    const Blocks<K> x_blocks(base, lane_down<K>(lane));
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) {
      uint32_t x[TILES][4], features[TILES][4];
#pragma unroll
      for (int m = 0; m < TILES; ++m) {
        ldmatrix(x[m], x_blocks.at(0, block) + Tile<K>::rows_at(TILES * warp + m));
#pragma unroll
        for (int j = 0; j < 4; ++j) features[m][j] = E::pack(E::low(x[m][j]) * factor[m][j % 2], E::high(x[m][j]) * factor[m][j % 2]);
      }
      add(features, x, factor, stages.rows_at(number), stages.masses_at(shared, number), block);
    }
  }
};

// A block: 256 queries of one chunk.
template <int K, int V> __global__ void __launch_bounds__(kGradientThreads, 1) state_output_kernel(const __grid_constant__ StateArguments args) {
  using T = __nv_bfloat16;
  using E = Element<T>;
  using H = OutputShape<K, V>;
  using S = FeatureState<K, V>;
  constexpr int TILES = H::TILES;
  extern __shared__ __align__(1024) unsigned char shared[];
  const Gradients &g = args.of;
  const linattn_problem &p = g.problem;
  const int thread = threadIdx.x, pair = blockIdx.x / args.tiles, tile = blockIdx.x % args.tiles;
  const int batch = pair / p.query_heads, head = pair % p.query_heads, key_head = head / (p.query_heads / p.key_heads);
  const int64_t begin = g.chunk + static_cast<int64_t>(tile) * H::TOKENS;
  const int rows = static_cast<int>(min(p.length - begin, static_cast<int64_t>(H::TOKENS)));
  const int64_t record = (static_cast<int64_t>(batch) * p.key_heads + key_head) * args.chunks + begin / g.chunk;
  const float *const columns = args.columns + record * S::FLOATS;
  if (is_out_of_reach(g, true, batch, head, 1, begin, rows)) {
    zero_rows(head_of<T>(args.out, batch, head) + begin * args.out.token_stride, args.out.token_stride, rows, V / 8, thread, kGradientThreads);
    if (thread < rows) args.mass[static_cast<int64_t>(pair) * p.length + begin + thread] = 0.f;
    return;
  }
  const uint32_t base = shared_address(shared);
  StateStages<K, V, H> stages{args.rows + record * S::ROWS * V, columns, base, thread};
  copy_tile<K, H::TOKENS, kGradientThreads>(base, head_of<const T>(p.query, batch, head) + begin * p.query.token_stride, p.query.token_stride, rows, thread, pieces_of<K, V>(p));
  copy_commit();
#pragma unroll
  for (int i = 0; i < H::STAGES - 1; ++i) stages.fetch();
  copy_wait<H::STAGES - 1>();
  __syncthreads();
  if (p.key_segments) {
    zero_own_padding<K, kGradientThreads, H::TOKENS>(shared, GateReader(g.gates, p, true, batch, head, begin), begin, thread);
    __syncthreads();
  }

  StateOutput<K, V> work(shared);
  const Coefficients f(p, head);
  float linear[TILES][2], quadratic[TILES][2], gate[TILES][2];
#pragma unroll
  for (int m = 0; m < TILES; ++m) {
    const Blocks<K> x_blocks(base, lane_down<K>(work.lane)), x_across(base, lane_across<K>(work.lane));
    const uint32_t stripe = Tile<K>::rows_at(TILES * work.warp + m);
    uint32_t x[K / 16][4];
#pragma unroll
    for (int block = 0; block < K / 16; ++block) ldmatrix(x[block], x_blocks.at(0, block) + stripe);
    float unit[2];
    row_products<T>(unit[0], unit[1], x, x_across, stripe, work.lane);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t token = begin + work.row(m, half);
      unit[half] = p.normalize_qk ? inverse_norm(unit[half]) : 1.f;
      gate[m][half] = token >= p.length ? 0.f : is_gated(p) ? gate_of(g, true, batch, head, token) : 1.f;
      linear[m][half] = f.beta * unit[half], quadratic[m][half] = f.gamma * unit[half] * unit[half];
    }
  }
  work.template add_block<0>(stages);
  work.scale(quadratic);
  work.add_linear(stages, linear);
  copy_wait<0>();
  __syncthreads();  // nobody reads what lies where results are staged

  const Blocks<V> out_blocks(base, lane_down<V>(work.lane));
  const float of_all = f.a * columns[S::COUNT];
  float *const mass_rows = args.mass + static_cast<int64_t>(pair) * p.length + begin;
#pragma unroll
  for (int m = 0; m < TILES; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = work.row(m, half);
      const float mass = gate[m][half] * (over_place(work.mass[m][half]) + of_all);
      if (work.place == 0 && row < rows) mass_rows[row] = mass;
#pragma unroll
      for (int n = 0; n < V / 8; ++n) {
        const float2 mean = *reinterpret_cast<const float2 *>(columns + S::VALUES + 8 * n + 2 * work.place);
        float &left = work.acc[m][n][2 * half], &right = work.acc[m][n][2 * half + 1];
        left = left * gate[m][half] + mass * mean.x, right = right * gate[m][half] + mass * mean.y;
      }
    }
    T *const results = head_of<T>(args.out, batch, head) + begin * args.out.token_stride;
    store_rows<T, V>(args.out, results, shared, out_blocks, Tile<V>::rows_at(TILES * work.warp + m), work.acc[m], 1.f, 1.f, rows, TILES * work.warp + m, work.lane);
  }
}

template <int K, int V> cudaError_t launch_output(StateArguments args, cudaStream_t stream) {
  using H = OutputShape<K, V>;
  const linattn_problem &p = args.of.problem;
  args.tiles = static_cast<int32_t>((p.length - args.of.chunk + H::TOKENS - 1) / H::TOKENS);
  if (const cudaError_t failed = cudaFuncSetAttribute(state_output_kernel<K, V>, cudaFuncAttributeMaxDynamicSharedMemorySize, H::SHARED)) return failed;
  state_output_kernel<K, V><<<static_cast<unsigned>(p.batch * p.query_heads * args.tiles), kGradientThreads, H::SHARED, stream>>>(args);
  return cudaPeekAtLastError();
}

}  // namespace linattn_pairs
