// The gradient of the queries, of f's coefficients, and the rows' sums for that of the decay: a block owns 128 queries and walks over the keys.
#pragma once
#include "pairs/backward.cuh"

namespace linattn_pairs {

// A warp's 16 queries.
template <int K, int V, bool GATED> struct GradientRows {
  using T = __nv_bfloat16;
  using S = GradientShape<K, V, GATED>;
  using E = Element<T>;
  static constexpr int KEY_BLOCKS = K / 16, VALUE_BLOCKS = V / 16, HALVES = S::HALVES;

  const linattn_problem &p;
  const Gradients &args;
  const int lane, warp, group, place;
  const int64_t begin, row, seen;
  const uint32_t down, across, query_stripe, grad_stripe;
  const Blocks<K> q_blocks;
  const Blocks<V> w_blocks;
  const Coefficients f;
  float inverse[2], error[2], scale[2], beta[2], gamma[2], sums[3][2] = {}, acc[2 * KEY_BLOCKS][4];
  uint32_t kept_q[S::KEEPS_ROWS ? KEY_BLOCKS : 1][4], kept_w[S::KEEPS_ROWS ? VALUE_BLOCKS : 1][4];
  OwnGates<1> gates;

  __device__ __forceinline__ GradientRows(const Gradients &args, int pair, int head, int64_t begin, uint32_t query_tile)
      : p(args.problem), args(args), lane(threadIdx.x & 31), warp(warp_number()), group(lane >> 2), place(lane & 3), begin(begin), row(begin + 16 * warp + group),
        seen(p.causal ? min(p.length, begin + 16 * warp + 16) : p.length), down(lane_down<K>(lane)), across(lane_across<K>(lane)), query_stripe(Tile<K>::rows_at(warp)),
        grad_stripe(Tile<V>::rows_at(warp)), q_blocks(query_tile, down), w_blocks(query_tile + S::OWN_KEY, lane_down<V>(lane)), f(p, head) {
    const float *const numbers = args.query_numbers + static_cast<int64_t>(pair) * kNumbers * args.padded + row;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      inverse[half] = numbers[8 * half], error[half] = numbers[args.padded + 8 * half], scale[half] = numbers[2 * args.padded + 8 * half];
      beta[half] = f.beta * scale[half], gamma[half] = f.gamma * scale[half] * scale[half];
    }
    if constexpr (S::KEEPS_ROWS) {
#pragma unroll
      for (int block = 0; block < KEY_BLOCKS; ++block) ldmatrix(kept_q[block], q_blocks.at(0, block) + query_stripe);
#pragma unroll
      for (int block = 0; block < VALUE_BLOCKS; ++block) ldmatrix(kept_w[block], w_blocks.at(0, block) + grad_stripe);
    }
#pragma unroll
    for (int n = 0; n < 2 * KEY_BLOCKS; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[n][i] = 0.f;
  }

  // s = q k^T and d = w v^T of a step's keys.
  __device__ __forceinline__ void multiply(float (&s)[2 * HALVES][4], float (&d)[2 * HALVES][4], const Blocks<K> &k_across, const Blocks<V> &v_across, int step) {
    add_products<T, HALVES, S::KEEPS_ROWS>(s, kept_q, q_blocks, query_stripe, k_across, step);
    add_products<T, HALVES, S::KEEPS_ROWS>(d, kept_w, w_blocks, grad_stripe, v_across, step);
  }

  // Products into the keys' weights in dq; column: of two neighbouring keys in the tile, first: the tile's first. NEAR: not all pairs are seen, or gated alike.
  template <bool NEAR>
  __device__ __forceinline__ void weigh(float (&s)[4], const float (&d)[4], int64_t first, int column, float2 factor, bool whole, const OtherGates *others, int stage,
                                        bool diagonal) {
    float2 other = {};
    int2 run = {};
    if constexpr (GATED) other = *reinterpret_cast<const float2 *>((NEAR ? others->exponent[stage] : others->factor[stage]) + column);
    if constexpr (GATED && NEAR) run = *reinterpret_cast<const int2 *>(others->run[stage] + column);
    const int last = p.causal ? static_cast<int>(row - first) : kKeys;  // key of the tile that the first row sees
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int half = i >> 1;
      const float r = i & 1 ? factor.y : factor.x, t = s[i] * r, gate = i & 1 ? other.y : other.x;
      float slope = fmaf(d[i], inverse[half], error[half]);
      if constexpr (GATED && NEAR) {
        slope = gates.times(slope, 0, half, gate, i & 1 ? run.y : run.x, column + (i & 1) <= last + 8 * half, diagonal);
      } else if constexpr (GATED) {
        slope *= gate;
      } else {
        const int64_t number = first + column + (i & 1);
        if (!whole && (number >= p.length || (p.causal && number > row + 8 * half))) slope = 0.f;
      }
      sums[0][half] += slope, sums[1][half] = fmaf(slope, t, sums[1][half]), sums[2][half] = fmaf(slope * t, t, sums[2][half]);
      s[i] = slope * fmaf(2.f * gamma[half], t, beta[half]) * r;
    }
  }

  // What the sums hold, of keys before the block's queries, takes these queries' factors.
  __device__ __forceinline__ void take_own_factors() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float own = gates.factor[0][half];
#pragma unroll
      for (int i = 0; i < 3; ++i) sums[i][half] *= own;
#pragma unroll
      for (int n = 0; n < 2 * KEY_BLOCKS; ++n) acc[n][2 * half] *= own, acc[n][2 * half + 1] *= own;
    }
  }

  template <bool NEAR> __device__ __forceinline__ void add(uint32_t key_tile, const float *scales, int64_t first, const OtherGates *others, int stage, bool diagonal) {
    const Blocks<K> k_across(key_tile, across), k_down(key_tile, down);
    const Blocks<V> v_across(key_tile + S::TILE, lane_across<V>(lane));
#pragma unroll 1
    for (int step = 0; step < kKeys / S::STEP; ++step) {
      const int64_t key = first + S::STEP * step;
      if (NEAR && key >= seen) break;
      float s[2 * HALVES][4] = {}, d[2 * HALVES][4] = {};
      multiply(s, d, k_across, v_across, step);
      const bool whole = key + S::STEP <= p.length && (!p.causal || key + S::STEP - 1 <= begin + 16 * warp);
      uint32_t weights[HALVES][4];
#pragma unroll
      for (int side = 0; side < 2 * HALVES; ++side) {
        const int column = S::STEP * step + 8 * side + 2 * place;
        float (&x)[4] = s[side];
        weigh<NEAR>(x, d[side], first, column, *reinterpret_cast<const float2 *>(scales + column), whole, others, stage, diagonal);
        weights[side / 2][side % 2 * 2] = E::pack(x[0], x[1]), weights[side / 2][side % 2 * 2 + 1] = E::pack(x[2], x[3]);
      }
#pragma unroll
      for (int half = 0; half < HALVES; ++half)
#pragma unroll
        for (int block = 0; block < KEY_BLOCKS; ++block) {
          uint32_t k[4];
          ldmatrix_transposed(k, k_down.at(half, block) + step * HALVES * Tile<K>::kBlockBytes);
          E::mma(acc[2 * block], weights[half], k[0], k[1]), E::mma(acc[2 * block + 1], weights[half], k[2], k[3]);
        }
    }
  }

  // sum_n A dA of a row is a sum of what the coefficients' gradients are made of.
  __device__ __forceinline__ void store_row_sums(float *row_sums) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = f.a * sums[0][half] + beta[half] * sums[1][half] + gamma[half] * sums[2][half];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      if (place == 0 && row + 8 * half < p.length) row_sums[row + 8 * half] = begin < args.chunk ? sum : row_sums[row + 8 * half] + sum;
    }
  }

  __device__ __forceinline__ void store(unsigned char *shared, int batch, int head, int rows, float *totals) {
    if (p.normalize_qk) project<T, KEY_BLOCKS>(acc, q_blocks, query_stripe, scale);
    T *const results = head_of<T>(args.grad_query, batch, head) + begin * args.grad_query.token_stride;
    if (begin >= args.chunk) add_stored<T, K>(acc, results, args.grad_query.token_stride, 16 * warp + group, rows, place, pieces_of<K, V>(p));
    store_rows<T, K>(args.grad_query, results, shared, q_blocks, query_stripe, acc, 1.f, 1.f, rows, warp, lane, pieces_of<K, V>(p));
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      float sum = i == 0 ? sums[0][0] + sums[0][1] : i == 1 ? sums[1][0] * scale[0] + sums[1][1] * scale[1] : sums[2][0] * scale[0] * scale[0] + sums[2][1] * scale[1] * scale[1];
#pragma unroll
      for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
      if (lane == 0) totals[3 * warp + i] = sum;
    }
  }
};

template <int K, int V, bool GATED>
__global__ void __launch_bounds__(kGradientThreads, GradientShape<K, V, GATED>::MIN_BLOCKS) rows_kernel(const __grid_constant__ Gradients args) {
  using T = __nv_bfloat16;
  using S = GradientShape<K, V, GATED>;
  extern __shared__ __align__(1024) unsigned char shared[];
  const linattn_problem &p = args.problem;
  const int thread = threadIdx.x;
  const uint32_t query_tile = shared_address(shared), grad_tile = query_tile + S::OWN_KEY, stages = query_tile + S::OWN;
  const float *const scales = reinterpret_cast<const float *>(shared + S::NUMBERS_AT);
  float *const totals = reinterpret_cast<float *>(shared + S::TOTALS_AT);
  OtherGates *const others = GATED ? reinterpret_cast<OtherGates *>(shared + S::ROWS_GATES_AT) : nullptr;

  const int pair = blockIdx.x / args.row_tiles, tile_number = args.row_tiles - 1 - blockIdx.x % args.row_tiles;  // long rows first
  const int batch = pair / p.query_heads, head = pair % p.query_heads, key_head = head / (p.query_heads / p.key_heads), pieces = pieces_of<K, V>(p);
  const int64_t begin = static_cast<int64_t>(tile_number) * kRows;
  const int rows = static_cast<int>(min(p.length - begin, static_cast<int64_t>(kRows)));
  const T *const keys = head_of<const T>(p.key, batch, key_head), *const values = head_of<const T>(p.value, batch, key_head);
  const float *const key_scale = args.key_scale + (static_cast<int64_t>(batch) * p.key_heads + key_head) * args.padded;
  const GateReader own_gates(args.gates, p, true, batch, head, begin - 1), key_gates(args.gates, p, false, batch, head, begin - 1);
  const int of_chunk = static_cast<int>(begin / args.chunk * args.chunk / kKeys), first_tile = GATED ? keys_in_reach(p, key_gates, head, begin, of_chunk).find() : of_chunk;
  const int tiles = static_cast<int>(((p.causal ? begin + rows : p.length) + kKeys - 1) / kKeys);
  GateCopy on_way;
  const auto fetch = [&](int tile) {
    const int64_t first = static_cast<int64_t>(tile) * kKeys;
    const int stage = tile % kStages, count = static_cast<int>(min(p.length - first, static_cast<int64_t>(kKeys)));
    copy_tile<K, kKeys, kGradientThreads>(stages + stage * S::STAGE, keys + first * p.key.token_stride, p.key.token_stride, count, thread, pieces);
    copy_tile<V, kKeys, kGradientThreads>(stages + stage * S::STAGE + S::TILE, values + first * p.value.token_stride, p.value.token_stride, count, thread);
    if (thread < kKeys / 4) copy_async(query_tile + S::NUMBERS_AT + stage * kKeys * 4 + thread * 16, key_scale + first + thread * 4, true);
    copy_commit();
    if constexpr (GATED) on_way.load(key_gates, first, thread);
  };
  copy_tile<K, kRows, kGradientThreads>(query_tile, head_of<const T>(p.query, batch, head) + begin * p.query.token_stride, p.query.token_stride, rows, thread, pieces);
  copy_tile<V, kRows, kGradientThreads>(grad_tile, head_of<const T>(args.grad_out, batch, head) + begin * args.grad_out.token_stride, args.grad_out.token_stride, rows, thread);
  fetch(first_tile);
  int32_t low = 0, high = 0;
  if constexpr (GATED) {
    range_of_runs<kGradientThreads>(*others, own_gates, begin, rows, low, high, thread);
    on_way.store(*others, false, first_tile % kStages, low, high, thread);
  }
  copy_wait<0>();
  __syncthreads();
  if (GATED && own_gates.runs) {
    zero_own_padding<K, kGradientThreads>(shared, own_gates, begin, thread);
    zero_own_padding<V, kGradientThreads>(shared + S::OWN_KEY, own_gates, begin, thread);
    __syncthreads();
  }

  GradientRows<K, V, GATED> work(args, pair, head, begin, query_tile);
  if constexpr (GATED) work.gates.load(own_gates, work.row);
  for (int tile = first_tile; tile < tiles; ++tile) {
    if (tile > first_tile) {
      copy_wait<0>();
      __syncthreads();  // the tile is here, and nobody reads the one that the next copies overwrite
    }
    if (tile + 1 < tiles) fetch(tile + 1);
    const int stage = tile % kStages;
    const int64_t first = static_cast<int64_t>(tile) * kKeys;
    bool seen = true;
    if constexpr (GATED) {
      seen = told(others, stage, SEEN);
      if (seen && told(others, stage, PADDED)) {
        zero_padding<K, kGradientThreads>(shared + S::OWN + stage * S::STAGE, others->run[stage], thread);
        __syncthreads();
      }
    }
    const bool diagonal = p.causal && first >= begin;
    if constexpr (GATED)
      if (diagonal && first == begin) work.take_own_factors();
    if (GATED && seen && !diagonal && !told(others, stage, MIXED)) work.template add<!GATED>(stages + stage * S::STAGE, scales + stage * kKeys, first, others, stage, false);
    else if (seen) work.template add<true>(stages + stage * S::STAGE, scales + stage * kKeys, first, others, stage, diagonal);
    if constexpr (GATED)
      if (tile + 1 < tiles) on_way.store(*others, false, (tile + 1) % kStages, low, high, thread);
  }

  if (GATED && args.row_sums) work.store_row_sums(args.row_sums + static_cast<int64_t>(pair) * p.length);
  work.store(shared, batch, head, rows, totals);
  __syncthreads();
  if (thread < 3) {
    float sum = 0.f;
    for (int w = 0; w < kWarps; ++w) sum += totals[3 * w + thread];
    args.partials[(static_cast<int64_t>(pair) * args.parts + tile_number) * 3 + thread] = sum;
  }
}

template <int K, int V, bool GATED> cudaError_t launch_rows(const Gradients &args, cudaStream_t stream) {
  constexpr int kShared = GradientShape<K, V, GATED>::ROWS_SHARED;
  if (const cudaError_t failed = cudaFuncSetAttribute(rows_kernel<K, V, GATED>, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared)) return failed;
  rows_kernel<K, V, GATED><<<static_cast<unsigned>(args.problem.batch * args.problem.query_heads * args.row_tiles), kGradientThreads, kShared, stream>>>(args);
  return cudaPeekAtLastError();
}

}  // namespace linattn_pairs
