// The warps of the row kernel that copy tiles and keep the running state: 16 rows of it each, float32 in registers, rounded once a chunk.
#pragma once
#include "stream/row_copies.cuh"
#include "stream/row_sums.cuh"

namespace linattn_stream {

// One of these warps, from chunk to chunk. Every step is made part of `run`, and every member is a register.
template <typename T, int D, bool GRAD, bool GATED, RowForm FORM, bool SUMS> struct RowState {
  using Block = RowBlock<T, D, GRAD, GATED, FORM>;
  using Shape = typename Block::Shape;
  using E = Element<T>;
  using State = StateTile<T, Shape::BLOCKS>;
  static constexpr int C = Block::C, BLOCKS = Shape::BLOCKS, STAGES = Block::STAGES, TILE = Block::TILE;

  static constexpr bool kMakesReader = Block::kAhead || D == 64;  // of the keys' weights, chunk by chunk: where registers lack

  const Block &job;
  const RowArguments &args;
  typename Block::Small &small;
  const int lane_id;
  const uint32_t down, across;
  const int heads;
  const bool causal;
  const int helper;
  RowCopies<T, D, GRAD, GATED, FORM> copies;
  const StatePlace<D, false> at;
  std::conditional_t<SUMS, RowSums<T, D>, RowNothing> sums;
  const WeightReader<T> keys;
  float count = 0.f;
  int tokens_left, head = 0, stage = 0, key_stage = 0, buffer = 0;

  __device__ __forceinline__ explicit RowState(const Block &job)
      : job(job), args(job.args), small(job.small), lane_id(threadIdx.x & 31), down(lane_down<D>(lane_id)), across(lane_across<D>(lane_id)), heads(job.heads),
        causal(args.problem.causal), helper(threadIdx.x - 32 * Shape::RESULT_WARPS), copies(job, helper), at(warp_number() - Shape::RESULT_WARPS, true, 0, BLOCKS, lane_id),
        sums(job, warp_number() - Shape::RESULT_WARPS), keys(job.key_weights(), job.zeros(), lane_id), tokens_left(static_cast<int>(job.end - job.begin)) {}

  __device__ __forceinline__ void run() {
    State state;
    count = load_state<D>(state, at, job.source, GRAD);
    publish(state);
    if constexpr (Block::kAhead)
      if (causal) {  // the first chunk's keys
        copy_wait<STAGES - 2>();
        barrier_sync<kScalesShared, Shape::STATE_THREADS>();
        share_scales(job.key_tiles, 0, tokens_left, 0, true);
      }
    for (int iteration = 0; iteration < job.iterations; ++iteration) {
      const uint32_t y_tile = job.key_tiles + key_stage * 2 * TILE;
      copy_wait<Block::kWaiting>();
      warpgroup_publish();
      // behind this the tiles and the rounded state are here, and nobody reads the tiles that the next copies overwrite
      const bool factors = job.prepare(stage, key_stage, causal && head == 0, min(tokens_left, C), helper);
      if constexpr (!Block::kAhead)
        if (causal && head == 0) {  // first, as the other warps wait for it
          share_scales(y_tile, key_stage, tokens_left, 0, factors);
          barrier_arrive<kScalesReady, Shape::THREADS>();
        }
      copies.prefetch();
      const int at_stage = stage;
      stage = stage == STAGES - 1 ? 0 : stage + 1;
      if (!causal) {
        if (++head == heads) head = 0, tokens_left -= C, key_stage = key_stage == STAGES - 1 ? 0 : key_stage + 1;
        continue;
      }
      if (head == 0) take_in(state, y_tile);
      if constexpr (SUMS) {
        barrier_sync<kRowsWeighed, Shape::THREADS>();
        sums.take_in(at_stage);
      }
      if (++head == heads) {
        head = 0;
        tokens_left -= C;
        key_stage = key_stage == STAGES - 1 ? 0 : key_stage + 1;
        if constexpr (Block::kAhead) {
          buffer ^= 1;  // the next chunk's keys, which are here: no warp of results will wait for them
          if (tokens_left > 0) share_scales(job.key_tiles + key_stage * 2 * TILE, key_stage, tokens_left, buffer, true);
        }
        barrier_sync<kStateRead, Shape::THREADS>();
        publish(state);
      }
    }
    copy_wait<0>();
    if constexpr (SUMS) sums.store();
    store(state);
  }

  // The state as it is, rounded, for the warps that compute.
  __device__ __forceinline__ void publish(const State &state) {
    if constexpr (GATED)
      if (helper == 0) small.count[0] = count;
    float lift = 1.f;
    if constexpr (E::kNarrow) {
      small.peaks[at.row] = state_peak(state, BLOCKS, true);
      barrier_sync<kScalesShared, Shape::STATE_THREADS>();
      const Lift whole = lift_to(kStatePeak, peak_of_warps<Shape::STATE_WARPS>(small.peaks));
      lift = whole.up;
      if (helper == 0) small.state_worth = whole.down;
    }
    publish_state<T, D>(state, at, Blocks<D>(job.state_tiles, down), lift, small.line[0], lane_id, [&](int row, float sum) { job.column_parts().set(row, sum * lift); });
  }

  // What the chunk's keys count.
  __device__ __forceinline__ void share_scales(uint32_t y_tile, int key_stage, int tokens_left, int buffer, bool factors) {
    const uint32_t k_tile = GRAD ? y_tile + TILE : y_tile;
    const Blocks<D> k_rows(k_tile, down), k_across(k_tile, across);
    for (int stripe = at.row; stripe < Shape::STRIPES; stripe += Shape::STATE_WARPS) job.measure_keys(k_rows, k_across, stripe, key_stage, min(tokens_left, C), factors, buffer);
  }

  // A chunk's keys and values. Forward: column = sum of unit keys, line = sum of v; gradient: column = sum of v, line = sum of unit keys.
  __device__ __forceinline__ void take_in(State &state, uint32_t y_tile) {
    const uint32_t z_tile = y_tile + TILE;
    const Blocks<D> z_blocks(z_tile, down);
    if constexpr (!Block::kAhead) barrier_sync<kScalesShared, Shape::STATE_THREADS>();
    const uint32_t y_block = Blocks<D>(y_tile, across).at_column(0, at.row), z_block = z_blocks.at_column(0, at.row);
    if constexpr (GATED) decay(state);
    const WeightReader<T> key_reader = kMakesReader ? WeightReader<T>(job.key_weights(buffer), job.zeros(), lane_id) : keys,
                          leave_reader(job.leave_weights(buffer), job.zeros(), lane_id);
    const WeightReader<T> &column_reader = GRAD ? leave_reader : key_reader, &line_reader = GRAD ? key_reader : leave_reader;
    if constexpr (kStateByGroups<D>) {
      update_state_by_groups<T, D, D, GRAD && !GATED, !GRAD && !GATED>(state, at, true, y_block, z_block, z_tile, key_reader, column_reader, line_reader);
    } else
#pragma unroll
      for (int block = 0; block < Shape::STRIPES; ++block)
        update_state<T, D, GRAD && !GATED, !GRAD && !GATED>(state, at, true, y_block, z_block, z_blocks, block, key_reader, column_reader, line_reader);
  }

  // What the chunk leaves of the state ahead of it, and the chunk's own keys counted.
  __device__ __forceinline__ void decay(State &state) {
    const float keep = ChunkGates<C>(small.gates, key_stage, min(tokens_left, C)).keep();
    scale_state(state, keep);
    if (at.row > 0) return;  // the count is the first warp's
    count = count * keep + job.left_by_keys(buffer);
  }

  // The state behind the last token, where it is asked for.
  __device__ __forceinline__ void store(const State &state) const {
    if constexpr (!GRAD)
      if (args.final_state && job.segment == args.segments - 1)
        store_state<D>(state, at, StateView<D>::of_caller(args.final_state, job.head_pair), count + (causal && !GATED ? static_cast<float>(job.end - job.begin) : 0.f),
                       helper == 0);
    if constexpr (GRAD && GATED)
      if (args.final_sums && job.segment == args.segments - 1) store_state<D>(state, at, StateView<D>::of_segment(args.final_sums, job.head_pair, 1, 0), count, helper == 0);
  }
};

}  // namespace linattn_stream
