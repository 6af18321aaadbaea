// The kernel of the forward direction in n: its arguments, its shape, and what all threads of a block share. See rows.cuh.
#pragma once
#include <type_traits>

#include "tile/gates.cuh"
#include "tile/noise.cuh"
#include "tile/range.cuh"
#include "tile/state.cuh"

namespace linattn_stream {

using namespace linattn_tile;

struct RowArguments {
  linattn_problem problem;
  linattn_tensor out, grad_out, result;   // out and grad_out: gradient only; result: out, or grad_query
  float *mass_out;                        // forward
  const float *mass, *grad_mass;          // gradient
  float *error, *query_scale;             // gradient: e_i and 1 / |q_i|, (batch, query_heads, length), for the column kernel
  float *partials;                        // gradient: (batch, query_heads, segments, 2): sums of dA and of dA q^.k^
  const float *states;                    // of each segment's beginning, or null: initial_state or nothing
  float *final_state;                     // forward, or null
  int32_t segments, states_each;          // states_each: of a segment, whose first is ahead of it
  int64_t segment_length;
  Gates gates;
  bool noised;                            // gradient: grad_out holds W times the noise, and error what W itself gave
  float *row_sums;                        // gradient: (batch, query_heads, length): sum of A dA over the row's keys, or null
  float *query_states;                    // gradient: each segment's sum of queries and W, as the workspace holds states, or null
  float *tile_states;                     // wide: the state ahead of every tile, as the workspace holds states
  int32_t tiles, tile_each;               // tile_each: segments of a tile
  int64_t tile_length;
  float *final_sums;                      // gradient: the state behind the last token, transposed, as the workspace holds states, or null
};

// kDeep: a third stage of tiles, where the card has room for two blocks of it on a multiprocessor. kWide: one block on a multiprocessor, which works
// on several chunks at once, a round, while the states ahead of the next round's are made; for a query head to each state.
enum class RowForm { kShallow, kDeep, kWide };

template <int D, bool GRAD, bool GATED, RowForm FORM> struct RowShape {
  static constexpr bool kWide = FORM == RowForm::kWide;
  static constexpr int C = D == 32 || D == 128 ? 64 : D;
  static constexpr int STRIPES = C / 16, BLOCKS = D / 16;  // 16-wide blocks along the tokens and along D
  static constexpr int HALVES = D == 128 ? 2 : 1;          // warps that share out the columns of a stripe's results
  static constexpr int GROUPS = kWide ? 2 : 1;  // chunks to a round
  static constexpr int CHUNK_WARPS = STRIPES * HALVES, RESULT_WARPS = GROUPS * CHUNK_WARPS;
  static constexpr int STATE_WARPS = BLOCKS, WARPS = RESULT_WARPS + STATE_WARPS;
  static constexpr int STATE_THREADS = 32 * STATE_WARPS, THREADS = 32 * WARPS;
  static constexpr int OUT_PAIRS = BLOCKS / HALVES;
  static constexpr int ROUNDS = FORM == RowForm::kShallow ? 2 : 3, STAGES = ROUNDS * GROUPS;
  static constexpr int ROW_TILES = GRAD ? 3 : 1;           // x; and o, q for the gradient
  static constexpr int TILE = C * D * 2;
  static constexpr int STATE_TILE = D * D * 2;
  static constexpr int MIN_BLOCKS = kWide ? 1 : D == 32 ? 4 : D == 64 ? 2 : 1;
  static constexpr int BUFFERS = FORM == RowForm::kShallow ? 1 : 2 * GROUPS;  // of what keys count, measured a round ahead
  static constexpr int STATES = kWide ? BUFFERS : 1;                          // rounded, ahead of a chunk each
  struct Small {
    alignas(16) float key_scale[BUFFERS][C], line[STATES][D], numbers[GRAD ? STAGES : 1][2][C], exchange[2][C];
    alignas(16) uint16_t key_high[BUFFERS][C], key_low[BUFFERS][C], column_high[STATES][D], column_low[STATES][D], zeros[C > D ? C : D];
    float totals[GRAD ? STRIPES : 1][kMaxGroup][2], coefficients[kMaxGroup][2];
    float peaks[STATE_WARPS], state_worth;  // of the state's rounded elements
  };
  struct SumsSmall : Small {
    alignas(16) uint16_t row_high[3][C], row_low[3][C];  // as columns weigh the rows
    float counts[STRIPES];
  };
  struct GatedSmall : Small {
    GateTiles<C, STAGES> gates;
    alignas(16) uint16_t leave_high[BUFFERS][C], leave_low[BUFFERS][C];
    alignas(16) float leave[BUFFERS][C], factor[BUFFERS][C], scale_by_factor[BUFFERS][BUFFERS > 1 ? C : 1];  // factor: of the keys, where a pair's gate is a product
    float count[STATES];
  };
  using AllSmall = std::conditional_t<GATED, GatedSmall, std::conditional_t<GRAD, SumsSmall, Small>>;
  static constexpr int SHARED = STAGES * (ROW_TILES + 2) * TILE + STATES * STATE_TILE + static_cast<int>(sizeof(AllSmall));
};

// In place of a part that a kernel has not.
struct RowNothing {
  template <typename... Any> __device__ __forceinline__ explicit RowNothing(const Any &...) {}
};

// What all threads of a block know of it: where its head and segment lie, and its tiles in shared memory.
template <typename T, int D, bool GRAD, bool GATED, RowForm FORM> struct RowBlock {
  using Shape = RowShape<D, GRAD, GATED, FORM>;
  using Small = typename Shape::AllSmall;
  static constexpr int C = Shape::C, STAGES = Shape::STAGES, TILE = Shape::TILE, ROW_TILES = Shape::ROW_TILES;
  static constexpr bool kAhead = FORM != RowForm::kShallow && !Element<T>::kNarrow;  // whether keys are measured a round ahead: in float16 they are lifted first
  static constexpr int kWaiting = Shape::ROUNDS - (kAhead ? 3 : 2);                  // copies that may be on their way when a round begins

  const RowArguments &args;
  unsigned char *const shared;
  Small &small;
  const uint32_t row_tiles, key_tiles, state_tiles;  // (stage, ROW_TILES); (stage, y and z); (buffer)
  const int head_pair, segment, batch, key_head, heads;
  const int memory_head;                            // whose keys and values these are
  const int64_t begin, end;
  const int iterations;                             // chunks times the group's query heads
  const StateView<D> source;

  __device__ __forceinline__ RowBlock(const RowArguments &args, unsigned char *shared)
      : args(args), shared(shared), small(*reinterpret_cast<Small *>(shared + STAGES * (ROW_TILES + 2) * TILE + Shape::STATES * Shape::STATE_TILE)),
        row_tiles(shared_address(shared)), key_tiles(row_tiles + STAGES * ROW_TILES * TILE), state_tiles(key_tiles + STAGES * 2 * TILE), head_pair(blockIdx.x / args.segments),
        segment(blockIdx.x % args.segments), batch(head_pair / args.problem.state_heads), key_head(head_pair % args.problem.state_heads),
        heads(args.problem.query_heads / args.problem.state_heads), memory_head(key_head / (args.problem.state_heads / args.problem.key_heads)),
        begin(segment * args.segment_length), end(min(args.problem.length, begin + args.segment_length)), iterations(static_cast<int>((end - begin + C - 1) / C) * heads),
        source(args.states ? StateView<D>::of_segment(args.states, head_pair, args.segments * args.states_each, args.problem.causal ? segment * args.states_each : 0)
                           : StateView<D>::of_caller(args.problem.initial_state, head_pair)) {}

  __device__ __forceinline__ const T *zeros() const { return reinterpret_cast<const T *>(small.zeros); }
  __device__ __forceinline__ SplitWeights<T> key_weights(int buffer = 0) const {
    return {reinterpret_cast<T *>(small.key_high[buffer]), reinterpret_cast<T *>(small.key_low[buffer])};
  }
  // Which of the rounded states stands ahead of a chunk whose keys are measured in `buffer`.
  static __device__ __forceinline__ int state_of(int buffer) { return Shape::STATES > 1 ? buffer : 0; }
  __device__ __forceinline__ uint32_t state_tile(int buffer) const { return state_tiles + state_of(buffer) * Shape::STATE_TILE; }
  __device__ __forceinline__ SplitWeights<T> column_parts(int buffer = 0) const {
    return {reinterpret_cast<T *>(small.column_high[state_of(buffer)]), reinterpret_cast<T *>(small.column_low[state_of(buffer)])};
  }
  __device__ __forceinline__ SplitWeights<T> leave_weights(int buffer = 0) const {
    if constexpr (GATED) return {reinterpret_cast<T *>(small.leave_high[buffer]), reinterpret_cast<T *>(small.leave_low[buffer])};
    else return key_weights(buffer);
  }

  // As columns weigh the rows: in the products, W, and the queries.
  __device__ __forceinline__ SplitWeights<T> row_weights(int i) const { return {reinterpret_cast<T *>(small.row_high[i]), reinterpret_cast<T *>(small.row_low[i])}; }
  // Where the sums of the segment's queries and W go: to the last of its states.
  __device__ __forceinline__ StateView<D> sums() const {
    return StateView<D>::of_segment(args.query_states, head_pair, args.segments * args.states_each, (segment + 1) * args.states_each - 1);
  }

  // Before anything else.
  __device__ __forceinline__ void clear() const {
    const linattn_problem &p = args.problem;
    const int thread = threadIdx.x;
    for (int i = thread; i < (C > D ? C : D); i += Shape::THREADS) small.zeros[i] = 0;
    for (int i = thread; GRAD && i < Shape::STRIPES * kMaxGroup * 2; i += Shape::THREADS) (&small.totals[0][0][0])[i] = 0.f;
    if (GRAD && !args.grad_mass)
      for (int i = thread; i < STAGES * C; i += Shape::THREADS) small.numbers[i / C][1][i % C] = 0.f;
    if (thread < heads) {
      const int head = key_head * heads + thread;
      small.coefficients[thread][0] = p.coefficients[head], small.coefficients[thread][1] = p.coefficients[p.query_heads + head] * p.coefficients[3 * p.query_heads + head];
    }
    if constexpr (GATED) {
      small.gates.clear(args.gates, key_head, thread, Shape::THREADS);
      __syncthreads();  // before the first copies into them
    }
  }

  // At the top of an iteration, for all threads: the copies have arrived, and are made what the products take. `helper`: the thread's number among
  // those that fetch, or C. Whether the gates of the chunk's pairs are products.
  __device__ __forceinline__ bool prepare(int stage, int key_stage, bool fresh_keys, int tokens, int helper) const {
    const int thread = threadIdx.x;
    unsigned char *const row_tile = shared + stage * ROW_TILES * TILE, *const key_tile = shared + STAGES * ROW_TILES * TILE + key_stage * 2 * TILE;
    bool factors = true;
    if constexpr (GATED) {
      const bool padded = small.gates.arrive(args.gates, key_stage, tokens, helper);
      factors = ChunkGates<C>(small.gates, key_stage, tokens).template factors<T>(padded);
      if (padded) {
        for (int i = 0; i < ROW_TILES; ++i) zero_padding<D, C, Shape::THREADS>(row_tile + i * TILE, small.gates.query_runs[key_stage], thread);
        if (fresh_keys)
          for (int i = 0; i < 2; ++i) zero_padding<D, C, Shape::THREADS>(key_tile + i * TILE, small.gates.key_runs[key_stage], thread);
        warpgroup_publish();
        __syncthreads();
      }
    } else {
      __syncthreads();
    }
    if constexpr (Element<T>::kNarrow)
      if (fresh_keys) {
        lift_rows<T, D, C, Shape::THREADS>(key_tile + (GRAD ? TILE : 0), nullptr, thread);
        warpgroup_publish();
        __syncthreads();
      }
    return factors;
  }

  // The same where a round was prepared by those who made its states: whether the gates of a chunk's pairs are products.
  __device__ __forceinline__ bool prepared(int key_stage, int tokens) const {
    if constexpr (GATED) {
      const ChunkGates<C> gates(small.gates, key_stage, tokens);
      return gates.template factors<T>(args.gates.key_runs && gates.padded());
    }
    return true;
  }

  // 1 / |k| of 16 keys of a chunk, and what each of them leaves in the state behind the chunk. A chunk ahead nobody knows yet whether its gates are
  // products, nor is its padding zero: then both scales are made, and a row without direction, as one of NaN, gets scale 0.
  __device__ __forceinline__ void measure_keys(const Blocks<D> &k_rows, const Blocks<D> &k_across, int stripe, int key_stage, int tokens, bool factors, int buffer = 0) const {
    const int lane = threadIdx.x & 31, place = lane & 3, local = 16 * stripe + (lane >> 2) + 8 * (place & 1);  // a lane's key
    float scale = 1.f, leave = 1.f, factor = 1.f;
    if constexpr (GATED) {
      const ChunkGates<C> gates(small.gates, key_stage, tokens);
      leave = gates.leave(local);
      if (factors || kAhead) factor = gates.inverse_carry(local);
    }
    if (args.problem.normalize_qk) {
      uint32_t k[Shape::BLOCKS][4];
#pragma unroll
      for (int block = 0; block < Shape::BLOCKS; ++block) ldmatrix(k[block], k_rows.at(0, block) + stripe * Tile<D>::kBlockBytes);
      float square0, square1;
      row_squares<T>(square0, square1, k, lane);
      scale = inverse_norm(place & 1 ? square1 : square0);
    }
    if (place > 1) return;
    small.key_scale[buffer][local] = kAhead ? scale : scale * factor;
    key_weights(buffer).set(local, scale * leave);
    if constexpr (GATED) {
      small.factor[buffer][local] = factor, small.leave[buffer][local] = leave, leave_weights(buffer).set(local, leave);
      if constexpr (kAhead) small.scale_by_factor[buffer][local] = scale * factor;
    }
  }

  // What the chunk's keys count, for all lanes of a warp.
  __device__ __forceinline__ float left_by_keys(int buffer = 0) const {
    float left = 0.f;
    if constexpr (GATED) {
      for (int token = threadIdx.x & 31; token < C; token += 32) left += small.leave[buffer][token];
#pragma unroll
      for (int step = 1; step < 32; step *= 2) left += __shfl_xor_sync(0xffffffffu, left, step);
    }
    return left;
  }
};

}  // namespace linattn_stream
