// The state of the later chunks, R = sum_i mixed_i q_i W_i^T and its margins, which the column kernel's warps share out among them.
#pragma once
#include "stream/column_block.cuh"

namespace linattn_stream {

// At D = 128 the accumulators of warpgroups leave too few registers: 9 % slower.
template <int D> constexpr bool kColumnsByGroups = kWarpgroups<D> && D <= 64;

// What a lane reads of the queries' weights.
template <typename T> struct ColumnReaders {
  const WeightReader<T> mixed, level, slope;
  __device__ __forceinline__ ColumnReaders(const SplitWeights<T> &mixed, const SplitWeights<T> &level, const SplitWeights<T> &slope, const T *zeros, int lane)
      : mixed(mixed, zeros, lane), level(level, zeros, lane), slope(slope, zeros, lane) {}
};

// A warp's part in it. The sums themselves stay with the caller: every member is a register.
template <typename T, int D, bool GATED> struct ColumnState {
  using Block = ColumnBlock<T, D, GATED>;
  using Shape = typename Block::Shape;
  using E = Element<T>;
  using State = StateTile<T, Shape::PAIRS>;
  using Gate = std::conditional_t<GATED, ChunkGates<Shape::C>, int>;
  static constexpr int C = Shape::C, BLOCKS = Shape::BLOCKS, TILE = Shape::TILE;
  static constexpr bool kGroups = kStateByGroups<D> && kColumnsByGroups<D>;
  static constexpr int kCounting = (C + 31) / 32;  // warps whose threads count a chunk's queries
  using Place = StatePlace<D, (Shape::SPLIT > 1 && !kGroups)>;

  const Block &job;
  const ColumnArguments &args;
  typename Block::Small &small;
  const int thread, lane_id, warp, part;
  const uint32_t down, across;
  const bool holds;                           // a part of the state
  const int pairs;
  const Place at;
  const bool owns_line;
  const ColumnReaders<T> readers;
  StateLift state_lift;                       // float16: the factors of the rounded state, and of what is summed
  Lift rounded{1.f, 1.f}, summed{1.f, 1.f};
  float count = 0.f;                          // the sum of a e, shared out over the threads

  __device__ __forceinline__ ColumnState(const Block &job, int warp)
      : job(job), args(job.args), small(job.small), thread(threadIdx.x), lane_id(thread & 31), warp(warp), part(warp / BLOCKS), down(lane_down<D>(lane_id)),
        across(lane_across<D>(lane_id)), holds(Shape::WARPS == Shape::SPLIT * BLOCKS || part < Shape::SPLIT),
        pairs(BLOCKS % Shape::SPLIT == 0 ? Shape::PAIRS : (BLOCKS + 1 - part) / 2),
        at(warp % BLOCKS, part == 0, Shape::SPLIT > 1 ? part : 0, pairs, lane_id, Shape::SPLIT > 1 ? part * Shape::PAIRS : 0), owns_line(at.line_block() >= 0),
        readers(weights(0), weights(1), weights(2), reinterpret_cast<const T *>(small.zeros), lane_id) {}

  __device__ __forceinline__ SplitWeights<T> weights(int i) const { return {reinterpret_cast<const T *>(small.high[i]), reinterpret_cast<const T *>(small.low[i])}; }

  // What lies behind the segment.
  __device__ __forceinline__ void load(State &state) {
    state.clear();
    const StateView<D> source =
        args.states ? StateView<D>::of_segment(args.states, job.head_pair, args.segments * args.states_each, args.problem.causal ? (job.segment + 1) * args.states_each - 1 : 0)
                    : StateView<D>::of_caller(args.grad_state, job.head_pair);
    if (holds) load_state<D>(state, at, source, false);
    if constexpr (E::kNarrow) state_lift.enter(state), measure(state);
    count = source.data && thread == 0 ? source.count() : 0.f;
  }

  __device__ __forceinline__ void measure(const State &state) const { small.state_peaks[warp] = holds ? state_peak(state, pairs, false) : 0.f; }

  // The sum of a e of the later rows, which the chunk's keys see: as exact as the margins, and like them before this chunk's rows enter.
  __device__ __forceinline__ void share_count() const {
    if (warp >= kCounting) return;
    float later = count;
#pragma unroll
    for (int shift = 1; shift < 32; shift *= 2) later += __shfl_xor_sync(0xffffffffu, later, shift);
    if (lane_id == 0) small.counts[warp] = later;
  }

  // What a query counts, in the pairs of its chunk and in the state.
  __device__ __forceinline__ void weigh(const Gate &gates, const Lift &gradient, int head, int stage, bool factors) {
    const float *const numbers = small.numbers[stage][0] + thread;
    const float a = small.coefficients[head][0], error = numbers[C];
    const QueryWeights of = query_weights<T>(a, small.coefficients[head][1], numbers[0], error, numbers[2 * C] * (E::kNarrow ? small.query_down[thread] : 1.f), gradient);
    float carry = 1.f, factor = 1.f;
    if constexpr (GATED) {
      carry = gates.carry(thread);
      if (factors) factor = gates.inverse_leave(thread);
      small.pull[thread] = a * error * summed.up * factor;
      if (head == 0) count *= gates.keep();
    }
    small.mixed[thread] = of.mixed * factor, small.level[thread] = of.level * factor, small.slope[thread] = of.slope * factor;
    weights(0).set(thread, of.mixed * carry), weights(1).set(thread, of.level * carry), weights(2).set(thread, of.slope * carry);
    count += a * error * carry;
  }

  __device__ __forceinline__ void publish(const State &state) const {
    publish_state<T, D>(state, at, Blocks<D>(job.state_tile, down), rounded.up, small.line, lane_id, [&](int row, float sum) { small.column[row] = sum; });
  }

  // A chunk's queries and gradients of one head.
  __device__ __forceinline__ void take_in(State &state, uint32_t q_tile) {
    if constexpr (E::kNarrow) state_lift.change(state, summed);
    const Blocks<D> w_flipped(q_tile + TILE, down, at.flip);
    const uint32_t q_block = Blocks<D>(q_tile, across).at_column(0, at.row), w_block = Blocks<D>(q_tile + TILE, down).at_column(0, at.row);
    if constexpr (kGroups) {
      update_state_by_groups<T, D, 16 * Shape::PAIRS, false, false>(state, at, owns_line, q_block, w_block, q_tile + TILE + Tile<D>::columns_at(2 * at.first), readers.mixed,
                                                                    readers.slope, readers.level);
    } else
#pragma unroll
      for (int block = 0; block < Shape::STRIPES; ++block)
        update_state<T, D, false, false>(state, at, owns_line, q_block, w_block, w_flipped, block, readers.mixed, readers.slope, readers.level);
  }

  // What lies ahead of the segment.
  __device__ __forceinline__ void store(State &state) {
#pragma unroll
    for (int shift = 1; shift < 32; shift *= 2) count += __shfl_xor_sync(0xffffffffu, count, shift);
    __syncthreads();  // the last chunk's counts have been read
    if (lane_id == 0) small.counts[warp] = count;
    __syncthreads();
    count = 0.f;
    for (int w = 0; w < Shape::WARPS; ++w) count += small.counts[w];
    if constexpr (E::kNarrow) state_lift.leave(state);
    if (holds) store_state<D>(state, at, StateView<D>::of_caller(args.grad_initial_state, job.head_pair), count, thread == 0);
  }
};

}  // namespace linattn_stream
