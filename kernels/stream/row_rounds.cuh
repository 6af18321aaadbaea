// Where a block works on several chunks at once, a round, the warps that copy tiles and keep the state: while the others work on a round these make the
// states ahead of the next one's chunks, and what its keys count.
#pragma once
#include "stream/row_copies.cuh"

namespace linattn_stream {

// One of the warps that keep the state. Every member is a register.
template <typename T, int D, bool GATED> struct RowRounds {
  using Block = RowBlock<T, D, false, GATED, RowForm::kWide>;
  using Shape = typename Block::Shape;
  using State = StateTile<T, Shape::BLOCKS>;
  static constexpr int C = Block::C, BLOCKS = Shape::BLOCKS, STAGES = Block::STAGES, TILE = Block::TILE;

  const Block &job;
  const RowArguments &args;
  typename Block::Small &small;
  const int lane, warp;
  const uint32_t down, across;
  const StatePlace<D, false> at;
  RowCopies<T, D, false, GATED, RowForm::kWide> copies;
  State state;  // ahead of the chunk that is prepared next
  float count;
  int tokens_left, stage = 0, buffer = 0;
  int tile = 0, tile_left = 0;  // which of backward's tiles begins next, and in how many tokens

  __device__ __forceinline__ explicit RowRounds(const Block &job)
      : job(job), args(job.args), small(job.small), lane(threadIdx.x & 31), warp(warp_number() - Shape::RESULT_WARPS), down(lane_down<D>(lane)), across(lane_across<D>(lane)),
        at(warp, true, 0, BLOCKS, lane), copies(job, 32 * warp + lane), tokens_left(static_cast<int>(job.end)) {}

  __device__ __forceinline__ void run() {
    count = load_state<D>(state, at, job.source, false);
    copy_wait<Shape::ROUNDS - 2>();
    warpgroup_publish();
    barrier_sync<kScalesShared, Shape::STATE_THREADS>();  // the first round's tiles are here
    prepare();
    for (int chunk = 0; chunk < job.iterations; chunk += Shape::GROUPS) {
      copy_wait<Block::kWaiting>();
      warpgroup_publish();
      __syncthreads();  // this round is prepared, the next one's tiles are here, and nobody reads the round before
      copies.prefetch();
      prepare();
    }
    copy_wait<0>();
    if (args.final_state) store_state<D>(state, at, StateView<D>::of_caller(args.final_state, job.head_pair), count + (GATED ? 0.f : static_cast<float>(job.end)), writes_counts());
  }

  __device__ __forceinline__ bool writes_counts() const { return at.row == 0 && lane == 0; }

  // The states ahead of the next round's chunks, and what their keys count.
  __device__ __forceinline__ void prepare() {
    if constexpr (GATED)
      if (args.gates.key_runs) zero_padded();
    for (int i = 0; i < Shape::GROUPS; ++i) measure(i);
    barrier_sync<kScalesShared, Shape::STATE_THREADS>();
    make_states();
    tokens_left -= Shape::GROUPS * C;
    stage = stage == STAGES - Shape::GROUPS ? 0 : stage + Shape::GROUPS;
    buffer = buffer == Shape::BUFFERS - Shape::GROUPS ? 0 : buffer + Shape::GROUPS;
  }

  // The round's padding, before anybody reads it.
  __device__ __forceinline__ void zero_padded() const {
    for (int i = stage; i < stage + Shape::GROUPS; ++i) {
      unsigned char *const keys = job.shared + (STAGES + 2 * i) * TILE;
      zero_padding<D, C, Shape::STATE_THREADS>(job.shared + i * TILE, small.gates.query_runs[i], 32 * warp + lane);
      for (int j = 0; j < 2; ++j) zero_padding<D, C, Shape::STATE_THREADS>(keys + j * TILE, small.gates.key_runs[i], 32 * warp + lane);
    }
    warpgroup_publish();
    barrier_sync<kScalesShared, Shape::STATE_THREADS>();
  }

  __device__ __forceinline__ int tokens_of(int i) const { return min(tokens_left - i * C, C); }
  __device__ __forceinline__ uint32_t keys_of(int i) const { return job.key_tiles + (stage + i) * 2 * TILE; }

  // What the keys of the round's chunk `i` count.
  __device__ __forceinline__ void measure(int i) const {
    const int tokens = tokens_of(i);
    if (tokens <= 0) return;
    const Blocks<D> k_rows(keys_of(i), down), k_across(keys_of(i), across);
    for (int stripe = warp; stripe < Shape::STRIPES; stripe += Shape::STATE_WARPS) job.measure_keys(k_rows, k_across, stripe, stage + i, tokens, true, buffer + i);
  }

  // The keys and values of the round's chunk `i`.
  __device__ __forceinline__ void take_in(int i) {
    const uint32_t k_tile = keys_of(i), v_tile = k_tile + TILE, k_block = Blocks<D>(k_tile, across).at_column(0, at.row);
    const Blocks<D> v_blocks(v_tile, down);
    const WeightReader<T> keys(job.key_weights(buffer + i), job.zeros(), lane), leave(job.leave_weights(buffer + i), job.zeros(), lane);
    if constexpr (kStateByGroups<D>) {
      update_state_by_groups<T, D, D, false, !GATED>(state, at, true, k_block, v_blocks.at_column(0, at.row), v_tile, keys, keys, leave);
    } else
#pragma unroll
      for (int block = 0; block < Shape::STRIPES; ++block)
        update_state<T, D, false, !GATED>(state, at, true, k_block, v_blocks.at_column(0, at.row), v_blocks, block, keys, keys, leave);
  }

  __device__ __forceinline__ void make_states() {
#pragma unroll 1
    for (int i = 0; i < Shape::GROUPS; ++i)
      if (tokens_of(i) > 0) {
        publish(i);
        if constexpr (GATED) {
          const float keep = ChunkGates<C>(small.gates, stage + i, tokens_of(i)).keep();
          scale_state(state, keep);
          count = count * keep + job.left_by_keys(buffer + i);
        }
        take_in(i);
        pass_chunk();
      }
  }

  // The state as it is, ahead of the round's chunk `i`: rounded, for the warps that compute; and where a tile begins, in memory.
  __device__ __forceinline__ void publish(int i) const {
    const int own = buffer + i;
    if constexpr (GATED)
      if (writes_counts()) small.count[own] = count;
    publish_state<T, D>(state, at, Blocks<D>(job.state_tile(own), down), 1.f, small.line[own], lane, [&](int row, float sum) { job.column_parts(own).set(row, sum); });
    if (tile_left == 0)
      store_state<D>(state, at, StateView<D>::of_segment(args.tile_states, job.head_pair, args.tiles * args.tile_each, tile * args.tile_each),
                     count + (GATED ? 0.f : static_cast<float>(job.end - tokens_left + i * C)), writes_counts());
  }

  __device__ __forceinline__ void pass_chunk() {
    if (tile_left == 0) ++tile, tile_left = static_cast<int>(args.tile_length);
    tile_left -= C;
  }
};

}  // namespace linattn_stream
