// The kernel that cuts a sequence into segments: the state of every segment alone. tile/scan.cuh adds them up.
#pragma once
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
  int32_t segments, unneeded;                  // unneeded: the segment whose own state nobody asks for, or -1
  int64_t segment_length;
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

// The state of each segment alone: of keys and values (QUERIES false), or of queries and their gradients, summed over the group's heads.
template <typename T, int D, bool QUERIES, bool GATED>
__global__ void __launch_bounds__(SegmentShape<D>::THREADS) segments_kernel(const __grid_constant__ SegmentArguments args) {
  using Shape = SegmentShape<D>;
  constexpr int C = Shape::C, BLOCKS = Shape::BLOCKS, STAGES = Shape::STAGES, TILE = Shape::TILE;
  extern __shared__ __align__(1024) unsigned char shared[];
  using Small = typename Shape::template AllSmall<GATED>;
  Small &small = *reinterpret_cast<Small *>(shared + STAGES * 2 * TILE);
  const auto weights = [&](int i) { return SplitWeights<T>{reinterpret_cast<const T *>(small.high[i]), reinterpret_cast<const T *>(small.low[i])}; };

  const linattn_problem &p = args.problem;
  const int thread = threadIdx.x, lane_id = thread & 31, warp = warp_number();
  const uint32_t down = lane_down<D>(lane_id), across = lane_across<D>(lane_id), tiles = shared_address(shared);
  const int head_pair = blockIdx.x / args.segments, segment = blockIdx.x % args.segments;
  if (segment == args.unneeded) return;
  const int batch = head_pair / p.state_heads, key_head = head_pair % p.state_heads, heads = QUERIES ? p.query_heads / p.state_heads : 1;
  const int first_head = QUERIES ? key_head * heads : key_head / (p.state_heads / p.key_heads);
  const int64_t begin = segment * args.segment_length, end = min(p.length, begin + args.segment_length);
  const int iterations = static_cast<int>((end - begin + C - 1) / C) * heads;
  const linattn_tensor &y = QUERIES ? p.query : p.key, &z = QUERIES ? args.grad_out : p.value;
  const bool unit = p.normalize_qk;

  if constexpr (GATED) {
    small.gates.clear(thread, Shape::THREADS);
    __syncthreads();  // before the first copies into them
  }
  TileCopy<T, D, C, Shape::THREADS> y_copy(head_of<const T>(y, batch, first_head), y.token_stride, begin, thread);
  TileCopy<T, D, C, Shape::THREADS> z_copy(head_of<const T>(z, batch, first_head), z.token_stride, begin, thread);
  int64_t number = (static_cast<int64_t>(batch) * p.query_heads + key_head * heads) * p.length + begin + thread;
  int next_head = 0, next_stage = 0, next_iteration = 0;
  int64_t left = end - begin;
  const auto prefetch = [&]() {
    if (next_iteration < iterations) {
      const int count = static_cast<int>(min(left, static_cast<int64_t>(C)));
      if constexpr (GATED) small.gates.start(args.gates, batch, head_pair, p.length, end - left, count, next_stage, thread);
      y_copy.start(tiles + next_stage * 2 * TILE, count, thread);
      z_copy.start(tiles + next_stage * 2 * TILE + TILE, count, thread);
      if (QUERIES && thread < C) {
        const uint32_t numbers = shared_address(small.numbers[next_stage][0] + thread);
        const bool valid = thread < count;
        copy_number_async(numbers, args.mass + (valid ? number : 0), valid);
        copy_number_async(numbers + 4 * C, args.error + (valid ? number : 0), valid);
        copy_number_async(numbers + 8 * C, args.query_scale + (valid ? number : 0), valid);
      }
      const bool wraps = next_head == heads - 1;
      y_copy.next += wraps ? C * y.token_stride - (heads - 1) * y.head_stride : y.head_stride;
      z_copy.next += wraps ? C * z.token_stride - (heads - 1) * z.head_stride : z.head_stride;
      number += wraps ? C - (heads - 1) * p.length : p.length;
      left -= wraps ? C : 0;
      next_head = wraps ? 0 : next_head + 1;
      next_stage = next_stage == STAGES - 1 ? 0 : next_stage + 1;
    }
    ++next_iteration;
    copy_commit();
  };
#pragma unroll
  for (int i = 0; i < STAGES - 1; ++i) prefetch();

  if (thread < C) small.zeros[thread] = 0;
  if (QUERIES && thread < heads) {
    const int head = key_head * heads + thread;
    small.coefficients[thread][0] = p.coefficients[head], small.coefficients[thread][1] = p.coefficients[p.query_heads + head] * p.coefficients[3 * p.query_heads + head];
  }
  StateTile<T, Shape::PAIRS> state;
  state.clear();
  const int part = Shape::SPLIT > 1 ? warp / BLOCKS : 0;
  const StatePlace<D, (Shape::SPLIT > 1)> at(Shape::SPLIT > 1 ? warp % BLOCKS : warp, part == 0, part, Shape::PAIRS, lane_id);
  const bool owns_line = at.line_block() >= 0;
  const T *const zeros = reinterpret_cast<const T *>(small.zeros);
  const WeightReader<T> scale(weights(0), zeros, lane_id), column_weights(weights(QUERIES ? 2 : 0), zeros, lane_id), line_weights(weights(1), zeros, lane_id);
  float count = 0.f;
  float kept = 1.f;  // of the state ahead of the segment, before this chunk
  StateLift state_lift;  // float16
  int head = 0, stage = 0, tokens_left = static_cast<int>(end - begin);
  for (int iteration = 0; iteration < iterations; ++iteration) {
    const uint32_t y_tile = tiles + stage * 2 * TILE;
    const Blocks<D> y_blocks(y_tile, across), z_flipped(y_tile + TILE, down, at.flip);
    const uint32_t y_block = y_blocks.at_column(0, at.row), z_block = Blocks<D>(y_tile + TILE, down).at_column(0, at.row);
    copy_wait<STAGES - 2>();
    warpgroup_publish();
    __syncthreads();
    if constexpr (GATED) {
      const int32_t *const query_runs = small.gates.query_runs[stage], *const key_runs = small.gates.key_runs[stage];
      if (args.gates.key_runs && any_padding<C>(query_runs, key_runs, thread)) {
        for (int i = 0; i < 2; ++i) zero_padding<D, C, Shape::THREADS>(shared + (2 * stage + i) * TILE, QUERIES ? query_runs : key_runs, thread);
        warpgroup_publish();
        __syncthreads();
      }
    }
    Lift lift{1.f, 1.f};
    if constexpr (Element<T>::kNarrow) {
      lift_rows<T, D, C, Shape::THREADS>(shared + 2 * stage * TILE, QUERIES ? small.query_down : nullptr, thread);
      if constexpr (QUERIES) {
        const DividedByMass<T, D, C, Shape::THREADS> gradient{shared + (2 * stage + 1) * TILE, small.numbers[stage][0], small.numbers[stage][1]};
        gradient.measure(small.peaks, thread);
        __syncthreads();
        lift = lift_to(kStatePeak, peak_of_warps<Shape::WARPS>(small.peaks));
        gradient.divide(lift, thread);
      }
      warpgroup_publish();
      __syncthreads();
    }
    const auto gates = [&]() {
      if constexpr (GATED) return ChunkGates<C>(small.gates, stage, min(tokens_left, C));
      else return 0;
    }();
    prefetch();
    if constexpr (QUERIES) {
      if (thread < C) {
        const float *const numbers = small.numbers[stage][0] + thread;
        const float a = small.coefficients[head][0], error = numbers[C];
        const QueryWeights query =
            query_weights<T>(a, small.coefficients[head][1], numbers[0], error, numbers[2 * C] * (Element<T>::kNarrow ? small.query_down[thread] : 1.f), lift);
        float carry = 1.f;
        if constexpr (GATED) carry = kept * gates.carry(thread);
        weights(0).set(thread, query.mixed * carry), weights(1).set(thread, query.level * carry), weights(2).set(thread, query.slope * carry);
        count += a * error * carry;
      }
    } else if (warp < Shape::STRIPES) {
      float scale0 = 1.f, scale1 = 1.f;
      if (unit) {
        uint32_t rows[BLOCKS][4];
        const Blocks<D> y_rows(y_tile, down);
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block) ldmatrix(rows[block], y_rows.at(0, block) + Tile<D>::rows_at(warp));
        row_products<T>(scale0, scale1, rows, y_blocks, Tile<D>::rows_at(warp), lane_id);
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
    if constexpr (GATED && !QUERIES) scale_state(state, gates.keep());
    if constexpr (QUERIES && Element<T>::kNarrow) state_lift.change(state, chunk_lift(small.coefficients[head], lift));
    __syncthreads();
    if constexpr (kStateByGroups<D>) {
      update_state_by_groups<T, D, D, false, !QUERIES && !GATED>(state, at, owns_line, y_block, z_block, y_tile + TILE, scale, column_weights, line_weights);
    } else
#pragma unroll
      for (int block = 0; block < Shape::STRIPES; ++block)
        update_state<T, D, false, !QUERIES && !GATED>(state, at, owns_line, y_block, z_block, z_flipped, block, scale, column_weights, line_weights);
    head = head == heads - 1 ? 0 : head + 1;
    if constexpr (GATED)
      if (head == 0) kept *= gates.keep(), tokens_left -= C;
    stage = stage == STAGES - 1 ? 0 : stage + 1;
  }
  copy_wait<0>();
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
    count = static_cast<float>(end - begin);
  }
  if constexpr (QUERIES && Element<T>::kNarrow) state_lift.leave(state);
  store_state<D>(state, at, StateView<D>::of_segment(args.states, head_pair, args.segments, segment), count, thread == 0);
}

}  // namespace linattn_stream
