// The warps of the row kernel that copy tiles and keep the running state: 16 rows of it each, float32 in registers, rounded once a chunk.
#pragma once
#include "stream/row_block.cuh"

namespace linattn_stream {

// What they fetch, ahead of the products: rows for each chunk and head, keys and values for each chunk.
template <typename T, int D, bool GRAD, bool GATED> struct RowCopies {
  using Block = RowBlock<T, D, GRAD, GATED>;
  using Shape = typename Block::Shape;
  using Copy = TileCopy<T, D, Block::C, Shape::STATE_THREADS>;
  static constexpr int C = Block::C, STAGES = Block::STAGES, TILE = Block::TILE, ROW_TILES = Block::ROW_TILES;

  const Block &job;
  const RowArguments &args;
  const linattn_problem &p;
  const linattn_tensor &x, &y, &z;
  const int helper, heads;
  int64_t left;
  int iteration = 0, head = 0, stage = 0, key_stage = 0;

  __device__ __forceinline__ RowCopies(const Block &job, int helper)
      : job(job), args(job.args), p(args.problem), x(GRAD ? args.grad_out : p.query), y(GRAD ? p.value : p.key), z(GRAD ? p.key : p.value), helper(helper), heads(job.heads),
        left(job.end - job.begin) {
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) prefetch();
  }

  // The next chunk and head, if there is one.
  __device__ __forceinline__ void prefetch() {
    if (iteration < job.iterations) {
      const int count = static_cast<int>(min(left, static_cast<int64_t>(C)));
      if (p.causal && head == 0) start_keys(count);
      if constexpr (GATED)
        if (head == 0) job.small.gates.start(args.gates, job.batch, job.head_pair, p.length, job.end - left, count, key_stage, helper);
      start_rows(count);
      advance();
    }
    ++iteration;
    copy_commit();
  }

  __device__ __forceinline__ void start_keys(int count) const {
    const uint32_t keys = job.key_tiles + key_stage * 2 * TILE;
    Copy::start(keys, y, job.batch, job.memory_head, job.end - left, count, helper);
    Copy::start(keys + TILE, z, job.batch, job.memory_head, job.end - left, count, helper);
  }

  __device__ __forceinline__ void start_rows(int count) const {
    const uint32_t rows = job.row_tiles + stage * ROW_TILES * TILE;
    const int64_t row_head = job.key_head * heads + head;
    Copy::start(rows, x, job.batch, row_head, job.end - left, count, helper);
    if constexpr (GRAD) {
      Copy::start(rows + TILE, args.out, job.batch, row_head, job.end - left, count, helper);
      Copy::start(rows + 2 * TILE, p.query, job.batch, row_head, job.end - left, count, helper);
      if (helper < C) {
        const bool valid = helper < count;
        const int64_t number = (static_cast<int64_t>(job.batch) * p.query_heads + row_head) * p.length + job.end - left + helper;
        copy_number_async(shared_address(job.small.numbers[stage][0] + helper), args.mass + (valid ? number : 0), valid);
        if (args.grad_mass) copy_number_async(shared_address(job.small.numbers[stage][1] + helper), args.grad_mass + (valid ? number : 0), valid);
      }
    }
  }

  __device__ __forceinline__ void advance() {
    stage = stage == STAGES - 1 ? 0 : stage + 1;
    if (++head == heads) head = 0, left -= C, key_stage = key_stage == STAGES - 1 ? 0 : key_stage + 1;
  }
};

// One of these warps, from chunk to chunk. Every step is made part of `run`, and every member is a register.
template <typename T, int D, bool GRAD, bool GATED> struct RowState {
  using Block = RowBlock<T, D, GRAD, GATED>;
  using Shape = typename Block::Shape;
  using E = Element<T>;
  using State = StateTile<T, Shape::BLOCKS>;
  static constexpr int C = Block::C, BLOCKS = Shape::BLOCKS, STAGES = Block::STAGES, TILE = Block::TILE;
  static constexpr int kStripeBytes = Tile<D>::kBlockBytes;

  const Block &job;
  const RowArguments &args;
  typename Block::Small &small;
  const int lane_id, group, place;
  const uint32_t down, across;
  const int heads;
  const bool causal, unit;
  const int helper;
  RowCopies<T, D, GRAD, GATED> copies;
  const StatePlace<D, false> at;
  const WeightReader<T> key_reader;
  float count = 0.f;
  int tokens_left, head = 0, stage = 0, key_stage = 0;

  __device__ __forceinline__ explicit RowState(const Block &job)
      : job(job), args(job.args), small(job.small), lane_id(threadIdx.x & 31), group(lane_id >> 2), place(lane_id & 3), down(lane_down<D>(lane_id)),
        across(lane_across<D>(lane_id)), heads(job.heads), causal(args.problem.causal), unit(args.problem.normalize_qk), helper(threadIdx.x - 32 * Shape::RESULT_WARPS),
        copies(job, helper), at(warp_number() - Shape::RESULT_WARPS, true, 0, BLOCKS, lane_id), key_reader(job.key_weights(), job.zeros(), lane_id),
        tokens_left(static_cast<int>(job.end - job.begin)) {}

  __device__ __forceinline__ void run() {
    State state;
    count = load_state<D>(state, at, job.source, GRAD);
    publish(state);
    for (int iteration = 0; iteration < job.iterations; ++iteration) {
      const uint32_t y_tile = job.key_tiles + key_stage * 2 * TILE;
      copy_wait<STAGES - 2>();
      warpgroup_publish();
      // behind this the tiles and the rounded state are here, and nobody reads the tiles that the next copies overwrite
      const bool factors = job.prepare(stage, key_stage, causal && head == 0, min(tokens_left, C), helper);
      if (causal && head == 0) share_scales(y_tile, factors);  // first, as the other warps wait for it
      copies.prefetch();
      stage = stage == STAGES - 1 ? 0 : stage + 1;
      if (!causal) {
        if (++head == heads) head = 0, tokens_left -= C, key_stage = key_stage == STAGES - 1 ? 0 : key_stage + 1;
        continue;
      }
      if (head == 0) take_in(state, y_tile);
      if (++head == heads) {
        head = 0;
        tokens_left -= C;
        key_stage = key_stage == STAGES - 1 ? 0 : key_stage + 1;
        barrier_sync<kStateRead, Shape::THREADS>();
        publish(state);
      }
    }
    copy_wait<0>();
    store(state);
  }

  // The state as it is, rounded, for the warps that compute.
  __device__ __forceinline__ void publish(const State &state) {
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
  }

  // What the chunk's keys count.
  __device__ __forceinline__ void share_scales(uint32_t y_tile, bool factors) {
    const uint32_t k_tile = GRAD ? y_tile + TILE : y_tile;
    const Blocks<D> k_rows(k_tile, down), k_across(k_tile, across);
    for (int stripe = at.row; stripe < Shape::STRIPES; stripe += Shape::STATE_WARPS) measure_keys(k_rows, k_across, stripe, factors);
    barrier_arrive<kScalesReady, Shape::THREADS>();
  }

  // A chunk's keys and values. Forward: column = sum of unit keys, line = sum of v; gradient: column = sum of v, line = sum of unit keys.
  __device__ __forceinline__ void take_in(State &state, uint32_t y_tile) {
    const uint32_t z_tile = y_tile + TILE;
    const Blocks<D> z_blocks(z_tile, down);
    barrier_sync<kScalesShared, Shape::STATE_THREADS>();
    const uint32_t y_block = Blocks<D>(y_tile, across).at_column(0, at.row), z_block = z_blocks.at_column(0, at.row);
    if constexpr (GATED) decay(state);
    const WeightReader<T> leave_reader(job.leave_weights(), job.zeros(), lane_id);
    const WeightReader<T> &column_reader = GRAD ? leave_reader : key_reader, &line_reader = GRAD ? key_reader : leave_reader;
    if constexpr (kStateByGroups<D>) {
      update_state_by_groups<T, D, D, GRAD && !GATED, !GRAD && !GATED>(state, at, true, y_block, z_block, z_tile, key_reader, column_reader, line_reader);
    } else
#pragma unroll
      for (int block = 0; block < Shape::STRIPES; ++block)
        update_state<T, D, GRAD && !GATED, !GRAD && !GATED>(state, at, true, y_block, z_block, z_blocks, block, key_reader, column_reader, line_reader);
  }

  // 1 / |k| of 16 keys, and what each of them leaves in the state behind the chunk.
  __device__ __forceinline__ void measure_keys(const Blocks<D> &k_rows, const Blocks<D> &k_across, int stripe, bool factors) {
    const int local = 16 * stripe + group + 8 * (place & 1);  // a lane's key
    float scale = 1.f, leave = 1.f, factor = 1.f;
    if constexpr (GATED) {
      const ChunkGates<C> gates(small.gates, key_stage, min(tokens_left, C));
      leave = gates.leave(local);
      if (factors) factor = gates.inverse_carry(local);
    }
    if (unit) {
      uint32_t k[BLOCKS][4];
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block) ldmatrix(k[block], k_rows.at(0, block) + stripe * kStripeBytes);
      float square0, square1;
      row_products<T>(square0, square1, k, k_across, stripe * kStripeBytes, lane_id);
      scale = inverse_norm(place & 1 ? square1 : square0);
    }
    if (place > 1) return;
    small.key_scale[local] = scale * factor;
    job.key_weights().set(local, scale * leave);
    if constexpr (GATED) small.factor[local] = factor, small.leave[local] = leave, job.leave_weights().set(local, leave);
  }

  // What the chunk leaves of the state ahead of it, and the chunk's own keys counted.
  __device__ __forceinline__ void decay(State &state) {
    const float keep = ChunkGates<C>(small.gates, key_stage, min(tokens_left, C)).keep();
    scale_state(state, keep);
    if (at.row > 0) return;  // the count is the first warp's
    float left = 0.f;
    for (int token = lane_id; token < C; token += 32) left += small.leave[token];
#pragma unroll
    for (int step = 1; step < 32; step *= 2) left += __shfl_xor_sync(0xffffffffu, left, step);
    count = count * keep + left;
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
