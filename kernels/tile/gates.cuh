// What multiplies the weights beside f(s): a decay since each key, and runs of tokens (packed sequences, padding), which see only themselves.
//
// With G the running sum of log2 decay since the chunk's first token, a pair counts exp2(G_i - G_n) where its runs are equal. At the chunk's
// edges: `carry` is what a row takes of the state ahead, `leave` what a key leaves in the state behind, `keep` what of the state ahead is left
// there. Every exponent is at most 0.
//
// Most chunks are of one run and decay little: there exp2(G_i - G_n) is a product, of the row's carry and the inverse of the key's or of the
// key's leave and the inverse of the row's. The one factor enters what multiplies the others anyway, the other one the sum, once.
#pragma once
#include "tile/tile.cuh"

namespace linattn_tile {

constexpr double kLog2E = 1.4426950408889634;
// A token's log decay; what is less is nothing in float32 as this is, and sums of it would lose their small differences.
__device__ __forceinline__ double real_decay(double x) { return x < -710 ? -710 : x; }

struct Gates {
  const float *rate;                     // (state heads): log decay of every token, or null
  const float *decay;                    // (batch, state heads, length): G, or null
  const int32_t *query_runs, *key_runs;  // (batch, length), or null: the number of the run, negative for padding
  int64_t query_runs_stride, key_runs_stride;
};

// What the gradient of log_decay is made of, and room for what lies between.
struct DecaySums {
  float *rows, *columns;    // sums of A dA: (batch, query heads, length) over each row's keys, (batch, state heads, length) over each key's rows
  float *final_state;       // behind the last token, transposed, as the workspace holds states; only beside grad_state
  const float *grad_state;  // the caller's, or null
  float *ends;              // (batch, state heads)
  double *parts;            // (batch, state heads)
};

// The running sum in each chunk of a decay a token.
cudaError_t launch_chunk_decay(const linattn_problem &problem, int chunk, float *decay);
// The running sum from the sequence's first token on, (batch, state heads, length).
cudaError_t launch_running_decay(const linattn_problem &problem, double *decay);
cudaError_t launch_decay_gradient(const linattn_problem &problem, const DecaySums &sums, float *gradient);
// W times the noise into grad_query, and what the row kernel would find from W itself: e and 1 / |q|.
template <typename T> cudaError_t launch_noised_gradient(const linattn_problem &problem, const linattn_backward_data &data, float *error, float *query_scale);
// The sum over the state heads that share a key head: parts (batch, state heads, length, head_dim).
template <typename T> cudaError_t launch_share(const linattn_problem &problem, const T *parts, const linattn_tensor &result);

// The gates of the chunks on their way through a kernel.
template <int C, int STAGES> struct GateTiles {
  alignas(16) float decay[STAGES][C];
  alignas(16) int32_t query_runs[STAGES][C], key_runs[STAGES][C];
  int32_t run_ahead[STAGES];  // of the tokens in the state ahead

  // What no copy brings: the same decay at every token, or none, and one run.
  __device__ __forceinline__ void clear(const Gates &gates, int state_head, int thread, int threads) {
    const float rate = gates.rate ? gates.rate[state_head] * static_cast<float>(kLog2E) : 0.f;
    for (int i = thread; i < STAGES * C; i += threads) decay[i / C][i % C] = static_cast<float>(i % C + 1) * rate, query_runs[i / C][i % C] = key_runs[i / C][i % C] = 1;
    for (int i = thread; i < STAGES; i += threads) run_ahead[i] = 1;
  }
  // Tokens from `count` on get run 0, which is nobody's.
  __device__ __forceinline__ void start(const Gates &gates, int64_t batch, int64_t head, int64_t length, int64_t begin, int count, int stage, int thread) {
    if (thread < C) {
      const bool valid = thread < count;
      const int64_t token = valid ? begin + thread : 0;
      if (gates.decay) copy_number_async(shared_address(decay[stage] + thread), gates.decay + head * length + token, valid);
      if (gates.key_runs) {
        copy_word_async(shared_address(query_runs[stage] + thread), gates.query_runs + batch * gates.query_runs_stride + token, valid);
        copy_word_async(shared_address(key_runs[stage] + thread), gates.key_runs + batch * gates.key_runs_stride + token, valid);
      }
    }
    if (thread == 0 && gates.key_runs) copy_word_async(shared_address(run_ahead + stage), gates.key_runs + batch * gates.key_runs_stride + (begin > 0 ? begin - 1 : 0), true);
  }
  // The barrier behind which a chunk's copies are here, for all threads of the block. Whether any of its `count` tokens is padding: `thread`, who
  // fetched it, tells of each.
  __device__ __forceinline__ bool arrive(const Gates &gates, int stage, int count, int thread) const {
    if (gates.key_runs) return __syncthreads_or(thread < count && min(query_runs[stage][thread], key_runs[stage][thread]) <= 0);
    __syncthreads();
    return false;
  }
};

// One chunk's gates, once they have arrived.
template <int C> struct ChunkGates {
  const float *decay;
  const int32_t *query_runs, *key_runs;
  int count, run_ahead, run_behind;
  float total;

  template <int STAGES> __device__ __forceinline__ ChunkGates(const GateTiles<C, STAGES> &tiles, int stage, int tokens)
      : decay(tiles.decay[stage]), query_runs(tiles.query_runs[stage]), key_runs(tiles.key_runs[stage]), count(tokens), run_ahead(abs(tiles.run_ahead[stage])),
        run_behind(abs(tiles.key_runs[stage][tokens - 1])), total(tiles.decay[stage][tokens - 1]) {}
  __device__ __forceinline__ float keep() const { return select(run_ahead == run_behind, exp2_fast(total)); }
  __device__ __forceinline__ float carry(int row) const { return select(query_runs[row] == run_ahead, exp2_fast(decay[row])); }
  __device__ __forceinline__ float leave(int key) const { return select(key < count & key_runs[key] == run_behind, exp2_fast(total - decay[key])); }
  // Whether a pair's gate is a product: the state ahead and all tokens are of one run, and the decay's inverse keeps the range of the products
  // that it enters. Runs never fall, so that the first and the last tell of those between.
  template <typename T> __device__ __forceinline__ bool factors(bool padded) const {
    constexpr float kSteepest = Element<T>::kNarrow ? -1.f : -32.f;
    const bool first = key_runs[0] == run_ahead & query_runs[0] == run_ahead, last = key_runs[count - 1] == run_ahead & query_runs[count - 1] == run_ahead;
    return !padded & total >= kSteepest & first & last;  // not one after the other: each is a load
  }
  // Whether any of the chunk's tokens is padding, by all lanes of a warp.
  __device__ __forceinline__ bool padded() const {
    bool any = false;
    for (int token = threadIdx.x & 31; token < count; token += 32) any |= min(query_runs[token], key_runs[token]) <= 0;
    return __any_sync(0xffffffffu, any);
  }
  __device__ __forceinline__ float inverse_carry(int key) const { return select(key < count, exp2_fast(-decay[key])); }
  __device__ __forceinline__ float inverse_leave(int row) const { return select(row < count, exp2_fast(decay[row] - total)); }
  // Both sides are made, so that loads need not wait for each other.
  static __device__ __forceinline__ float select(bool real, float x) { return real ? x : 0.f; }
};

// Padding reads as zero, NaN in memory or not.
template <int D, int C, int THREADS> __device__ __forceinline__ void zero_padding(unsigned char *tile, const int32_t *runs, int thread) {
#pragma unroll 1
  for (int i = thread; i < C * (D / 8); i += THREADS)
    if (runs[i / (D / 8)] <= 0) *reinterpret_cast<uint4 *>(tile + Tile<D>::at(i / (D / 8), i % (D / 8))) = make_uint4(0, 0, 0, 0);
}

// The gates of two rows (or keys) of a lane against the others of their chunk.
struct PairGates {
  float decay[2];
  int32_t run[2];

  __device__ __forceinline__ PairGates(const float *decays, const int32_t *runs, int first, int second) : decay{decays[first], decays[second]}, run{runs[first], runs[second]} {}
  // `later` - `earlier` in time; nothing where the pair is not to be seen.
  static __device__ __forceinline__ float factor(float later, float earlier, bool seen) { return seen ? exp2_fast(fminf(later - earlier, 0.f)) : 0.f; }
  // This row `i` of the lane, as a query, against a key.
  __device__ __forceinline__ float of_key(int i, float key_decay, int32_t key_run, bool seen) const {
    return factor(decay[i], key_decay, seen && key_run > 0 && key_run == run[i]);
  }
  // This row of the lane, as a key, against a query.
  __device__ __forceinline__ float of_query(int i, float query_decay, int32_t query_run, bool seen) const {
    return factor(query_decay, decay[i], seen && query_run > 0 && query_run == run[i]);
  }
};

}  // namespace linattn_tile
