// What the kernels that form every pair of tokens share: f(s) = a + b s + c s^2 on the tensor cores, softmax attention's loop without its softmax.
//
// A block owns 128 queries of one head and walks over the keys in tiles of 64. With r_n = 1 / |k_n|:
//   o_i g_i = sum_n P_in v_n,   g_i = sum_n P_in,   P_in = a + s (beta_i + gamma_i s),   s = (q_i . k_n) r_n,
//   beta_i = b tau / |q_i|,   gamma_i = c (tau / |q_i|)^2.
// Norms are applied to the float32 products, so that queries and keys are never rounded again. Tiles of queries and keys are K wide and those of
// values V; a head dim below K leaves the rest of its tiles zero.
#pragma once
#include "card.h"
#include "tile/tile.cuh"

namespace linattn_pairs {

using namespace linattn_tile;
using linattn::aligned;

constexpr int kRows = 128, kKeys = 64, kStages = 2;
constexpr int kRunTokens = 128;  // of a chunk where the state is a running one: see running.cuh
constexpr int64_t kChunk = 32;  // tokens of a chunk, times the head dim

// A decay and runs of tokens as the kernels read them: see gates.cuh.
struct SequenceGates {
  double *decay;      // (batch, state heads, length): the running sum of log2 decay, or null
  const float *rate;  // (state heads): log decay of every token, in the place of the sum, or null
};

// Division of numbers below 2^31 by one that the host knows.
struct Divider {
  uint64_t factor;
  int32_t shift;
  Divider() = default;
  explicit Divider(int32_t by) : factor(0), shift(31) {
    while (int64_t{1} << (shift - 31) < by) ++shift;
    factor = ((uint64_t{1} << shift) + by - 1) / by;
  }
  __device__ __forceinline__ int32_t of(int32_t x) const { return static_cast<int32_t>(static_cast<uint64_t>(x) * factor >> shift); }
};

struct KeyGates;  // of a tile, on Hopper: see key_stream.cuh

struct Arguments {
  linattn_problem problem;
  linattn_tensor out;
  float *mass, *final_state;
  float *key_scale;        // (batch, key_heads, padded)
  int64_t padded;          // tokens, a multiple of kKeys
  int32_t row_tiles, heads_together;
  int64_t chunk;           // tokens whose pairs are formed where they are not all: see states.cu
  int64_t chunks;          // what lies before a query's own chunk is in a state: see state.cu; 1: no state
  float *sums;             // of every chunk alone
  unsigned char *states;   // before every chunk
  unsigned char *unit_keys;
  bool running;            // in one pass: see running.cuh
  bool warpgroups, gated;  // by Hopper's kernels, by those that know gates and keys narrower than values
  SequenceGates gates;
  KeyGates *key_gates;     // (batch, state heads, tiles of keys), or null
  Divider blocks_together, by_heads_together, by_query_heads, by_group, by_state;  // blocks of heads together; those; heads of a sequence; query heads to a key head, to a state
};

// 1 / |k| of a token, by four lanes side by side, which all get it; 1 where keys are used as they are, 0 behind the last. head: counted over the batch.
template <typename T> __device__ __forceinline__ float key_scale_of(const linattn_problem &p, int head, int64_t token) {
  float square = 0.f;
  if (token < p.length && p.normalize_qk) {
    const T *const row = head_of<const T>(p.key, head / p.key_heads, head % p.key_heads) + token * p.key.token_stride;
    for (int piece = threadIdx.x % 4; piece < p.head_dim / 8; piece += 4) {
      const uint4 eight = *reinterpret_cast<const uint4 *>(row + piece * 8);
      for (const uint32_t two : {eight.x, eight.y, eight.z, eight.w}) {
        const float low = Element<T>::low(two), high = Element<T>::high(two);
        square += low * low + high * high;
      }
    }
  }
  square += __shfl_xor_sync(0xffffffffu, square, 1);
  square += __shfl_xor_sync(0xffffffffu, square, 2);
  return p.normalize_qk ? inverse_norm(square) : 1.f;
}

// A power of two that keeps weights inside float16.
template <typename T> __device__ __forceinline__ float weight_scale(float a, float b, float c, float temperature) {
  if constexpr (Element<T>::kNarrow) {
    const float bound = fabsf(a) + fabsf(b * temperature) + fabsf(c) * temperature * temperature;
    return bound > 32768.f ? exp2f(-ceilf(log2f(bound * 0x1p-15f))) : 1.f;
  }
  return 1.f;
}

// What rounding takes from two weights. A mean over few tokens is one by rounded weights: of a single one it is that token's value then, which gradients build on
// where the weight nearly vanishes.
template <typename T> __device__ __forceinline__ float lost_by_rounding(float x, float y) {
  const uint32_t both = Element<T>::pack(x, y);
  return (x - Element<T>::low(both)) + (y - Element<T>::high(both));
}

// Which queries a block owns. Long rows come first, and heads in groups whose keys and values stay in the cache.
struct Place {
  int batch, head, key_head, rows, tiles;  // rows: real ones; tiles: of keys
  int64_t begin;
  __device__ __forceinline__ explicit Place(const Arguments &args) {
    const linattn_problem &p = args.problem;
    const int all_heads = p.batch * p.query_heads, number_together = args.blocks_together.of(blockIdx.x);
    const int first = number_together * args.heads_together, inside = blockIdx.x - first * args.row_tiles, together = min(args.heads_together, all_heads - first);
    const int row_tile = together == args.heads_together ? args.by_heads_together.of(inside) : inside / together, number = first + inside - row_tile * together;
    batch = args.by_query_heads.of(number), head = number - batch * p.query_heads, key_head = args.by_group.of(head);
    begin = static_cast<int64_t>(args.row_tiles - 1 - row_tile) * kRows;
    rows = static_cast<int>(min(p.length - begin, static_cast<int64_t>(kRows)));
    tiles = static_cast<int>(((p.causal ? begin + rows : p.length) + kKeys - 1) / kKeys);
  }
};

// Where keys are narrower than values they may be narrower than their tiles, too: pieces of 16 bytes that hold something.
template <int K, int V> __device__ __forceinline__ int pieces_of(const linattn_problem &p) { return K < V ? p.head_dim / 8 : K / 8; }

// The tiles of keys and values, two stages of them, and behind both their keys' scales.
template <typename T, int K, int V, int THREADS> struct KeyCopy {
  static constexpr int TILE = kKeys * K * 2, STAGE = TILE + kKeys * V * 2, BYTES = kStages * (STAGE + kKeys * 4);
  const linattn_problem &p;
  const T *keys, *values;
  const float *scales;
  uint32_t shared;
  __device__ __forceinline__ KeyCopy(const Arguments &args, const Place &place, uint32_t shared)
      : p(args.problem), keys(head_of<const T>(p.key, place.batch, place.key_head)), values(head_of<const T>(p.value, place.batch, place.key_head)),
        scales(args.key_scale + (static_cast<int64_t>(place.batch) * p.key_heads + place.key_head) * args.padded), shared(shared) {}
  __device__ __forceinline__ void start(int tile, int thread) const {
    const int64_t first = static_cast<int64_t>(tile) * kKeys;
    const int stage = tile % kStages, count = static_cast<int>(min(p.length - first, static_cast<int64_t>(kKeys)));
    copy_tile<K, kKeys, THREADS>(shared + stage * STAGE, keys + first * p.key.token_stride, p.key.token_stride, count, thread, pieces_of<K, V>(p));
    copy_tile<V, kKeys, THREADS>(shared + stage * STAGE + TILE, values + first * p.value.token_stride, p.value.token_stride, count, thread);
    if (thread < kKeys / 4) copy_async(shared + kStages * STAGE + stage * kKeys * 4 + thread * 16, scales + first + thread * 4, true);
  }
};

// The sum over the four lanes that have a row of a fragment.
__device__ __forceinline__ float over_place(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// What was left of states in a warp's 16 rows, `row` the lane's first.
template <typename T, int D> __device__ __forceinline__ void add_stored(float (&acc)[D / 8][4], const T *rows, int64_t stride, int row, int count, int place, int pieces = D / 8) {
  using E = Element<T>;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (row + 8 * half >= count) continue;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      if (n >= pieces) break;
      const uint32_t two = *reinterpret_cast<const uint32_t *>(rows + (row + 8 * half) * stride + 8 * n + 2 * place);
      acc[n][2 * half] += E::low(two), acc[n][2 * half + 1] += E::high(two);
    }
  }
}

// The tiles of a problem whose pairs can be formed here, 0 where they cannot; and whether they cost less than the generic path's state, which they do up to
// some multiple of K^2 tokens.
struct TileDims {
  int key, value;
};
TileDims tiles_of(const linattn_problem &problem);
bool pairs_cost_less(const linattn_problem &problem);

bool needs_gated(const linattn_problem &problem);

__host__ __device__ inline bool is_gated(const linattn_problem &problem) { return problem.log_decay || problem.key_segments; }
inline int64_t decay_bytes(const linattn_problem &problem) {
  return problem.log_decay ? (8 * static_cast<int64_t>(problem.batch) * problem.state_heads * problem.length + 255) / 256 * 256 : 0;
}
cudaError_t gated_forward_launch(const Arguments &args, cudaStream_t stream);
int gated_forward_shared_bytes(TileDims tiles);

// Of a long sequence pairs are formed inside chunks only; what the tokens outside of a token's chunk add comes first, out of states, and lies in the results.
struct StateMemory {
  int64_t chunk, scaled, weights, rows, sums, columns, edge_rows, edge_columns, flows, bytes;  // of the workspace
  int32_t chunks, edges, tiles, shared_bytes;                  // tiles: of the queries of a head that have a state, a part of the sums of dA each
  StateMemory(const linattn_problem &problem, bool gradients);
};
bool states_take(const linattn_problem &problem, bool gradients);
cudaError_t launch_state_output(const Arguments &args, void *workspace, cudaStream_t stream);

// One pass along the sequence, where features are few: see running.cuh.
bool running_takes(const linattn_problem &problem, bool gradients);
struct RunningMemory {
  int64_t states, chunk_sums, warp_sums, bytes;  // of the workspace
  int32_t segments, edges, shared_bytes;         // segments: of a head's queries, a part of the sums of dA each
  RunningMemory(const linattn_problem &problem, bool gradients);
};
cudaError_t running_output_launch(const Arguments &args, void *workspace, cudaStream_t stream);

// Hopper's warpgroups: head dims 32, 64 and 128.
bool hopper_takes(const linattn_problem &problem);
int hopper_shared_bytes(const linattn_problem &problem);
int64_t key_gates_bytes(const linattn_problem &problem);
// Whether hopper_launch makes the keys' scales, beside their gates; not where kernels of states ask for them before.
inline bool hopper_makes_scales(const Arguments &args) { return args.warpgroups && is_gated(args.problem) && args.chunk >= args.problem.length; }
// Whether it makes the sums of a decay a token, too: in short sequences, where every tile adds up all tokens before it rather than that a kernel is launched ahead.
constexpr int64_t kSummedByTiles = 1024;
inline bool hopper_sums_decay(const Arguments &args) { return args.gates.decay && hopper_makes_scales(args) && args.problem.length <= kSummedByTiles; }
cudaError_t hopper_launch(const Arguments &args, cudaStream_t stream);

// What is known of all tokens before a chunk: sum k_a k_b v, by blocks of 16 x 16 of (a, b), each pair of blocks once and with both its
// orders; sum k_a v; sum k_a k_b, which the masses take; sum k; sum v. Keys are unit vectors here, rounded.
template <int D> struct State {
  static constexpr int BLOCKS = D / 16;
  static constexpr int64_t CHUNK = kChunk * D;
  static constexpr int ITEMS = 8 * BLOCKS * (BLOCKS + 1);            // (a, block of b): 16 rows each, one a row of D values
  static constexpr int LINEAR = ITEMS * 16, MASSES = LINEAR + D, ROWS = MASSES + D;
  static constexpr int SUMS = ROWS * D + 2 * D;                      // floats of a chunk's sums: the rows, sum k, sum v
  static constexpr int ROUNDED_ROWS = 2 * D + LINEAR + D;            // high and low part of sum k_a k_b, then the others
  static constexpr int64_t BYTES = ROUNDED_ROWS * D * 2 + 2 * D * 4;  // of a state: rounded rows, sum k, sum v in float32
  static __host__ __device__ constexpr int first_item(int block) { return 16 * (block * BLOCKS - block * (block - 1) / 2); }
};

bool state_takes(const linattn_problem &problem);
int64_t state_chunks(const linattn_problem &problem);
int64_t unit_key_bytes(const linattn_problem &problem);  // what the launch needs in memory
int64_t sums_bytes(const linattn_problem &problem);
int64_t states_bytes(const linattn_problem &problem);
cudaError_t state_launch(const Arguments &args, cudaStream_t stream);

}  // namespace linattn_pairs
