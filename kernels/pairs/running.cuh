// The second degree over 16 features in one pass along a sequence: a block walks over chunks of 128 tokens of a head, pairs are formed inside the chunk, and what
// lies outside of it is in a state that never leaves the multiprocessor. Two warpgroups read, 64 of the chunk's tokens each; a third keeps the state, one chunk ahead of them;
// a fourth brings the chunks.
//
// With x the unit vectors, rounded, the state is the S and the R of state_sums.cuh: forward in the sequence, of keys, for the output and the gradient of queries; backward, of
// queries, for those of keys and values. Its rows, one for each x_a x_b and then one for each x_a, lie in shared memory as wgmma reads them, the next chunk's beside this one's.
#pragma once
#include "pairs/group_gradients.cuh"
#include "tile/gates.cuh"

namespace linattn_pairs {

constexpr int kRunKeys = 16, kRunValues = 64, kRunItems = 16, kRunRows = 16 * kRunItems + kRunKeys;
constexpr int kReaders = 256, kKeepers = 128, kBringers = kRunTokens, kRunThreads = kReaders + kKeepers + kBringers;
constexpr int kRunEdgeChunks = 16;
constexpr int kStartFloats = 142 * kKeepers;  // of a state, as its keepers' registers have it, and what is left of it behind a segment
constexpr int kKeeperRegisters = 192, kReaderRegisters = 136, kRunBringerRegisters = 48;  // of a block together 65,536
constexpr float kSteepest = -32.f;  // log2 of a chunk's decay down to which a pair's is a product of one factor a token

// Between a block's warpgroups, which go at their own paces: but for the first two one of even steps and one of odd ones each, and for each warpgroup of readers.
enum RunBarrier { kMarginsWritten = 1, kTotalsWritten, kChunkHere, kStepHere = kChunkHere + 2, kChunkLeft = kStepHere + 4, kStateLeft = kChunkLeft + 2 };
enum class Pass { OUTPUT, ROWS, COLUMNS };  // ROWS: the gradient of queries; COLUMNS: those of keys and values

// What of A dA reaches over the edges between chunks, where a decay wants a gradient: see running_flow.cuh.
struct RunningFlow {
  int32_t edges;           // whose states are kept, one behind every kRunEdgeChunks chunks
  float *states[2];        // before and behind each of them: (batch, key heads, edges, kStartFloats)
  float *rows, *columns;   // of each chunk's tokens with those out of their state, a sum a warp: (batch, query or key heads, chunks, kWarps); null: nobody asks
  double *chunks, *known;  // (batch, key heads, chunks): of all sums of a chunk, rows' less columns'; what reaches over the edge before it
};

struct Running {
  Gradients of;        // of the output those without a gradient in their name are set
  linattn_tensor out;  // where a forward pass puts results, and masses
  float *mass;
  int32_t chunks, segment, segments;  // chunks of a sequence, and of a segment, whose block begins with a state out of memory
  float *starts;                      // (batch, key heads, segments, kStartFloats)
  RunningFlow flow;
};

// log2 of a decay that is the same at every token; 0 where there is none.
__device__ __forceinline__ double log2_rate(const Gradients &g, int query_head) {
  const linattn_problem &p = g.problem;
  return g.gates.rate ? kLog2E * real_decay(g.gates.rate[query_head / (p.query_heads / p.state_heads)]) : 0.0;
}

// Where x_a x_b stands among the state's rows: eight b of one a, then those of the next a; pairs of a by blocks of b.
__device__ __forceinline__ constexpr int row_of(int a, int b) { return 32 * (a / 2) + 16 * (b / 8) + 8 * (a % 2) + b % 8; }

// Of the state what is not in its rows.
struct alignas(16) StateMargins {
  float masses[kRunKeys][kRunKeys], lines[kRunKeys], values[kRunValues], count;  // of x_a x_b and of x_a; of the constant feature
  // Of a count that a decay has left next to nothing of none: there is no mean to be taken out.
  __device__ __forceinline__ float inverse_count() const { return count > 0x1p-100f ? 1.f / count : 0.f; }
};

// A chunk's tokens as its pairs and the state need them. The others are keys, beside columns queries.
struct ChunkNumbers {
  alignas(16) float exponent[kRunTokens], own[kRunTokens];     // of the decay from the chunk's edge on; what lies between a token and its state
  alignas(16) float unit[kRunTokens], factor[kRunTokens];      // of a key: 1 / |k|; where a pair's decay is a product, its own part
  alignas(16) float mass_weight[kRunTokens];                   // of the others in the state's masses
  alignas(16) float4 of_query[kRunTokens];                     // see NumbersOnWay
  alignas(16) int32_t query_run[kRunTokens], key_run[kRunTokens];
  float kept;     // what is left of the state behind the chunk
  int32_t mixed;  // whether each pair has a gate of its own
};

// What a chunk's others are in the state, by their numbers: 16 rows of 64 tokens, and the same of the next 64; but those that are read by two words at a time lie as lanes
// of a fragment have them.
struct FeatureTiles {
  static constexpr int TILE = kRunKeys * kKeys * 2, ALL = kRunTokens / kKeys * TILE;
  static constexpr int UNITS = 0, WEIGHTED = ALL, LINES = 2 * ALL, CONSTANT = 3 * ALL;  // unit vectors; with gamma and their weight, by lanes; with beta and it; a and it
  static constexpr int BYTES = (CONSTANT + kRunTokens * 2 + 1023) / 1024 * 1024;
  static __device__ __forceinline__ int at(int number, int token) { return token / kKeys * TILE + Tile<kKeys>::at(number, token % kKeys / 8) + token % 8 * 2; }
  // Of 16 tokens a lane's two, and its two of the eight behind.
  static __device__ __forceinline__ constexpr int by_lanes(int number, int token) {
    return number * kRunTokens * 2 + token / 16 * 32 + token % 8 / 2 * 8 + token / 8 % 2 * 4 + token % 2 * 2;
  }
};

template <Pass PASS> struct RunShape {
  static constexpr int X = kRunTokens * kRunKeys * 2, Y = kRunTokens * kRunValues * 2, OTHERS = X + Y, OWN = PASS == Pass::OUTPUT ? X : PASS == Pass::ROWS ? OTHERS + Y : OTHERS;
  static constexpr bool HAS_VALUES = PASS != Pass::OUTPUT;  // behind the state's rows, those of the constant feature: the sum of values in two rounded parts, and 14 of zeros
  static constexpr int STATE = (kRunRows + (HAS_VALUES ? 16 : 0)) * kRunValues * 2;
  static constexpr int OTHERS_AT = 2 * STATE, OWN_AT = OTHERS_AT + 2 * OTHERS, RESULTS_AT = OWN_AT + 2 * OWN, FEATURES_AT = RESULTS_AT + (PASS == Pass::OUTPUT ? Y : 0);
  static constexpr int MARGINS_AT = FEATURES_AT + 2 * FeatureTiles::BYTES;
  static constexpr int NUMBERS_AT = MARGINS_AT + 2 * sizeof(StateMargins), TOTALS_AT = NUMBERS_AT + 2 * sizeof(ChunkNumbers), SHARED = TOTALS_AT + kWarps * 3 * 4;
};

// What a block works on: steps over the chunks of a head's segment, and beside columns over the query heads that share its keys.
template <Pass PASS> struct RunPlace {
  static constexpr bool BACK = PASS == Pass::COLUMNS;
  const linattn_problem &p;
  const int heads, segment, batch, head, key_head, first_head, first, chunks;  // heads: of queries, for each chunk; head: of queries, or beside columns of keys
  const bool has_start;
  // all_heads: of a sequence, those that have blocks of their own; of keys or of queries.
  __device__ __forceinline__ RunPlace(const Running &args, int all_heads)
      : p(args.of.problem), heads(BACK ? p.query_heads / p.key_heads : 1), segment(blockIdx.x % args.segments), batch(blockIdx.x / args.segments / all_heads),
        head(blockIdx.x / args.segments % all_heads), key_head(head / (all_heads / p.key_heads)), first_head(head * (p.query_heads / all_heads)), first(segment * args.segment),
        chunks(min(args.segment, args.chunks - first)), has_start(BACK ? first + chunks < args.chunks : first > 0) {}
  __device__ __forceinline__ int steps() const { return chunks * heads; }
  __device__ __forceinline__ int64_t begin_of(int step) const { return static_cast<int64_t>(chunk_of(step)) * kRunTokens; }
  __device__ __forceinline__ int count_of(int64_t begin) const { return static_cast<int>(min(p.length - begin, static_cast<int64_t>(kRunTokens))); }
  __device__ __forceinline__ int query_head(int step) const { return first_head + (BACK ? step % heads : 0); }
  __device__ __forceinline__ int chunk_of(int step) const { return first + (BACK ? chunks - 1 - step / heads : step); }
  __device__ __forceinline__ int64_t key_pair() const { return static_cast<int64_t>(batch) * p.key_heads + key_head; }
  // Where the state that the chunk of a step begins with is kept, or null.
  __device__ __forceinline__ float *edge(const Running &args, int step) const {
    const int edge = chunk_of(step) + (BACK ? 1 : 0), number = edge / kRunEdgeChunks - 1;
    const bool first_head = BACK || head % (p.query_heads / p.key_heads) == 0;
    return edge % kRunEdgeChunks == 0 && number >= 0 && number < args.flow.edges && first_head ? args.flow.states[BACK] + (key_pair() * args.flow.edges + number) * kStartFloats
                                                                                               : nullptr;
  }
  // f's numbers of what the others are summed up with: of keys none.
  __device__ __forceinline__ Coefficients coefficients(int step) const {
    Coefficients f(p, query_head(step));
    if constexpr (!BACK) f.a = f.beta = f.gamma = 1.f;
    return f;
  }
  __device__ __forceinline__ float *start(const Running &args) const { return args.starts + (key_pair() * args.segments + segment) * kStartFloats; }
};

// What is ready for a step: its chunk, for those who keep the state; that and the state, for each warpgroup of readers, of whom some may be a step behind the others.
__device__ __forceinline__ void chunk_is_here(int step) { barrier_arrive<kBringers + kKeepers>(kChunkHere + step % 2); }
__device__ __forceinline__ void await_chunk(int step) { barrier_sync<kBringers + kKeepers>(kChunkHere + step % 2); }
// By bringers and by keepers.
__device__ __forceinline__ void step_is_here(int step) {
#pragma unroll
  for (int group = 0; group < 2; ++group) barrier_arrive<kBringers + kKeepers + kReaders / 2>(kStepHere + 2 * group + step % 2);
}
__device__ __forceinline__ void await_step(int step) { barrier_sync<kBringers + kKeepers + kReaders / 2>(kStepHere + 2 * (warp_number() / 4) + step % 2); }
// What is over: nobody reads a step's chunk, or its state.
__device__ __forceinline__ void leave_chunk(int step, int steps) {
  if (step + 2 < steps) barrier_arrive<kRunThreads>(kChunkLeft + step % 2);
}
__device__ __forceinline__ void leave_state(int step, int steps) {
  if (step + 1 < steps) barrier_arrive<kReaders + kKeepers>(kStateLeft + step % 2);
}
__device__ __forceinline__ void await_state_left(int step) { barrier_sync<kReaders + kKeepers>(kStateLeft + step % 2); }
__device__ __forceinline__ void await_chunk_left(int step) { barrier_sync<kRunThreads>(kChunkLeft + step % 2); }

}  // namespace linattn_pairs
