// The warps of the row kernel that copy tiles and keep the running state: 16 rows of it each, float32 in registers, rounded once a chunk.
#pragma once
#include "stream/row_block.cuh"

namespace linattn_stream {

template <typename T, int D, bool GRAD, bool GATED> __device__ __forceinline__ void keep_state(const RowBlock<T, D, GRAD, GATED> &job) {
  using Block = RowBlock<T, D, GRAD, GATED>;
  using Shape = typename Block::Shape;
  using E = Element<T>;
  constexpr int C = Block::C, BLOCKS = Shape::BLOCKS, STAGES = Block::STAGES, TILE = Block::TILE, ROW_TILES = Block::ROW_TILES;
  constexpr int kStripeBytes = Tile<D>::kBlockBytes;
  const RowArguments &args = job.args;
  const linattn_problem &p = args.problem;
  typename Block::Small &small = job.small;
  const int lane_id = threadIdx.x & 31, warp = warp_number(), group = lane_id >> 2, place = lane_id & 3;
  const uint32_t down = lane_down<D>(lane_id), across = lane_across<D>(lane_id);
  const int batch = job.batch, key_head = job.key_head, heads = job.heads;
  const int64_t begin = job.begin, end = job.end;
  const bool causal = p.causal, unit = p.normalize_qk;
  const int helper = threadIdx.x - 32 * Shape::RESULT_WARPS;
  const linattn_tensor &x = GRAD ? args.grad_out : p.query, &y = GRAD ? p.value : p.key, &z = GRAD ? p.key : p.value;
  using Copy = TileCopy<T, D, C, Shape::STATE_THREADS>;
  Copy x_copy(head_of<const T>(x, batch, key_head * heads), x.token_stride, begin, helper);
  Copy y_copy(head_of<const T>(y, batch, job.memory_head), y.token_stride, begin, helper);
  Copy z_copy(head_of<const T>(z, batch, job.memory_head), z.token_stride, begin, helper);
  Copy o_copy(head_of<const T>(GRAD ? args.out : x, batch, key_head * heads), GRAD ? args.out.token_stride : 0, begin, helper);
  Copy q_copy(head_of<const T>(p.query, batch, key_head * heads), p.query.token_stride, begin, helper);
  int64_t next_number = (static_cast<int64_t>(batch) * p.query_heads + key_head * heads) * p.length + begin + helper, next_left = end - begin;
  int next_iteration = 0, next_head = 0, next_stage = 0, next_key_stage = 0;

  const auto prefetch = [&]() {
    if (next_iteration < job.iterations) {
      const int count = static_cast<int>(min(next_left, static_cast<int64_t>(C)));
      const uint32_t rows = job.row_tiles + next_stage * ROW_TILES * TILE;
      if (causal && next_head == 0) {
        const uint32_t keys = job.key_tiles + next_key_stage * 2 * TILE;
        y_copy.start(keys, count, helper);
        z_copy.start(keys + TILE, count, helper);
        y_copy.next += C * y.token_stride, z_copy.next += C * z.token_stride;
      }
      if constexpr (GATED)
        if (next_head == 0) small.gates.start(args.gates, batch, job.head_pair, p.length, end - next_left, count, next_key_stage, helper);
      x_copy.start(rows, count, helper);
      const bool wraps = next_head == heads - 1;
      x_copy.next += wraps ? C * x.token_stride - (heads - 1) * x.head_stride : x.head_stride;
      if constexpr (GRAD) {
        o_copy.start(rows + TILE, count, helper);
        q_copy.start(rows + 2 * TILE, count, helper);
        o_copy.next += wraps ? C * args.out.token_stride - (heads - 1) * args.out.head_stride : args.out.head_stride;
        q_copy.next += wraps ? C * p.query.token_stride - (heads - 1) * p.query.head_stride : p.query.head_stride;
        if (helper < C) {
          const bool valid = helper < count;
          copy_number_async(shared_address(small.numbers[next_stage][0] + helper), args.mass + (valid ? next_number : 0), valid);
          if (args.grad_mass) copy_number_async(shared_address(small.numbers[next_stage][1] + helper), args.grad_mass + (valid ? next_number : 0), valid);
        }
        next_number += wraps ? C - (heads - 1) * p.length : p.length;
      }
      next_left -= wraps ? C : 0;
      next_head = wraps ? 0 : next_head + 1;
      next_stage = next_stage == STAGES - 1 ? 0 : next_stage + 1;
      if (next_head == 0) next_key_stage = next_key_stage == STAGES - 1 ? 0 : next_key_stage + 1;
    }
    ++next_iteration;
    copy_commit();
  };
#pragma unroll
  for (int i = 0; i < STAGES - 1; ++i) prefetch();

  const StatePlace<D, false> at(warp - Shape::RESULT_WARPS, true, 0, BLOCKS, lane_id);
  const WeightReader<T> key_reader(job.key_weights(), job.zeros(), lane_id);
  StateTile<T, BLOCKS> state;
  float count = load_state<D>(state, at, job.source, GRAD);
  int tokens_left = static_cast<int>(end - begin);
  const auto publish = [&]() {
    if constexpr (GATED)
      if (helper == 0) small.count = count;
    float lift = 1.f;
    if constexpr (E::kNarrow) {
      small.peaks[at.row] = state_peak(state, BLOCKS, true);
      barrier_sync<kScalesShared, Shape::STATE_THREADS>();
      const Lift whole = lift_to(kStatePeak, peak_of_warps<Shape::STATE_WARPS>(small.peaks));
      lift = whole.up;
      if (helper == 0) small.state_worth = whole.down;
    }
    publish_state<T, D>(state, at, Blocks<D>(job.state_tile, down), lift, small.line, lane_id, [&](int row, float sum) { job.column_parts().set(row, sum * lift); });
  };
  publish();
  int head = 0, stage = 0, key_stage = 0;
  for (int iteration = 0; iteration < job.iterations; ++iteration) {
    const uint32_t y_tile = job.key_tiles + key_stage * 2 * TILE, z_tile = y_tile + TILE;
    copy_wait<STAGES - 2>();
    warpgroup_publish();
    __syncthreads();  // the tiles and the rounded state are here, and nobody reads the tiles that the next copies overwrite
    job.prepare(stage, key_stage, causal && head == 0);
    prefetch();
    stage = stage == STAGES - 1 ? 0 : stage + 1;
    if (!causal) {
      if (++head == heads) head = 0, key_stage = key_stage == STAGES - 1 ? 0 : key_stage + 1;
      continue;
    }
    if (head == 0) {
      const Blocks<D> k_rows(GRAD ? z_tile : y_tile, down), k_across(GRAD ? z_tile : y_tile, across), z_blocks(z_tile, down);
      for (int stripe = at.row; stripe < Shape::STRIPES; stripe += Shape::STATE_WARPS) {
        float scale0 = 1.f, scale1 = 1.f;
        if (unit) {
          uint32_t k[BLOCKS][4];
#pragma unroll
          for (int block = 0; block < BLOCKS; ++block) ldmatrix(k[block], k_rows.at(0, block) + stripe * kStripeBytes);
          row_products<T>(scale0, scale1, k, k_across, stripe * kStripeBytes, lane_id);
          scale0 = inverse_norm(scale0), scale1 = inverse_norm(scale1);
        }
        if (place == 0) {
          const int local = 16 * stripe + group;
          small.key_scale[local] = scale0, small.key_scale[local + 8] = scale1;
          if constexpr (GATED) {
            const ChunkGates<C> gates(small.gates, key_stage, min(tokens_left, C));
            const float leave0 = gates.leave(local), leave1 = gates.leave(local + 8);
            small.leave[local] = leave0, small.leave[local + 8] = leave1;
            job.leave_weights().set(local, leave0), job.leave_weights().set(local + 8, leave1);
            scale0 *= leave0, scale1 *= leave1;
          }
          job.key_weights().set(local, scale0), job.key_weights().set(local + 8, scale1);
        }
      }
      barrier_arrive<kScalesReady, Shape::THREADS>();
      barrier_sync<kScalesShared, Shape::STATE_THREADS>();
      // forward: column = sum of unit keys, line = sum of v; gradient: column = sum of v, line = sum of unit keys.
      const uint32_t y_block = Blocks<D>(y_tile, across).at_column(0, at.row), z_block = z_blocks.at_column(0, at.row);
      if constexpr (GATED) {
        const float keep = ChunkGates<C>(small.gates, key_stage, min(tokens_left, C)).keep();
        scale_state(state, keep);
        count *= keep;
        for (int token = 0; token < C; token += 4) {
          const float4 leave = *reinterpret_cast<const float4 *>(small.leave + token);
          count += (leave.x + leave.y) + (leave.z + leave.w);
        }
        tokens_left -= C;
      }
      const WeightReader<T> leave_reader(job.leave_weights(), job.zeros(), lane_id);
      const WeightReader<T> &column_reader = GRAD ? leave_reader : key_reader, &line_reader = GRAD ? key_reader : leave_reader;
      if constexpr (kStateByGroups<D>) {
        update_state_by_groups<T, D, D, GRAD && !GATED, !GRAD && !GATED>(state, at, true, y_block, z_block, z_tile, key_reader, column_reader, line_reader);
      } else
#pragma unroll
        for (int block = 0; block < Shape::STRIPES; ++block)
          update_state<T, D, GRAD && !GATED, !GRAD && !GATED>(state, at, true, y_block, z_block, z_blocks, block, key_reader, column_reader, line_reader);
    }
    if (++head == heads) {
      head = 0;
      key_stage = key_stage == STAGES - 1 ? 0 : key_stage + 1;
      barrier_sync<kStateRead, Shape::THREADS>();
      publish();
    }
  }
  copy_wait<0>();
  if constexpr (!GRAD) {
    if (args.final_state && job.segment == args.segments - 1)
      store_state<D>(state, at, StateView<D>::of_caller(args.final_state, job.head_pair), count + (causal && !GATED ? static_cast<float>(end - begin) : 0.f), helper == 0);
  }
  if constexpr (GRAD && GATED)
    if (args.final_sums && job.segment == args.segments - 1) store_state<D>(state, at, StateView<D>::of_segment(args.final_sums, job.head_pair, 1, 0), count, helper == 0);
}

}  // namespace linattn_stream
