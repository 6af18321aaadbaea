// The kernel that cuts a sequence into segments: the state of every segment alone. tile/scan.cuh adds them up.
#pragma once
#include "stream/cut.h"
#include "tile/gates.cuh"
#include "tile/range.cuh"
#include "tile/state.cuh"

namespace linattn_stream {

using namespace linattn_tile;

struct SegmentArguments {
  linattn_problem problem;
  linattn_tensor grad_out;                     // of queries only, as the three below
  const float *mass, *error, *query_scale;
  float *states;
  int32_t segments, each, unneeded;            // each: of a tile of rows; unneeded: the tile whose segments' own states nobody asks for, or -1
  int64_t segment_length, tile_length;
  Gates gates;
  float *keeps;                                // what each segment leaves of the state ahead of it, (batch, state heads, segments)
};

// Per query token, what the column kernel and its states weigh by: see there. In float16 dO is divided by g already, `query_scale` is that of
// the lifted query, the coefficients are lifted, and e is as dO is, in units of kSlopeWorth.
struct QueryWeights {
  float mixed, level, slope;  // b tau / (|q| g), a / g, b tau e / |q|
};
template <typename T> __device__ __forceinline__ QueryWeights query_weights(float a, float b_tau, float mass, float error, float query_scale, const Lift &gradient) {
  if constexpr (Element<T>::kNarrow) {
    const float lift = coefficient_lift(a, b_tau).up;
    return {b_tau * lift * query_scale, a * lift, b_tau * lift * query_scale * (error * gradient.up / kSlopeWorth)};
  }
  const float inverse = mass == 0.f ? 0.f : reciprocal(mass);
  return {b_tau * query_scale * inverse, a * inverse, b_tau * query_scale * error};
}

template <int D> struct SegmentShape {
  static constexpr int C = D == 32 || D == 128 ? 64 : D;
  static constexpr int STRIPES = C / 16, BLOCKS = D / 16;
  static constexpr int WARPS = D == 128 ? 8 : STRIPES;
  static constexpr int THREADS = 32 * WARPS;
  static constexpr int SPLIT = WARPS / BLOCKS, PAIRS = BLOCKS / SPLIT;
  static constexpr int STAGES = 3, TILE = C * D * 2;
  static constexpr int MIN_BLOCKS = segment_blocks(D);
  struct Small {
    alignas(16) uint16_t high[3][C], low[3][C], zeros[C];
    alignas(16) float numbers[STAGES][3][C];
    float counts[WARPS], coefficients[kMaxGroup][2];
    float peaks[WARPS], query_down[C];  // float16
  };
  struct GatedSmall : Small {
    GateTiles<C, STAGES> gates;
  };
  template <bool GATED> using AllSmall = std::conditional_t<GATED, GatedSmall, Small>;
  template <bool GATED> static constexpr int SHARED = STAGES * 2 * TILE + static_cast<int>(sizeof(AllSmall<GATED>));
};

// What all threads of a block know of it: where its heads and its segment lie.
template <typename T, int D, bool QUERIES, bool GATED> struct SegmentBlock {
  using Shape = SegmentShape<D>;
  using Small = typename Shape::template AllSmall<GATED>;

  const SegmentArguments &args;
  unsigned char *const shared;
  Small &small;
  const int head_pair, segment, batch, key_head, heads, first_head;
  const int64_t begin, end;
  const int iterations;  // chunks times the group's query heads
  const linattn_tensor &y, &z;

  __device__ __forceinline__ SegmentBlock(const SegmentArguments &args, unsigned char *shared, int head_pair, int segment)
      : args(args), shared(shared), small(*reinterpret_cast<Small *>(shared + Shape::STAGES * 2 * Shape::TILE)), head_pair(head_pair), segment(segment),
        batch(head_pair / args.problem.state_heads), key_head(head_pair % args.problem.state_heads), heads(QUERIES ? args.problem.query_heads / args.problem.state_heads : 1),
        first_head(QUERIES ? key_head * heads : key_head / (args.problem.state_heads / args.problem.key_heads)),
        begin(segment / args.each * args.tile_length + segment % args.each * args.segment_length),
        end(max(begin, min(args.problem.length, min(begin + args.segment_length, (segment / args.each + 1) * args.tile_length)))),
        iterations(static_cast<int>((end - begin + Shape::C - 1) / Shape::C) * heads), y(QUERIES ? args.problem.query : args.problem.key),
        z(QUERIES ? args.grad_out : args.problem.value) {}
};

// What a block fetches, ahead of the products: rows of both tensors, and beside queries the numbers that weigh them.
template <typename T, int D, bool QUERIES, bool GATED> struct SegmentCopies {
  using Block = SegmentBlock<T, D, QUERIES, GATED>;
  using Shape = typename Block::Shape;
  using Copy = TileCopy<T, D, Shape::C, Shape::THREADS>;
  static constexpr int C = Shape::C, STAGES = Shape::STAGES, TILE = Shape::TILE;

  const Block &job;
  const SegmentArguments &args;
  const linattn_problem &p;
  const linattn_tensor &y, &z;
  const int thread, heads;
  const uint32_t tiles;
  int64_t left;
  int iteration = 0, head = 0, stage = 0;

  __device__ __forceinline__ explicit SegmentCopies(const Block &job)
      : job(job), args(job.args), p(args.problem), y(job.y), z(job.z), thread(threadIdx.x), heads(job.heads), tiles(shared_address(job.shared)), left(job.end - job.begin) {}

  // The next chunk and head, if there is one.
  __device__ __forceinline__ void prefetch() {
    if (iteration < job.iterations) {
      const int count = static_cast<int>(min(left, static_cast<int64_t>(C)));
      if constexpr (GATED) job.small.gates.start(args.gates, job.batch, job.head_pair, p.length, job.end - left, count, stage, thread);
      Copy::start(tiles + stage * 2 * TILE, y, job.batch, job.first_head + head, job.end - left, count, thread);
      Copy::start(tiles + stage * 2 * TILE + TILE, z, job.batch, job.first_head + head, job.end - left, count, thread);
      if (QUERIES && thread < C) start_numbers(count);
      stage = stage == STAGES - 1 ? 0 : stage + 1;
      if (++head == heads) head = 0, left -= C;
    }
    ++iteration;
    copy_commit();
  }

  __device__ __forceinline__ void start_numbers(int count) const {
    const uint32_t numbers = shared_address(job.small.numbers[stage][0] + thread);
    const bool valid = thread < count;
    const int64_t number = (static_cast<int64_t>(job.batch) * p.query_heads + job.first_head + head) * p.length + job.end - left + thread;
    copy_number_async(numbers, args.mass + (valid ? number : 0), valid);
    copy_number_async(numbers + 4 * C, args.error + (valid ? number : 0), valid);
    copy_number_async(numbers + 8 * C, args.query_scale + (valid ? number : 0), valid);
  }
};

// What a lane reads of the tokens' weights: in the sum of products, and in either margin.
template <typename T> struct SegmentReaders {
  const WeightReader<T> scale, column, line;
  __device__ __forceinline__ SegmentReaders(const SplitWeights<T> &products, const SplitWeights<T> &columns, const SplitWeights<T> &lines, const T *zeros, int lane)
      : scale(products, zeros, lane), column(columns, zeros, lane), line(lines, zeros, lane) {}
};

// A warp's part in the state of its block's segment, of keys and values (QUERIES false), or of queries and their gradients, summed over the
// group's heads. Every step is made part of `run`, and every member is a register.
template <typename T, int D, bool QUERIES, bool GATED> struct SegmentState {
  using Block = SegmentBlock<T, D, QUERIES, GATED>;
  using Shape = typename Block::Shape;
  using State = StateTile<T, Shape::PAIRS>;
  using Place = StatePlace<D, (Shape::SPLIT > 1)>;
  using E = Element<T>;
  using Gate = std::conditional_t<GATED, ChunkGates<Shape::C>, int>;
  static constexpr int C = Shape::C, BLOCKS = Shape::BLOCKS, STAGES = Shape::STAGES, TILE = Shape::TILE;

  const Block &job;
  const SegmentArguments &args;
  const linattn_problem &p;
  typename Block::Small &small;
  const int thread, lane_id, warp, heads;
  const uint32_t down, across;
  const bool unit;
  StateLift state_lift;           // float16
  float count = 0.f, kept = 1.f;  // kept: of the state ahead of the segment, before this chunk
  int head = 0, stage = 0, tokens_left;

  __device__ __forceinline__ explicit SegmentState(const Block &job)
      : job(job), args(job.args), p(args.problem), small(job.small), thread(threadIdx.x), lane_id(thread & 31), warp(warp_number()), heads(job.heads), down(lane_down<D>(lane_id)),
        across(lane_across<D>(lane_id)), unit(p.normalize_qk), tokens_left(static_cast<int>(job.end - job.begin)) {}

  __device__ __forceinline__ SplitWeights<T> weights(int i) const { return {reinterpret_cast<const T *>(small.high[i]), reinterpret_cast<const T *>(small.low[i])}; }

  __device__ __forceinline__ void run() {
    SegmentCopies<T, D, QUERIES, GATED> copies(job);
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) copies.prefetch();
    fill();
    State state;
    state.clear();
    const int part = Shape::SPLIT > 1 ? warp / BLOCKS : 0;
    const Place at(Shape::SPLIT > 1 ? warp % BLOCKS : warp, part == 0, part, Shape::PAIRS, lane_id);
    const bool owns_line = at.line_block() >= 0;
    const SegmentReaders<T> readers(weights(0), weights(QUERIES ? 2 : 0), weights(1), reinterpret_cast<const T *>(small.zeros), lane_id);
    for (int iteration = 0; iteration < job.iterations; ++iteration) {
      const uint32_t y_tile = copies.tiles + stage * 2 * TILE, z_tile = y_tile + TILE;
      const Blocks<D> z_flipped(z_tile, down, at.flip);
      const uint32_t y_block = Blocks<D>(y_tile, across).at_column(0, at.row), z_block = Blocks<D>(z_tile, down).at_column(0, at.row);
      copy_wait<STAGES - 2>();
      warpgroup_publish();
      arrive();
      const Lift lift = lift_tiles();
      const Gate gates = gates_of_chunk();
      copies.prefetch();
      if constexpr (QUERIES) weigh_queries(gates, lift);
      else if (warp < Shape::STRIPES) weigh_keys(gates, y_tile);
      if constexpr (GATED && !QUERIES) scale_state(state, gates.keep());
      if constexpr (QUERIES && E::kNarrow) state_lift.change(state, chunk_lift(small.coefficients[head], lift));
      __syncthreads();
      if constexpr (kStateByGroups<D>) {
        update_state_by_groups<T, D, D, false, !QUERIES && !GATED>(state, at, owns_line, y_block, z_block, z_tile, readers.scale, readers.column, readers.line);
      } else
#pragma unroll
        for (int block = 0; block < Shape::STRIPES; ++block)
          update_state<T, D, false, !QUERIES && !GATED>(state, at, owns_line, y_block, z_block, z_flipped, block, readers.scale, readers.column, readers.line);
      head = head == heads - 1 ? 0 : head + 1;
      if constexpr (GATED)
        if (head == 0) kept *= gates.keep(), tokens_left -= C;
      stage = stage == STAGES - 1 ? 0 : stage + 1;
    }
    copy_wait<0>();
    add_counts();
    if constexpr (QUERIES && E::kNarrow) state_lift.leave(state);
    store_state<D>(state, at, StateView<D>::of_segment(args.states, job.head_pair, args.segments, job.segment), count, thread == 0);
  }

  // The zeros that readers take, and the coefficients of the group's heads.
  __device__ __forceinline__ void fill() const {
    if (thread < C) small.zeros[thread] = 0;
    if (QUERIES && thread < heads) {
      const int head = job.key_head * heads + thread;
      small.coefficients[thread][0] = p.coefficients[head], small.coefficients[thread][1] = p.coefficients[p.query_heads + head] * p.coefficients[3 * p.query_heads + head];
    }
  }

  // Behind this the tiles are here, and padding reads as zero.
  __device__ __forceinline__ void arrive() const {
    if constexpr (GATED) {
      if (small.gates.arrive(args.gates, stage, min(tokens_left, C), thread)) {
        const int32_t *const runs = QUERIES ? small.gates.query_runs[stage] : small.gates.key_runs[stage];
        for (int i = 0; i < 2; ++i) zero_padding<D, C, Shape::THREADS>(job.shared + (2 * stage + i) * TILE, runs, thread);
        warpgroup_publish();
        __syncthreads();
      }
    } else {
      __syncthreads();
    }
  }

  // float16: rows and gradients are brought into its range; what the gradients were lifted by.
  __device__ __forceinline__ Lift lift_tiles() const {
    Lift lift{1.f, 1.f};
    if constexpr (E::kNarrow) {
      lift_rows<T, D, C, Shape::THREADS>(job.shared + 2 * stage * TILE, QUERIES ? small.query_down : nullptr, thread);
      if constexpr (QUERIES) {
        const DividedByMass<T, D, C, Shape::THREADS> gradient{job.shared + (2 * stage + 1) * TILE, small.numbers[stage][0], small.numbers[stage][1]};
        gradient.measure(small.peaks, thread);
        __syncthreads();
        lift = lift_to(kStatePeak, peak_of_warps<Shape::WARPS>(small.peaks));
        gradient.divide(lift, thread);
      }
      warpgroup_publish();
      __syncthreads();
    }
    return lift;
  }

  __device__ __forceinline__ Gate gates_of_chunk() const {
    if constexpr (GATED) return ChunkGates<C>(small.gates, stage, min(tokens_left, C));
    else return 0;
  }

  __device__ __forceinline__ void weigh_queries(const Gate &gates, const Lift &lift) {
    if (thread < C) {
      const float *const numbers = small.numbers[stage][0] + thread;
      const float a = small.coefficients[head][0], error = numbers[C];
      const QueryWeights query = query_weights<T>(a, small.coefficients[head][1], numbers[0], error, numbers[2 * C] * (E::kNarrow ? small.query_down[thread] : 1.f), lift);
      float carry = 1.f;
      if constexpr (GATED) carry = kept * gates.carry(thread);
      weights(0).set(thread, query.mixed * carry), weights(1).set(thread, query.level * carry), weights(2).set(thread, query.slope * carry);
      count += a * error * carry;
    }
  }

  // A warp weighs 16 keys: by 1 / |k|, and by what each of them leaves in the state behind the chunk.
  __device__ __forceinline__ void weigh_keys(const Gate &gates, uint32_t y_tile) {
    float scale0 = 1.f, scale1 = 1.f;
    if (unit) {
      uint32_t rows[BLOCKS][4];
      const Blocks<D> y_rows(y_tile, down);
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block) ldmatrix(rows[block], y_rows.at(0, block) + Tile<D>::rows_at(warp));
      row_squares<T>(scale0, scale1, rows, lane_id);
      scale0 = inverse_norm(scale0), scale1 = inverse_norm(scale1);
    }
    if ((lane_id & 3) == 0) {
      const int local = 16 * warp + (lane_id >> 2);
      if constexpr (GATED) {
        const float leave0 = gates.leave(local), leave1 = gates.leave(local + 8);
        weights(1).set(local, leave0), weights(1).set(local + 8, leave1);
        scale0 *= leave0, scale1 *= leave1;
        count = count * gates.keep() + (leave0 + leave1);
      }
      weights(0).set(local, scale0), weights(0).set(local + 8, scale1);
    }
  }

  // The threads' counts become that of the segment.
  __device__ __forceinline__ void add_counts() {
    if constexpr (GATED)
      if (thread == 0) args.keeps[blockIdx.x] = kept;
    if constexpr (QUERIES || GATED) {
#pragma unroll
      for (int step = 1; step < 32; step *= 2) count += __shfl_xor_sync(0xffffffffu, count, step);
      if (lane_id == 0) small.counts[warp] = count;
      __syncthreads();
      count = 0.f;
      for (int w = 0; w < Shape::WARPS; ++w) count += small.counts[w];
    } else {
      count = static_cast<float>(job.end - job.begin);
    }
  }
};

template <typename T, int D, bool QUERIES, bool GATED>
__global__ void __launch_bounds__(SegmentShape<D>::THREADS, SegmentShape<D>::MIN_BLOCKS) segments_kernel(const __grid_constant__ SegmentArguments args) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const int head_pair = blockIdx.x / args.segments, segment = blockIdx.x % args.segments;
  if (segment / args.each == args.unneeded) return;
  const SegmentBlock<T, D, QUERIES, GATED> job(args, shared, head_pair, segment);
  if constexpr (GATED) {
    job.small.gates.clear(args.gates, job.key_head, threadIdx.x, SegmentShape<D>::THREADS);
    __syncthreads();  // before the first copies into them
  }
  SegmentState<T, D, QUERIES, GATED>(job).run();
}

}  // namespace linattn_stream
