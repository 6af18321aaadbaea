// Beside the gradient of the queries, what columns of earlier segments take of this one: the sum of queries and the gradients of their outputs,
// R = sum_i mixed_i q_i W_i^T, and its margins, of tiles that are here anyway. Otherwise a kernel reads both once more (segments.cuh).
#pragma once
#include "stream/row_block.cuh"

namespace linattn_stream {

// A warp's part in it. Every member is a register.
template <typename T, int D> struct RowSums {
  using Block = RowBlock<T, D, true, false, RowForm::kShallow>;
  using Shape = typename Block::Shape;
  static constexpr int BLOCKS = Shape::BLOCKS, TILE = Block::TILE;

  const Block &job;
  const int lane;
  const StatePlace<D, false> at;
  const WeightReader<T> mixed, level, slope;
  StateTile<T, BLOCKS> state;

  __device__ __forceinline__ RowSums(const Block &job, int warp)
      : job(job), lane(threadIdx.x & 31), at(warp, true, 0, BLOCKS, lane), mixed(job.row_weights(0), job.zeros(), lane), level(job.row_weights(1), job.zeros(), lane),
        slope(job.row_weights(2), job.zeros(), lane) {
    state.clear();
  }

  // A chunk's queries and gradients of one head, weighed.
  __device__ __forceinline__ void take_in(int stage) {
    const uint32_t w_tile = job.row_tiles + stage * Block::ROW_TILES * TILE, q_tile = w_tile + 2 * TILE;
    const uint32_t down = lane_down<D>(lane), q_block = Blocks<D>(q_tile, lane_across<D>(lane)).at_column(0, at.row), w_block = Blocks<D>(w_tile, down).at_column(0, at.row);
    if constexpr (kStateByGroups<D>) {
      update_state_by_groups<T, D, D, false, false>(state, at, true, q_block, w_block, w_tile, mixed, slope, level);
    } else {
      const Blocks<D> w_blocks(w_tile, down);
#pragma unroll
      for (int block = 0; block < Shape::STRIPES; ++block) update_state<T, D, false, false>(state, at, true, q_block, w_block, w_blocks, block, mixed, slope, level);
    }
  }

  // All but the count, which the warps of results sum.
  __device__ __forceinline__ void store() const { store_state<D>(state, at, job.sums(), 0.f, false); }
};

}  // namespace linattn_stream
