// What there is to know of a tile of keys, made ahead of the output: their scales, and the gates of all states that they enter.
#pragma once
#include "pairs/key_stream.cuh"

namespace linattn_pairs {

// A key, by four lanes side by side, which all get its scale.
template <typename T, int K> struct KeyRow {
  static constexpr int EACH = (K / 8 + 3) / 4;
  uint4 pieces[EACH];
  __device__ __forceinline__ void load(const T *row, bool real, int count) {
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const int piece = static_cast<int>(threadIdx.x % 4) + 4 * i;
      pieces[i] = real && piece < count ? *reinterpret_cast<const uint4 *>(row + piece * 8) : make_uint4(0, 0, 0, 0);
    }
  }
  __device__ __forceinline__ float scale() const {
    float square = 0.f;
#pragma unroll
    for (const uint4 &eight : pieces)
      for (const uint32_t two : {eight.x, eight.y, eight.z, eight.w}) {
        const float low = Element<T>::low(two), high = Element<T>::high(two);
        square += low * low + high * high;
      }
    return inverse_norm(over_place(square));
  }
};

// The sum of a decay a token over the tokens before a tile, a thread's part: all of them are asked for at once.
template <int THREADS> __device__ __forceinline__ double decay_before(const float *log_decay, int first) {
  constexpr int EACH = kSummedByTiles / THREADS;
  float own[EACH];
#pragma unroll
  for (int i = 0; i < EACH; ++i)
    if (i * THREADS < first) own[i] = static_cast<int>(threadIdx.x) + i * THREADS < first ? log_decay[static_cast<int>(threadIdx.x) + i * THREADS] : 0.f;
  double sum = 0;
#pragma unroll
  for (int i = 0; i < EACH; ++i)
    if (i * THREADS < first) sum += real_decay(own[i]);  // of the whole block
  return sum;
}

// The gates of a tile of keys, by a warp, two tokens a lane.
template <bool SUMS_DECAY> struct TwoKeys {
  const RateReader keys;
  const int64_t first;  // of the tile
  double edge, sum[2];
  float log_decay[2];  // where it is summed here
  int32_t run[2];

  __device__ __forceinline__ TwoKeys(const Arguments &args, int batch, int state, int64_t first, int lane)
      : keys(args.gates, args.problem, false, batch, state, min(first + kKeys, args.problem.length) - 1), first(first) {
    const int64_t own = first + 2 * lane;
    run[0] = keys.run_of(own), run[1] = keys.run_of(own + 1);
    if constexpr (SUMS_DECAY) {
#pragma unroll
      for (int i = 0; i < 2; ++i) log_decay[i] = own + i < keys.length ? args.problem.log_decay[(batch * args.problem.state_heads + state) * keys.length + own + i] : 0.f;
    } else if (keys.decay) {
      edge = keys.edge(), sum[0] = keys.sum_of(own), sum[1] = keys.sum_of(own + 1);
    }
  }
  // The decay's sums up to the tile's tokens, written down for queries. before: of all tokens before, in parts.
  template <int WARPS> __device__ __forceinline__ void add_up(const double (&before)[WARPS], double *decay, int lane) {
    const double one = real_decay(log_decay[0]), two = one + real_decay(log_decay[1]);
    double total = two;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const double other = __shfl_up_sync(0xffffffffu, total, step);
      if (lane >= step) total += other;
    }
    total -= two;
#pragma unroll
    for (const double part : before) total += part;
    sum[0] = kLog2E * (total + one), sum[1] = kLog2E * (total + two);
    const int last = static_cast<int>(keys.edge_token - first);
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (2 * lane + i <= last) decay[2 * lane + i] = sum[i];
    edge = __shfl_sync(0xffffffffu, last % 2 ? sum[1] : sum[0], last / 2);
  }
  __device__ __forceinline__ void write(KeyGates &to, int lane) {
    if (!keys.decay) {
      const double each = keys.rate();
      edge = each * static_cast<double>(keys.edge_token + 1);
#pragma unroll
      for (int i = 0; i < 2; ++i) sum[i] = each * static_cast<double>(first + 2 * lane + i + 1);
    }
    const double level = floor(edge / kLevel);
    int32_t lowest = INT32_MAX, highest = 0, gaps = 0;
    float exponent[2], factor[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool real = first + 2 * lane + i < keys.length;
      const double own = real ? sum[i] : edge, above = kLevel * level - own, whole = floor(above);
      exponent[i] = static_cast<float>(edge - own);
      factor[i] = run[i] ? exp2_fast(static_cast<float>(above - whole)) * exp2_fast(static_cast<float>(whole)) : 0.f;
      if (run[i]) lowest = min(lowest, run[i]), highest = max(highest, run[i]);
      else gaps |= real ? HOLES : BEHIND;
    }
    reinterpret_cast<float2 *>(to.exponent)[lane] = make_float2(exponent[0], exponent[1]);
    reinterpret_cast<int2 *>(to.run)[lane] = make_int2(run[0], run[1]);
    to.scale_and_factor[lane][1] = make_float2(factor[0], factor[1]);
    lowest = __reduce_min_sync(0xffffffffu, lowest), highest = __reduce_max_sync(0xffffffffu, highest);
    gaps = (__any_sync(0xffffffffu, gaps & HOLES) ? HOLES : 0) | (__any_sync(0xffffffffu, gaps & BEHIND) ? BEHIND : 0);
    if (lane == 0) to.edge = edge, to.unused = 0.0, to.told = make_int4(static_cast<int32_t>(level), gaps | (exponent[0] < -kFast * kKeys ? FAST : 0), lowest, highest);
  }
};

// A block has a tile, and of the states that it enters as many as warps, each of which makes the gates of one. All that is read is asked for before any of it is waited for.
template <typename T, int K, int THREADS, bool SUMS_DECAY>
__global__ void __launch_bounds__(THREADS, THREADS == 256 ? 6 : 8) key_tile_kernel(const __grid_constant__ Arguments args, bool has_scales) {
  constexpr int WARPS = THREADS / 32, KEYS = 4 * kKeys / THREADS;  // KEYS: of a thread
  __shared__ double before[WARPS][WARPS];  // of a state, by each warp
  let_next_begin();
  const linattn_problem &p = args.problem;
  const int tiles = static_cast<int>(args.padded / kKeys), all_states = p.state_heads / p.key_heads, groups = (all_states + WARPS - 1) / WARPS;
  const int number = blockIdx.x / tiles, tile = blockIdx.x - number * tiles, head = groups == 1 ? number : number / groups, group = number - head * groups;
  const int batch = head / p.key_heads, key_head = head - batch * p.key_heads;
  const int first_state = key_head * all_states + group * WARPS, states = min(all_states - group * WARPS, WARPS);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int64_t first = static_cast<int64_t>(tile) * kKeys, first_head = static_cast<int64_t>(batch) * p.state_heads + first_state;
  KeyGates *const gates = args.key_gates + first_head * tiles + tile;  // of a state; those of the next one lie `tiles` behind

  KeyRow<T, K> rows[KEYS];
#pragma unroll
  for (int i = 0; i < KEYS; ++i) {
    const int64_t token = first + thread / 4 + i * (THREADS / 4);
    rows[i].load(head_of<const T>(p.key, batch, key_head) + token * p.key.token_stride, token < p.length, p.head_dim / 8);
  }
  TwoKeys<SUMS_DECAY> two(args, batch, first_state + min(warp, states - 1), first, lane);
  if constexpr (SUMS_DECAY) {
    for (int state = 0; state < states; ++state) {
      double sum = decay_before<THREADS>(p.log_decay + (first_head + state) * p.length, static_cast<int>(first));
#pragma unroll
      for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
      if (lane == 0) before[state][warp] = sum;
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < KEYS; ++i) {
    const int key = thread / 4 + i * (THREADS / 4);
    const float scale = has_scales ? args.key_scale[head * args.padded + first + key] : p.normalize_qk ? rows[i].scale() : 1.f;
    if (thread % 4 == 0)
      for (int state = 0; state < states; ++state) reinterpret_cast<float *>(&gates[static_cast<int64_t>(state) * tiles].scale_and_factor[key / 2][0])[key % 2] = scale;
  }
  if (warp >= states) return;
  if constexpr (SUMS_DECAY) two.add_up(before[warp], args.gates.decay + (first_head + warp) * p.length + first, lane);
  two.write(gates[static_cast<int64_t>(warp) * tiles], lane);
}
template <typename T, int K, int THREADS> cudaError_t launch_key_tiles(const Arguments &args, int tiles, cudaStream_t stream) {
  constexpr int WARPS = THREADS / 32;
  const int blocks = tiles * ((args.problem.state_heads / args.problem.key_heads + WARPS - 1) / WARPS);
  const auto of_tiles = hopper_sums_decay(args) ? key_tile_kernel<T, K, THREADS, true> : key_tile_kernel<T, K, THREADS, false>;
  of_tiles<<<blocks, THREADS, 0, stream>>>(args, !hopper_makes_scales(args));
  return cudaPeekAtLastError();
}
// Many tiles by small blocks, of which a multiprocessor has more; few, which are all at work at once, by as many threads as there are.
template <typename T, int K> cudaError_t launch_key_tiles(const Arguments &args, cudaStream_t stream) {
  const int tiles = static_cast<int>(args.problem.batch * args.problem.key_heads * (args.padded / kKeys));
  return tiles > 8 * linattn::card(cudaDevAttrMultiProcessorCount, 108) ? launch_key_tiles<T, K, 128>(args, tiles, stream) : launch_key_tiles<T, K, 256>(args, tiles, stream);
}

}  // namespace linattn_pairs
