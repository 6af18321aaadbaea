// What multiplies a pair's weight beside f: a decay since the key, and runs of tokens (packed sequences, padding), which see only themselves.
//
// A block owns 128 tokens and meets tiles of 64 others. With G the running sum of log2 decay, and R that of a token between the two (the last before the queries that a block
// owns, the last of the keys that it owns), a query has the exponent G_i - R and a key R - G_n; a pair counts exp2(their sum). Away from the diagonal neither is above 0, so
// there a pair takes no exponential of its own: the others' factors go into what a tile brings, the own into the sums, once. G is kept in double, since only small differences
// of a sum that grows with the sequence count. Runs are looked at in tiles that hold others than the block's own alone.
#pragma once
#include <type_traits>

#include "pairs/pairs.cuh"

namespace linattn_pairs {

// What Hopper's kernels ask of a tile's pairs: nothing, since all are seen, and gated by the others' factors alone; which of them are seen; that, and gates of their own, where
// the decay among the tile's tokens and the own ones is beyond what factors may be, kFast halvings a token.
enum Pairs { FAR, MASKED, GATED_EACH };
constexpr float kFast = 0.25f;

// The others of some tiles, one in work and one on its way.
template <int STAGES> struct StagedGates {
  alignas(16) float exponent[STAGES][kKeys], factor[STAGES][kKeys];
  alignas(16) int32_t run[STAGES][kKeys];  // 0: padding, or behind the last token
  int32_t told[STAGES][kKeys / 32];        // by each of the warps that fetch: what there is to know of its tokens
  int32_t lowest[8], highest[8];           // runs of the block's own tokens, by each of its warps
};
using OtherGates = StagedGates<kStages>;

enum Told : int32_t { PADDED = 1, SEEN = 2, MIXED = 4 };  // some are padding; some are of the block's runs; not all are of the one run that all of the block's are of

// A sequence's gates, as the tokens of one side read them: queries or keys, the block's own or the others.
struct GateReader {
  const double *decay;  // from the sequence's first token on, or null
  const int32_t *runs;  // or null: all one run
  int64_t length, edge_token;
  bool queries;

  __device__ __forceinline__ GateReader(const double *decay, const linattn_problem &p, bool queries, int64_t batch, int64_t edge_token)
      : decay(decay), runs(!p.key_segments ? nullptr
                           : queries       ? p.query_segments + batch * p.query_segments_stride
                                           : p.key_segments + batch * p.key_segments_stride),
        length(p.length), edge_token(edge_token), queries(queries) {}
  __device__ __forceinline__ GateReader(const SequenceGates &gates, const linattn_problem &p, bool queries, int64_t batch, int64_t head, int64_t edge_token)
      : GateReader(gates.decay ? gates.decay + (batch * p.state_heads + head / (p.query_heads / p.state_heads)) * p.length : nullptr, p, queries, batch, edge_token) {}
  __device__ __forceinline__ double edge() const { return edge_token >= 0 ? sum_of(edge_token) : 0.0; }  // R
  __device__ __forceinline__ double sum_of(int64_t token) const { return decay && token < length ? decay[token] : 0.0; }
  __device__ __forceinline__ int32_t run_at(int64_t token) const { return token >= length ? 0 : runs ? runs[token] : 1; }  // below 0: padding
  __device__ __forceinline__ int32_t run_of(int64_t token) const { return max(run_at(token), 0); }
};

// One thread a token: its gates leave memory while the tile before is in work, and are written down when that is done.
struct GateCopy {
  double sum, edge;
  int32_t run;
  bool real;
  __device__ __forceinline__ void load(const GateReader &from, int64_t first, int thread) {
    if (thread >= kKeys) return;
    sum = from.sum_of(first + thread), edge = from.edge(), run = from.run_of(first + thread), real = first + thread < from.length;
  }
  __device__ __forceinline__ float exponent(bool queries) const { return static_cast<float>(queries ? sum - edge : edge - sum); }
  __device__ __forceinline__ float factor(bool queries) const { return exp2_fast(fminf(exponent(queries), 0.f)); }
  // low, high: the runs that the block's own tokens are of.
  template <int STAGES> __device__ __forceinline__ void store(StagedGates<STAGES> &gates, bool queries, int stage, int32_t low, int32_t high, int thread) const {
    if (thread >= kKeys) return;
    gates.exponent[stage][thread] = exponent(queries), gates.factor[stage][thread] = factor(queries), gates.run[stage][thread] = run;
    const bool padded = __any_sync(0xffffffffu, real && run == 0), seen = __any_sync(0xffffffffu, run > 0 && run >= low && run <= high);
    const bool mixed = __any_sync(0xffffffffu, run != low || run != high);
    if (thread % 32 == 0) gates.told[stage][thread / 32] = (padded ? PADDED : 0) | (seen ? SEEN : 0) | (mixed ? MIXED : 0);
  }
};

template <int STAGES> __device__ __forceinline__ bool told(const StagedGates<STAGES> *gates, int stage, Told what) {
  int32_t all = 0;
#pragma unroll
  for (int warp = 0; warp < kKeys / 32; ++warp) all |= gates->told[stage][warp];
  return all & what;
}

// Padding among the others reads as zero, NaN in memory or not.
template <int D, int THREADS> __device__ __forceinline__ void zero_padding(unsigned char *tile, const int32_t *runs, int thread) {
  for (int i = thread; i < kKeys * (D / 8); i += THREADS)
    if (runs[i / (D / 8)] == 0) *reinterpret_cast<uint4 *>(tile + Tile<D>::at(i / (D / 8), i % (D / 8))) = make_uint4(0, 0, 0, 0);
}

// The same of a block's own tokens, whose runs no tile holds.
template <int D, int THREADS, int TOKENS = kRows> __device__ __forceinline__ void zero_own_padding(unsigned char *tile, const GateReader &own, int64_t begin, int thread) {
  for (int i = thread; i < TOKENS * (D / 8); i += THREADS)
    if (own.run_of(begin + i / (D / 8)) == 0) *reinterpret_cast<uint4 *>(tile + Tile<D>::at(i / (D / 8), i % (D / 8))) = make_uint4(0, 0, 0, 0);
}

// A lane's own tokens, 8 apart: those of rows `group` and `group + 8` of its warp's M blocks of 16.
template <int M> struct OwnGates {
  float exponent[M][2], factor[M][2];
  int32_t run[M][2];  // -1: padding, or behind the last token

  __device__ __forceinline__ bool is_padding(int m, int half) const { return run[m][half] < 0; }
  template <typename Reader> __device__ __forceinline__ void load(const Reader &from, int64_t first) {
    const double edge = from.edge();
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t token = first + 16 * m + 8 * half;
        const double sum = from.sum_of(token);
        run[m][half] = from.run_of(token) > 0 ? from.run_of(token) : -1;
        exponent[m][half] = static_cast<float>(from.queries ? sum - edge : edge - sum), factor[m][half] = is_padding(m, half) ? 0.f : exp2_fast(fminf(exponent[m][half], 0.f));
      }
  }
  // x of a pair on the diagonal or in a tile of several runs, gated; whatever x is, 0 where the pair is not `seen`. Away from the diagonal the own factor is not in it.
  __device__ __forceinline__ float times(float x, int m, int half, float other, int32_t other_run, bool seen, bool diagonal) const {
    const float product = x * exp2_fast(other + (diagonal ? exponent[m][half] : 0.f));
    return seen && other_run == run[m][half] ? product : 0.f;
  }
};

// The runs that a block's own tokens are of, from the lowest to the highest; runs do not fall along a sequence but for padding.
template <int THREADS, typename Shared>
__device__ __forceinline__ void range_of_runs(Shared &gates, const GateReader &own, int64_t begin, int rows, int32_t &low, int32_t &high, int thread) {
  static_assert(THREADS >= kRows && THREADS / 32 <= 8, "a thread a token, and room for all warps");
  high = thread < rows ? own.run_of(begin + thread) : 0, low = high > 0 ? high : INT32_MAX;
#pragma unroll
  for (int step = 16; step > 0; step /= 2) low = min(low, __shfl_xor_sync(0xffffffffu, low, step)), high = max(high, __shfl_xor_sync(0xffffffffu, high, step));
  if (thread % 32 == 0) gates.lowest[thread / 32] = low, gates.highest[thread / 32] = high;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < THREADS / 32; ++warp) low = min(low, gates.lowest[warp]), high = max(high, gates.highest[warp]);
}

// `call` with the widths of a gated kernel's tiles, as constants.
template <typename Call> auto with_gated_tiles(TileDims tiles, Call call) {
  const auto is = [&](int key, int value) { return tiles.key == key && tiles.value == value; };
  using std::integral_constant;
  if (is(16, 64)) return call(integral_constant<int, 16>(), integral_constant<int, 64>());
  if (is(16, 128)) return call(integral_constant<int, 16>(), integral_constant<int, 128>());
  if (is(32, 32)) return call(integral_constant<int, 32>(), integral_constant<int, 32>());
  if (is(32, 64)) return call(integral_constant<int, 32>(), integral_constant<int, 64>());
  if (is(32, 128)) return call(integral_constant<int, 32>(), integral_constant<int, 128>());
  if (is(64, 64)) return call(integral_constant<int, 64>(), integral_constant<int, 64>());
  return call(integral_constant<int, 128>(), integral_constant<int, 128>());
}

}  // namespace linattn_pairs
