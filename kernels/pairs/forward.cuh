// Every pair of tokens by mma.sync, a warp 32 of a block's queries.
#pragma once
#include "pairs/reach.cuh"

namespace linattn_pairs {

constexpr int kForwardThreads = 128;
constexpr int kStep = 32;  // keys whose weights a warp holds at once

template <typename T, int K, int V, bool GATED> struct ForwardShape {
  static constexpr bool KEEPS_QUERIES = K <= 96;  // in registers
  using Copy = KeyCopy<T, K, V, kForwardThreads>;
  static constexpr int ROW_TILE = kRows * (K > V ? K : V) * 2;  // queries, and then results
  static constexpr int GATES_AT = ROW_TILE + Copy::BYTES, SHARED = GATES_AT + (GATED ? sizeof(OtherGates) : 0);
  static constexpr int MIN_BLOCKS = V > 64 || (GATED && K > 32) ? 2 : 3;
};

// A warp's part of a block.
template <typename T, int K, int V, bool GATED> struct ForwardRows {
  using S = ForwardShape<T, K, V, GATED>;
  using E = Element<T>;
  static constexpr int KEY_BLOCKS = K / 16, VALUE_BLOCKS = V / 16, HALVES = kStep / 16;

  const linattn_problem &p;
  unsigned char *const shared;
  const int lane, warp, group, place;
  const int64_t warp_begin;
  const Blocks<K> q_blocks;
  float a, shrink, beta[2][2], gamma[2][2], mass[2][2], lost[2][2] = {}, acc[2][2 * VALUE_BLOCKS][4];
  uint32_t q[2][S::KEEPS_QUERIES ? KEY_BLOCKS : 1][4];
  OwnGates<2> gates;

  __device__ __forceinline__ ForwardRows(const linattn_problem &p, const Place &own, unsigned char *shared)
      : p(p), shared(shared), lane(threadIdx.x & 31), warp(warp_number()), group(lane >> 2), place(lane & 3), warp_begin(own.begin + 32 * warp),
        q_blocks(shared_address(shared), lane_down<K>(lane)) {
    const float temperature = p.coefficients[3 * p.query_heads + own.head], b = p.coefficients[p.query_heads + own.head], c = p.coefficients[2 * p.query_heads + own.head];
    shrink = weight_scale<T>(p.coefficients[own.head], b, c, temperature), a = p.coefficients[own.head] * shrink;
    const Blocks<K> q_across(shared_address(shared), lane_across<K>(lane));
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const uint32_t offset = Tile<K>::rows_at(2 * warp + m);
      uint32_t fragments[KEY_BLOCKS][4];
#pragma unroll
      for (int block = 0; block < KEY_BLOCKS; ++block) ldmatrix(fragments[block], q_blocks.at(0, block) + offset);
      float scale[2] = {1.f, 1.f};
      if (p.normalize_qk) {
        row_products<T>(scale[0], scale[1], fragments, q_across, offset, lane);
        scale[0] = inverse_norm(scale[0]), scale[1] = inverse_norm(scale[1]);
      }
      if constexpr (S::KEEPS_QUERIES) {
#pragma unroll
        for (int block = 0; block < KEY_BLOCKS; ++block)
#pragma unroll
          for (int i = 0; i < 4; ++i) q[m][block][i] = fragments[block][i];
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float factor = temperature * scale[half];
        beta[m][half] = b * factor * shrink, gamma[m][half] = c * factor * factor * shrink, mass[m][half] = 0.f;
      }
#pragma unroll
      for (int block = 0; block < 2 * VALUE_BLOCKS; ++block)
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[m][block][i] = 0.f;
    }
  }

  // s = q k^T of the step's keys.
  __device__ __forceinline__ void multiply_keys(float (&s)[2][2 * HALVES][4], const Blocks<K> &k_blocks, int step) {
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int n = 0; n < 2 * HALVES; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) s[m][n][i] = 0.f;
#pragma unroll
    for (int block = 0; block < KEY_BLOCKS; ++block) {
      uint32_t loaded[2][4];
      if constexpr (!S::KEEPS_QUERIES) {
#pragma unroll
        for (int m = 0; m < 2; ++m) ldmatrix(loaded[m], q_blocks.at(0, block) + Tile<K>::rows_at(2 * warp + m));
      }
#pragma unroll
      for (int half = 0; half < HALVES; ++half) {
        uint32_t k[4];
        ldmatrix(k, k_blocks.at(step * HALVES + half, block));
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          const uint32_t (&x)[4] = S::KEEPS_QUERIES ? q[m][S::KEEPS_QUERIES ? block : 0] : loaded[m];
          E::mma(s[m][2 * half], x, k[0], k[1]);
          E::mma(s[m][2 * half + 1], x, k[2], k[3]);
        }
      }
    }
  }

  // Two neighbouring keys' products into their weights. first: the first of the tile, column: that of the two in it. NEAR: not all pairs are seen, or gated alike.
  template <bool NEAR> __device__ __forceinline__ void weigh(float (&x)[4], int m, int64_t first, int column, float2 scale, bool whole, const OtherGates *others, int stage,
                                                             bool diagonal) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float t = x[i] * (i & 1 ? scale.y : scale.x);
      x[i] = fmaf(fmaf(gamma[m][i >> 1], t, beta[m][i >> 1]), t, a);
    }
    if constexpr (GATED && NEAR) {
      const float2 exponent = *reinterpret_cast<const float2 *>(others->exponent[stage] + column);
      const int2 run = *reinterpret_cast<const int2 *>(others->run[stage] + column);
      const int last = p.causal ? static_cast<int>(warp_begin + 16 * m + group - first) : kKeys;  // key of the tile that the first row sees
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = gates.times(x[i], m, i >> 1, i & 1 ? exponent.y : exponent.x, i & 1 ? run.y : run.x, column + (i & 1) <= last + 8 * (i >> 1), diagonal);
      lost[m][0] += lost_by_rounding<T>(x[0], x[1]), lost[m][1] += lost_by_rounding<T>(x[2], x[3]);
    } else if constexpr (GATED) {
      const float2 factor = *reinterpret_cast<const float2 *>(others->factor[stage] + column);
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] *= i & 1 ? factor.y : factor.x;
    } else if (!whole) {
      const int64_t row = warp_begin + 16 * m + group;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t n = first + column + (i & 1);
        if (n >= p.length || (p.causal && n > row + (i >> 1) * 8)) x[i] = 0.f;
      }
      if (first == 0) lost[m][0] += lost_by_rounding<T>(x[0], x[1]), lost[m][1] += lost_by_rounding<T>(x[2], x[3]);
    }
    mass[m][0] += x[0] + x[1], mass[m][1] += x[2] + x[3];
  }

  __device__ __forceinline__ void multiply_values(const uint32_t (&weights)[2][HALVES][4], const Blocks<V> &v_blocks, int step) {
#pragma unroll
    for (int half = 0; half < HALVES; ++half)
#pragma unroll
      for (int block = 0; block < VALUE_BLOCKS; ++block) {
        uint32_t v[4];
        ldmatrix_transposed(v, v_blocks.at(step * HALVES + half, block));
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          E::mma(acc[m][2 * block], weights[m][half], v[0], v[1]);
          E::mma(acc[m][2 * block + 1], weights[m][half], v[2], v[3]);
        }
      }
  }

  // What the sums hold, of keys before the block's queries, takes these queries' factors.
  __device__ __forceinline__ void take_own_factors() {
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        mass[m][half] *= gates.factor[m][half], lost[m][half] *= gates.factor[m][half];
#pragma unroll
        for (int block = 0; block < 2 * VALUE_BLOCKS; ++block) acc[m][block][2 * half] *= gates.factor[m][half], acc[m][block][2 * half + 1] *= gates.factor[m][half];
      }
  }

  // A tile of keys, the first of the sequence's tokens in it `first`.
  template <bool NEAR> __device__ __forceinline__ void add(uint32_t key_tile, const float *scales, int64_t first, const OtherGates *others, int stage, bool diagonal) {
    const Blocks<K> k_blocks(key_tile, lane_across<K>(lane));
    const Blocks<V> v_blocks(key_tile + S::Copy::TILE, lane_down<V>(lane));
#pragma unroll
    for (int step = 0; step < kKeys / kStep; ++step) {
      const int64_t key = first + step * kStep;
      if (NEAR && key >= (p.causal ? min(p.length, warp_begin + 32) : p.length)) break;
      float s[2][2 * HALVES][4];
      multiply_keys(s, k_blocks, step);
      const bool whole = key + kStep <= p.length && (!p.causal || key + kStep - 1 <= warp_begin);
      uint32_t weights[2][HALVES][4];
#pragma unroll
      for (int half = 0; half < HALVES; ++half)
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          const int column = step * kStep + half * 16 + side * 8 + 2 * place;
          const float2 scale = *reinterpret_cast<const float2 *>(scales + column);
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            float (&x)[4] = s[m][2 * half + side];
            weigh<NEAR>(x, m, first, column, scale, whole, others, stage, diagonal);
            weights[m][half][2 * side] = E::pack(x[0], x[1]), weights[m][half][2 * side + 1] = E::pack(x[2], x[3]);
          }
        }
      multiply_values(weights, v_blocks, step);
    }
  }

  // The means and masses. A warp stages its results over its own queries.
  __device__ __forceinline__ void store(const Arguments &args, const Place &own) {
    if constexpr (K != V) __syncthreads();  // where rows of results are wider, over others' too
    const Blocks<V> out_blocks(shared_address(shared), lane_down<V>(lane));
    float *const mass_rows = args.mass + (static_cast<int64_t>(own.batch) * p.query_heads + own.head) * p.length + own.begin;
    T *const results = head_of<T>(args.out, own.batch, own.head) + own.begin * args.out.token_stride;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      float finish[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        mass[m][half] += __shfl_xor_sync(0xffffffffu, mass[m][half], 1);
        mass[m][half] += __shfl_xor_sync(0xffffffffu, mass[m][half], 2);
        lost[m][half] += __shfl_xor_sync(0xffffffffu, lost[m][half], 1);
        lost[m][half] += __shfl_xor_sync(0xffffffffu, lost[m][half], 2);
        if (GATED && gates.is_padding(m, half)) mass[m][half] = 0.f;
        const int row = 32 * warp + 16 * m + 8 * half + group;
        if (own.begin >= args.chunk) {
          if (row < own.rows) mass[m][half] += mass_rows[row];
          __syncwarp();  // all have read what one of them overwrites
        }
        if (place == 0 && row < own.rows) mass_rows[row] = mass[m][half] / shrink;
        const float divisor = mass[m][half] - lost[m][half];
        finish[half] = mass[m][half] == 0.f || divisor == 0.f ? 0.f : 1.f / divisor;
      }
      if (own.begin >= args.chunk) add_stored<T, V>(acc[m], results, args.out.token_stride, 32 * warp + 16 * m + group, own.rows, place);
#pragma unroll
      for (int block = 0; block < VALUE_BLOCKS; ++block)
        store_block<T, V>(out_blocks.at(0, block) + Tile<V>::rows_at(2 * warp + m), acc[m][2 * block], acc[m][2 * block + 1], finish[0], finish[1], lane);
    }
    __syncwarp();
    for (int index = lane; index < 32 * (V / 8); index += 32) {
      const int row = 32 * warp + index / (V / 8), piece = index % (V / 8);
      if (row < own.rows) *reinterpret_cast<uint4 *>(results + row * args.out.token_stride + piece * 8) = *reinterpret_cast<const uint4 *>(shared + Tile<V>::at(row, piece));
    }
  }
};

template <typename T, int K, int V, bool GATED>
__global__ void __launch_bounds__(kForwardThreads, ForwardShape<T, K, V, GATED>::MIN_BLOCKS) forward_kernel(const __grid_constant__ Arguments args) {
  using S = ForwardShape<T, K, V, GATED>;
  using Copy = typename S::Copy;
  extern __shared__ __align__(1024) unsigned char shared[];
  const linattn_problem &p = args.problem;
  const int thread = threadIdx.x;
  const uint32_t row_tile = shared_address(shared), key_tiles = row_tile + S::ROW_TILE;
  const float *const scales = reinterpret_cast<const float *>(shared + S::ROW_TILE + kStages * Copy::STAGE);
  OtherGates *const others = GATED ? reinterpret_cast<OtherGates *>(shared + S::GATES_AT) : nullptr;

  const Place own(args);
  const Copy copy(args, own, key_tiles);
  copy_tile<K, kRows, kForwardThreads>(row_tile, head_of<const T>(p.query, own.batch, own.head) + own.begin * p.query.token_stride, p.query.token_stride, own.rows, thread,
                                       pieces_of<K, V>(p));
  const GateReader queries(args.gates, p, true, own.batch, own.head, own.begin - 1), keys(args.gates, p, false, own.batch, own.head, own.begin - 1);
  const int of_chunk = static_cast<int>(own.begin / args.chunk * args.chunk / kKeys), first_tile = GATED ? keys_in_reach(p, keys, own.head, own.begin, of_chunk).find() : of_chunk;
  copy.start(first_tile, thread);
  copy_commit();
  GateCopy on_way;
  int32_t low = 0, high = 0;
  if constexpr (GATED) {
    range_of_runs<kForwardThreads>(*others, queries, own.begin, own.rows, low, high, thread);
    on_way.load(keys, static_cast<int64_t>(first_tile) * kKeys, thread);
    on_way.store(*others, false, first_tile % kStages, low, high, thread);
  }
  copy_wait<0>();
  __syncthreads();
  if (GATED && queries.runs) {
    zero_own_padding<K, kForwardThreads>(shared, queries, own.begin, thread);
    __syncthreads();
  }

  ForwardRows<T, K, V, GATED> rows(p, own, shared);
  if constexpr (GATED) rows.gates.load(queries, rows.warp_begin + rows.group);
  for (int tile = first_tile; tile < own.tiles; ++tile) {
    if (tile > first_tile) {
      copy_wait<0>();
      __syncthreads();  // the tile is here, and nobody reads the one that the next copies overwrite
    }
    if (tile + 1 < own.tiles) {
      copy.start(tile + 1, thread);
      copy_commit();
      if constexpr (GATED) on_way.load(keys, static_cast<int64_t>(tile + 1) * kKeys, thread);
    }
    const int stage = tile % kStages;
    const int64_t first = static_cast<int64_t>(tile) * kKeys;
    bool seen = true;
    if constexpr (GATED) {
      seen = told(others, stage, SEEN);
      if (seen && told(others, stage, PADDED)) {
        zero_padding<V, kForwardThreads>(shared + S::ROW_TILE + stage * Copy::STAGE + Copy::TILE, others->run[stage], thread);
        __syncthreads();
      }
    }
    const bool diagonal = p.causal && first >= own.begin;
    if constexpr (GATED)
      if (diagonal && first == own.begin) rows.take_own_factors();
    if (GATED && seen && !diagonal && !told(others, stage, MIXED)) rows.template add<!GATED>(key_tiles + stage * Copy::STAGE, scales + stage * kKeys, first, others, stage, false);
    else if (seen) rows.template add<true>(key_tiles + stage * Copy::STAGE, scales + stage * kKeys, first, others, stage, diagonal);
    if constexpr (GATED)
      if (tile + 1 < own.tiles) on_way.store(*others, false, (tile + 1) % kStages, low, high, thread);
  }
  rows.store(args, own);
}

template <typename T, int K, int V, bool GATED> cudaError_t launch_forward(const Arguments &args, cudaStream_t stream) {
  constexpr int kShared = ForwardShape<T, K, V, GATED>::SHARED;
  if (const cudaError_t failed = cudaFuncSetAttribute(forward_kernel<T, K, V, GATED>, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared)) return failed;
  forward_kernel<T, K, V, GATED><<<args.problem.batch * args.problem.query_heads * args.row_tiles, kForwardThreads, kShared, stream>>>(args);
  return cudaPeekAtLastError();
}

}  // namespace linattn_pairs
