// The gradients of keys and values, and the columns' sums for that of the decay: a block owns 128 keys and walks over the queries of all heads that read them.
#pragma once
#include "pairs/backward.cuh"

namespace linattn_pairs {

// The numbers of the queries on their way, one thread a query, as `GateCopy` brings their gates.
struct NumbersCopy {
  float numbers[kNumbers];
  __device__ __forceinline__ void load(const Gradients &args, int64_t head, int64_t first, int thread) {
    if (thread >= kKeys) return;
#pragma unroll
    for (int which = 0; which < kNumbers; ++which) numbers[which] = args.query_numbers[(head * kNumbers + which) * args.padded + first + thread];
  }
  // factor: of 1 / g and e, which all that a query adds is proportional to.
  __device__ __forceinline__ void store(float *staged, float factor, int thread) const {
    if (thread >= kKeys) return;
    staged[thread] = numbers[0] * factor, staged[kKeys + thread] = numbers[1] * factor, staged[2 * kKeys + thread] = numbers[2];
  }
};

// A warp's 16 keys.
template <int K, int V, bool GATED> struct GradientColumns {
  using T = __nv_bfloat16;
  using S = GradientShape<K, V, GATED>;
  using E = Element<T>;
  static constexpr int KEY_BLOCKS = K / 16, VALUE_BLOCKS = V / 16, HALVES = S::HALVES;

  const linattn_problem &p;
  const int lane, warp, group, place;
  const int64_t first_key, key;
  const uint32_t key_stripe, value_stripe;
  const Blocks<K> k_blocks;
  const Blocks<V> v_blocks;
  const float scale[2];
  float key_sums[2 * KEY_BLOCKS][4], value_sums[2 * VALUE_BLOCKS][4], decay_sums[2] = {};
  uint32_t kept_k[S::KEEPS_ROWS ? KEY_BLOCKS : 1][4], kept_v[S::KEEPS_ROWS ? VALUE_BLOCKS : 1][4];
  OwnGates<1> gates;

  __device__ __forceinline__ GradientColumns(const Gradients &args, int pair, int64_t begin, uint32_t key_tile)
      : p(args.problem), lane(threadIdx.x & 31), warp(warp_number()), group(lane >> 2), place(lane & 3), first_key(begin + 16 * warp), key(first_key + group),
        key_stripe(Tile<K>::rows_at(warp)), value_stripe(Tile<V>::rows_at(warp)), k_blocks(key_tile, lane_down<K>(lane)), v_blocks(key_tile + S::OWN_KEY, lane_down<V>(lane)),
        scale{args.key_scale[static_cast<int64_t>(pair) * args.padded + key], args.key_scale[static_cast<int64_t>(pair) * args.padded + key + 8]} {
    if constexpr (S::KEEPS_ROWS) {
#pragma unroll
      for (int block = 0; block < KEY_BLOCKS; ++block) ldmatrix(kept_k[block], k_blocks.at(0, block) + key_stripe);
#pragma unroll
      for (int block = 0; block < VALUE_BLOCKS; ++block) ldmatrix(kept_v[block], v_blocks.at(0, block) + value_stripe);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int n = 0; n < 2 * KEY_BLOCKS; ++n) key_sums[n][i] = 0.f;
#pragma unroll
      for (int n = 0; n < 2 * VALUE_BLOCKS; ++n) value_sums[n][i] = 0.f;
    }
  }

  // s = k q^T and d = v w^T of a step's queries.
  __device__ __forceinline__ void multiply(float (&s)[2 * HALVES][4], float (&d)[2 * HALVES][4], const Blocks<K> &q_across, const Blocks<V> &w_across, int step) {
    add_products<T, HALVES, S::KEEPS_ROWS>(s, kept_k, k_blocks, key_stripe, q_across, step);
    add_products<T, HALVES, S::KEEPS_ROWS>(d, kept_v, v_blocks, value_stripe, w_across, step);
  }

  // Products of two neighbouring queries, `column` of the tile whose first is `first`, into their weights in dk (s) and dv (d). f: of each of the lane's keys.
  // NEAR: not all pairs are seen, or gated alike.
  template <bool NEAR>
  __device__ __forceinline__ void weigh(float (&s)[4], float (&d)[4], const Coefficients (&f)[2], const float *numbers, int64_t first, int column, bool whole,
                                        const OtherGates *others, int stage, bool diagonal) {
    const float2 inverse = *reinterpret_cast<const float2 *>(numbers + column), error = *reinterpret_cast<const float2 *>(numbers + kKeys + column);
    const float2 unit = *reinterpret_cast<const float2 *>(numbers + 2 * kKeys + column);
    float2 exponent = {};
    int2 run = {};
    if constexpr (GATED && NEAR) exponent = *reinterpret_cast<const float2 *>(others->exponent[stage] + column), run = *reinterpret_cast<const int2 *>(others->run[stage] + column);
    const int earliest = p.causal ? static_cast<int>(key - first) : -kKeys;  // query of the tile that sees the first key
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int half = i >> 1;
      const float r = i & 1 ? unit.y : unit.x, t = s[i] * scale[half] * r;
      float inverse_mass = i & 1 ? inverse.y : inverse.x, change = fmaf(d[i], inverse_mass, i & 1 ? error.y : error.x);
      if constexpr (GATED && NEAR) {
        // off the diagonal the gate is in coefficients and numbers
        const float gate = gates.times(1.f, 0, half, diagonal ? (i & 1 ? exponent.y : exponent.x) : 0.f, i & 1 ? run.y : run.x, column + (i & 1) >= earliest + 8 * half, diagonal);
        change *= gate, inverse_mass *= gate;
      } else if constexpr (!GATED) {
        const int64_t number = first + column + (i & 1);
        if (!whole && (number >= p.length || (p.causal && number < key + 8 * half))) change = inverse_mass = 0.f;
      }
      const float weight = fmaf(fmaf(f[half].gamma, t, f[half].beta), t, f[half].a);
      if constexpr (GATED) decay_sums[half] = fmaf(weight, change, decay_sums[half]);
      s[i] = change * r * fmaf(2.f * f[half].gamma, t, f[half].beta), d[i] = weight * inverse_mass;
    }
  }

  // A tile of queries of the head whose coefficients are f. Away from the diagonal a key's factor is in its coefficients, and a query's in its numbers.
  template <bool NEAR>
  __device__ __forceinline__ void add(uint32_t query_tile, const float *numbers, const Coefficients &of_head, int64_t first, const OtherGates *others, int stage, bool diagonal) {
    Coefficients f[2] = {of_head, of_head};
    if constexpr (GATED)
#pragma unroll
      for (int half = 0; half < 2; ++half) f[half] *= diagonal ? 1.f : gates.factor[0][half];
    const Blocks<K> q_across(query_tile, lane_across<K>(lane)), q_down(query_tile, lane_down<K>(lane));
    const Blocks<V> w_across(query_tile + S::TILE, lane_across<V>(lane)), w_down(query_tile + S::TILE, lane_down<V>(lane));
#pragma unroll 1
    for (int step = 0; step < kKeys / S::STEP; ++step) {
      const int64_t query = first + S::STEP * step;
      if (NEAR && query >= p.length) break;
      if (NEAR && p.causal && query + S::STEP - 1 < first_key) continue;
      float s[2 * HALVES][4] = {}, d[2 * HALVES][4] = {};
      multiply(s, d, q_across, w_across, step);
      const bool whole = query + S::STEP <= p.length && (!p.causal || query >= first_key + 15);
      uint32_t slopes[HALVES][4], weights[HALVES][4];
#pragma unroll
      for (int side = 0; side < 2 * HALVES; ++side) {
        float (&x)[4] = s[side], (&y)[4] = d[side];
        weigh<NEAR>(x, y, f, numbers, first, S::STEP * step + 8 * side + 2 * place, whole, others, stage, diagonal);
        slopes[side / 2][side % 2 * 2] = E::pack(x[0], x[1]), slopes[side / 2][side % 2 * 2 + 1] = E::pack(x[2], x[3]);
        weights[side / 2][side % 2 * 2] = E::pack(y[0], y[1]), weights[side / 2][side % 2 * 2 + 1] = E::pack(y[2], y[3]);
      }
#pragma unroll
      for (int half = 0; half < HALVES; ++half) {
        const uint32_t at = step * HALVES;
#pragma unroll
        for (int block = 0; block < KEY_BLOCKS; ++block) {
          uint32_t q[4];
          ldmatrix_transposed(q, q_down.at(half, block) + at * Tile<K>::kBlockBytes);
          E::mma(key_sums[2 * block], slopes[half], q[0], q[1]), E::mma(key_sums[2 * block + 1], slopes[half], q[2], q[3]);
        }
#pragma unroll
        for (int block = 0; block < VALUE_BLOCKS; ++block) {
          uint32_t w[4];
          ldmatrix_transposed(w, w_down.at(half, block) + at * Tile<V>::kBlockBytes);
          E::mma(value_sums[2 * block], weights[half], w[0], w[1]), E::mma(value_sums[2 * block + 1], weights[half], w[2], w[3]);
        }
      }
    }
  }

  // Of the heads since the last such call, which share one decay.
  __device__ __forceinline__ void store_decay_sums(float *column_sums, bool more) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = decay_sums[half];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      if (place == 0 && key + 8 * half < p.length) column_sums[key + 8 * half] = more ? column_sums[key + 8 * half] + sum : sum;
      decay_sums[half] = 0.f;
    }
  }

  __device__ __forceinline__ void store(const Gradients &args, unsigned char *shared, int batch, int key_head, int64_t begin, int rows, bool has_state) {
    if (p.normalize_qk) project<T, KEY_BLOCKS>(key_sums, k_blocks, key_stripe, scale);
    T *const keys = head_of<T>(args.grad_key, batch, key_head) + begin * args.grad_key.token_stride;
    T *const values = head_of<T>(args.grad_value, batch, key_head) + begin * args.grad_value.token_stride;
#pragma unroll
    for (int n = 0; n < 2 * KEY_BLOCKS; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) key_sums[n][i] *= scale[i >> 1];
    if (has_state) {
      add_stored<T, K>(key_sums, keys, args.grad_key.token_stride, 16 * warp + group, rows, place, pieces_of<K, V>(p));
      add_stored<T, V>(value_sums, values, args.grad_value.token_stride, 16 * warp + group, rows, place);
    }
    store_rows<T, K>(args.grad_key, keys, shared, k_blocks, key_stripe, key_sums, 1.f, 1.f, rows, warp, lane, pieces_of<K, V>(p));
    store_rows<T, V>(args.grad_value, values, shared + S::OWN_KEY, v_blocks, value_stripe, value_sums, 1.f, 1.f, rows, warp, lane);
  }
};

template <int K, int V, bool GATED>
__global__ void __launch_bounds__(kGradientThreads, GradientShape<K, V, GATED>::MIN_BLOCKS) columns_kernel(const __grid_constant__ Gradients args) {
  using T = __nv_bfloat16;
  using S = GradientShape<K, V, GATED>;
  extern __shared__ __align__(1024) unsigned char shared[];
  const linattn_problem &p = args.problem;
  const int thread = threadIdx.x;
  const uint32_t key_tile = shared_address(shared), value_tile = key_tile + S::OWN_KEY, stages = key_tile + S::OWN;
  float *const staged_numbers = reinterpret_cast<float *>(shared + S::NUMBERS_AT);
  OtherGates *const others = GATED ? reinterpret_cast<OtherGates *>(shared + S::COLUMNS_GATES_AT) : nullptr;

  const int pair = blockIdx.x / args.row_tiles, tile_number = blockIdx.x % args.row_tiles;  // long columns first
  const int batch = pair / p.key_heads, key_head = pair % p.key_heads, heads = p.query_heads / p.key_heads, first_head = key_head * heads, pieces = pieces_of<K, V>(p);
  const int64_t begin = static_cast<int64_t>(tile_number) * kRows;
  const int rows = static_cast<int>(min(p.length - begin, static_cast<int64_t>(kRows)));
  const int64_t seen = min(p.length, (begin / args.chunk + 1) * args.chunk);  // queries up to there, of the tokens' own chunk
  const int first_tile = p.causal ? static_cast<int>(begin / kKeys) : 0;
  int tile_end = static_cast<int>((seen + kKeys - 1) / kKeys);
  if constexpr (GATED) {
    const int behind = min(static_cast<int>((begin + kRows) / kKeys), tile_end);
    int reached = behind;
    for (int i = 0; i < heads; ++i) {
      const GateReader decay(args.gates, p, true, batch, first_head + i, begin + rows - 1);
      reached = max(reached, queries_in_reach(p, decay, first_head + i, 1, begin + rows - 1, behind, tile_end).find());
    }
    tile_end = reached;
  }
  const int tiles = tile_end - first_tile, iterations = tiles * heads;
  const bool has_state = seen < p.length;  // of the queries behind
  const auto gates_of = [&](bool queries, int iteration) { return GateReader(args.gates, p, queries, batch, first_head + iteration / tiles, begin + rows - 1); };
  const auto first_of = [&](int iteration) { return static_cast<int64_t>(first_tile + iteration % tiles) * kKeys; };
  GateCopy on_way;
  NumbersCopy numbers_on_way;
  const auto is_diagonal = [&](int64_t first) { return p.causal && first < begin + kRows; };
  const auto arrive = [&](int iteration, int32_t low, int32_t high) {
    if constexpr (GATED) {
      const int stage = iteration % kStages;
      on_way.store(*others, true, stage, low, high, thread);
      numbers_on_way.store(staged_numbers + stage * kNumbers * kKeys, is_diagonal(first_of(iteration)) ? 1.f : on_way.factor(true), thread);
    }
  };
  const auto fetch = [&](int iteration) {
    const int head = first_head + iteration / tiles, stage = iteration % kStages;
    const int64_t first = first_of(iteration);
    const int count = static_cast<int>(min(p.length - first, static_cast<int64_t>(kKeys)));
    const uint32_t target = stages + stage * S::STAGE;
    copy_tile<K, kKeys, kGradientThreads>(target, head_of<const T>(p.query, batch, head) + first * p.query.token_stride, p.query.token_stride, count, thread, pieces);
    copy_tile<V, kKeys, kGradientThreads>(target + S::TILE, head_of<const T>(args.grad_out, batch, head) + first * args.grad_out.token_stride, args.grad_out.token_stride, count,
                                          thread);
    if constexpr (GATED) {
      on_way.load(gates_of(true, iteration), first, thread);
      numbers_on_way.load(args, static_cast<int64_t>(batch) * p.query_heads + head, first, thread);
    } else if (thread < kNumbers * kKeys / 4) {
      const int which = thread / (kKeys / 4), four = thread % (kKeys / 4) * 4;
      const float *const numbers = args.query_numbers + ((static_cast<int64_t>(batch) * p.query_heads + head) * kNumbers + which) * args.padded + first + four;
      copy_async(key_tile + S::NUMBERS_AT + (stage * kNumbers * kKeys + which * kKeys + four) * 4, numbers, true);
    }
    copy_commit();
  };
  copy_tile<K, kRows, kGradientThreads>(key_tile, head_of<const T>(p.key, batch, key_head) + begin * p.key.token_stride, p.key.token_stride, rows, thread, pieces);
  copy_tile<V, kRows, kGradientThreads>(value_tile, head_of<const T>(p.value, batch, key_head) + begin * p.value.token_stride, p.value.token_stride, rows, thread);
  fetch(0);
  int32_t low = 0, high = 0;
  if constexpr (GATED) {
    range_of_runs<kGradientThreads>(*others, gates_of(false, 0), begin, rows, low, high, thread);
    arrive(0, low, high);
  }
  copy_wait<0>();
  __syncthreads();
  if (GATED && p.key_segments) {
    zero_own_padding<K, kGradientThreads>(shared, gates_of(false, 0), begin, thread);
    zero_own_padding<V, kGradientThreads>(shared + S::OWN_KEY, gates_of(false, 0), begin, thread);
    __syncthreads();
  }

  GradientColumns<K, V, GATED> work(args, pair, begin, key_tile);
  for (int iteration = 0; iteration < iterations; ++iteration) {
    if (iteration > 0) {
      copy_wait<0>();
      __syncthreads();  // the tile is here, and nobody reads the one that the next copies overwrite
    }
    if (iteration + 1 < iterations) fetch(iteration + 1);
    const int stage = iteration % kStages, head = first_head + iteration / tiles;
    const int64_t first = first_of(iteration);
    bool some = true;  // of the tile's queries see some key
    if constexpr (GATED) {
      if (iteration % tiles == 0) work.gates.load(gates_of(false, iteration), work.key);
      some = told(others, stage, SEEN);
      if (some && told(others, stage, PADDED)) {
        zero_padding<K, kGradientThreads>(shared + S::OWN + stage * S::STAGE, others->run[stage], thread);
        zero_padding<V, kGradientThreads>(shared + S::OWN + stage * S::STAGE + S::TILE, others->run[stage], thread);
        __syncthreads();
      }
    }
    const float *const numbers = staged_numbers + stage * kNumbers * kKeys;
    const bool diagonal = is_diagonal(first);
    if (GATED && some && !diagonal && !told(others, stage, MIXED))
      work.template add<!GATED>(stages + stage * S::STAGE, numbers, Coefficients(p, head), first, others, stage, false);
    else if (some) work.template add<true>(stages + stage * S::STAGE, numbers, Coefficients(p, head), first, others, stage, diagonal);
    if constexpr (GATED) {
      if (iteration + 1 < iterations) arrive(iteration + 1, low, high);
      const bool ends = iteration + 1 == iterations || (p.state_heads != p.key_heads && iteration % tiles == tiles - 1);
      if (args.column_sums && ends) {
        const int64_t state_head = p.state_heads == p.key_heads ? key_head : head;
        work.store_decay_sums(args.column_sums + (static_cast<int64_t>(batch) * p.state_heads + state_head) * p.length, has_state);
      }
    }
  }
  work.store(args, shared, batch, key_head, begin, rows, has_state);
}

template <int K, int V, bool GATED> cudaError_t launch_columns(const Gradients &args, cudaStream_t stream) {
  constexpr int kShared = GradientShape<K, V, GATED>::COLUMNS_SHARED;
  if (const cudaError_t failed = cudaFuncSetAttribute(columns_kernel<K, V, GATED>, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared)) return failed;
  columns_kernel<K, V, GATED><<<static_cast<unsigned>(args.problem.batch * args.problem.key_heads * args.row_tiles), kGradientThreads, kShared, stream>>>(args);
  return cudaPeekAtLastError();
}

}  // namespace linattn_pairs
