// The forward direction in n: o (forward) or dq (backward), one block a (batch, key head, segment), chunk after chunk.
//
// Both are the same sums with other names. With x the row operand, y the key operand, z the value operand and r_n = 1 / |k_n|:
//   forward   x = q, y = k, z = v:   o_i  g_i = sum_n (a + alpha_i (x_i . y_n) r_n) z_n           alpha_i = b tau / |q_i|
//   gradient  x = W, y = v, z = k:   dq^_i    = b tau sum_n ((x_i . y_n) / g_i + e_i) r_n z_n
// Inside a chunk through the masked matrix of pairs, before it through the state sum_n r_n y_n z_n^T (float32 in registers, rounded once a chunk).
#pragma once
#include <type_traits>

#include "mma_gates.cuh"
#include "mma_noise.cuh"
#include "mma_range.cuh"
#include "mma_state.cuh"

namespace linattn_mma {

struct RowArguments {
  linattn_problem problem;
  linattn_tensor out, grad_out, result;   // out and grad_out: gradient only; result: out, or grad_query
  float *mass_out;                        // forward
  const float *mass, *grad_mass;          // gradient
  float *error, *query_scale;             // gradient: e_i and 1 / |q_i|, (batch, query_heads, length), for the column kernel
  float *partials;                        // gradient: (batch, query_heads, segments, 2): sums of dA and of dA q^.k^
  const float *states;                    // of each segment's beginning, or null: initial_state or nothing
  float *final_state;                     // forward, or null
  int32_t segments;
  int64_t segment_length;
  Gates gates;
  bool noised;                            // gradient: grad_out holds W times the noise, and error what W itself gave
  float *row_sums;                        // gradient: (batch, query_heads, length): sum of A dA over the row's keys, or null
  float *final_sums;                      // gradient: the state behind the last token, transposed, as the workspace holds states, or null
};

// Two kinds of warps: some compute a stripe of 16 rows of results each, the others copy, scale and keep the state, 16 rows of it each.
template <int D, bool GRAD, bool GATED> struct RowShape {
  static constexpr int C = D == 32 || D == 128 ? 64 : D;
  static constexpr int STRIPES = C / 16, BLOCKS = D / 16;  // 16-wide blocks along the tokens and along D
  static constexpr int HALVES = D == 128 ? 2 : 1;          // warps that share out the columns of a stripe's results
  static constexpr int RESULT_WARPS = STRIPES * HALVES, STATE_WARPS = BLOCKS, WARPS = RESULT_WARPS + STATE_WARPS;
  static constexpr int STATE_THREADS = 32 * STATE_WARPS, THREADS = 32 * WARPS;
  static constexpr int OUT_PAIRS = BLOCKS / HALVES;
  static constexpr int STAGES = 2;
  static constexpr int ROW_TILES = GRAD ? 3 : 1;           // x; and o, q for the gradient
  static constexpr int TILE = C * D * 2;
  static constexpr int STATE_TILE = D * D * 2;
  static constexpr int MIN_BLOCKS = D == 32 ? 4 : D == 64 ? 2 : 1;
  struct Small {
    alignas(16) float key_scale[C], line[D], numbers[STAGES][2][C], exchange[2][C];
    alignas(16) uint16_t key_high[C], key_low[C], column_high[D], column_low[D], zeros[C > D ? C : D];
    float totals[STRIPES][kMaxGroup][2], coefficients[kMaxGroup][2];
    float peaks[STATE_WARPS], state_worth;  // of the state's rounded elements
  };
  struct GatedSmall : Small {
    GateTiles<C, STAGES> gates;
    alignas(16) float key_gates[STRIPES][C];  // of earlier keys at the edge where a stripe of rows begins
    alignas(16) uint16_t leave_high[C], leave_low[C];
    alignas(16) float leave[C];
    float count;
  };
  using AllSmall = std::conditional_t<GATED, GatedSmall, Small>;
  static constexpr int SHARED = STAGES * (ROW_TILES + 2) * TILE + STATE_TILE + static_cast<int>(sizeof(AllSmall));
};

template <typename T, int D, bool GRAD, bool GATED>
__global__ void __launch_bounds__(RowShape<D, GRAD, GATED>::THREADS, RowShape<D, GRAD, GATED>::MIN_BLOCKS)
rows_kernel(const __grid_constant__ RowArguments args) {
  using Shape = RowShape<D, GRAD, GATED>;
  using E = Element<T>;
  constexpr int C = Shape::C, BLOCKS = Shape::BLOCKS, OUT_PAIRS = Shape::OUT_PAIRS;
  constexpr int STAGES = Shape::STAGES, TILE = Shape::TILE, ROW_TILES = Shape::ROW_TILES;
  constexpr int kStripeBytes = Tile<D>::kBlockBytes;
  constexpr bool kGroups = kWarpgroups<D>;
  extern __shared__ __align__(1024) unsigned char shared[];
  typename Shape::AllSmall &small = *reinterpret_cast<typename Shape::AllSmall *>(shared + STAGES * (ROW_TILES + 2) * TILE + Shape::STATE_TILE);
  const SplitWeights<T> key_weights{reinterpret_cast<T *>(small.key_high), reinterpret_cast<T *>(small.key_low)};
  const SplitWeights<T> column_parts{reinterpret_cast<T *>(small.column_high), reinterpret_cast<T *>(small.column_low)};
  const auto leave_weights = [&]() {
    if constexpr (GATED) return SplitWeights<T>{reinterpret_cast<T *>(small.leave_high), reinterpret_cast<T *>(small.leave_low)};
    else return key_weights;
  };

  const linattn_problem &p = args.problem;
  const int thread = threadIdx.x, lane_id = thread & 31, warp = warp_number(), group = lane_id >> 2, place = lane_id & 3;
  const uint32_t down = lane_down<D>(lane_id), across = lane_across<D>(lane_id);
  const uint32_t row_tiles = shared_address(shared);                               // (stage, ROW_TILES)
  const uint32_t key_tiles = row_tiles + STAGES * ROW_TILES * TILE;                // (stage, y and z)
  const uint32_t state_tile = key_tiles + STAGES * 2 * TILE;

  const int head_pair = blockIdx.x / args.segments, segment = blockIdx.x % args.segments;
  const int batch = head_pair / p.state_heads, key_head = head_pair % p.state_heads, heads = p.query_heads / p.state_heads;
  const int memory_head = key_head / (p.state_heads / p.key_heads);  // whose keys and values these are
  const int64_t begin = segment * args.segment_length, end = min(p.length, begin + args.segment_length);
  const int iterations = static_cast<int>((end - begin + C - 1) / C) * heads;
  const bool causal = p.causal, unit = p.normalize_qk;
  const StateView<D> source = args.states ? StateView<D>::of_segment(args.states, head_pair, args.segments, causal ? segment : 0)
                                          : StateView<D>::of_caller(p.initial_state, head_pair);
  const T *const zeros = reinterpret_cast<const T *>(small.zeros);
  for (int i = thread; i < (C > D ? C : D); i += Shape::THREADS) small.zeros[i] = 0;
  for (int i = thread; i < Shape::STRIPES * kMaxGroup * 2; i += Shape::THREADS) (&small.totals[0][0][0])[i] = 0.f;
  if (GRAD && !args.grad_mass)
    for (int i = thread; i < STAGES * C; i += Shape::THREADS) small.numbers[i / C][1][i % C] = 0.f;
  if (thread < heads) {
    const int head = key_head * heads + thread;
    small.coefficients[thread][0] = p.coefficients[head], small.coefficients[thread][1] = p.coefficients[p.query_heads + head] * p.coefficients[3 * p.query_heads + head];
  }
  if constexpr (GATED) {
    small.gates.clear(thread, Shape::THREADS);
    __syncthreads();  // before the first copies into them
  }
  // Behind the barrier at the top of an iteration: the copies have arrived, and are made what the products take.
  const auto prepare = [&](int stage, int key_stage, bool fresh_keys) {
    unsigned char *const row_tile = shared + stage * ROW_TILES * TILE, *const key_tile = shared + STAGES * ROW_TILES * TILE + key_stage * 2 * TILE;
    if constexpr (GATED) {
      if (args.gates.key_runs && any_padding<C>(small.gates.query_runs[key_stage], small.gates.key_runs[key_stage], thread)) {
        for (int i = 0; i < ROW_TILES; ++i) zero_padding<D, C, Shape::THREADS>(row_tile + i * TILE, small.gates.query_runs[key_stage], thread);
        if (fresh_keys)
          for (int i = 0; i < 2; ++i) zero_padding<D, C, Shape::THREADS>(key_tile + i * TILE, small.gates.key_runs[key_stage], thread);
        warpgroup_publish();
        __syncthreads();
      }
    }
    if constexpr (E::kNarrow)
      if (fresh_keys) {
        lift_rows<T, D, C, Shape::THREADS>(key_tile + (GRAD ? TILE : 0), nullptr, thread);
        warpgroup_publish();
        __syncthreads();
      }
  };

  if (warp >= Shape::RESULT_WARPS) {
    const int helper = thread - 32 * Shape::RESULT_WARPS;
    const linattn_tensor &x = GRAD ? args.grad_out : p.query, &y = GRAD ? p.value : p.key, &z = GRAD ? p.key : p.value;
    using Copy = TileCopy<T, D, C, Shape::STATE_THREADS>;
    Copy x_copy(head_of<const T>(x, batch, key_head * heads), x.token_stride, begin, helper);
    Copy y_copy(head_of<const T>(y, batch, memory_head), y.token_stride, begin, helper);
    Copy z_copy(head_of<const T>(z, batch, memory_head), z.token_stride, begin, helper);
    Copy o_copy(head_of<const T>(GRAD ? args.out : x, batch, key_head * heads), GRAD ? args.out.token_stride : 0, begin, helper);
    Copy q_copy(head_of<const T>(p.query, batch, key_head * heads), p.query.token_stride, begin, helper);
    int64_t next_number = (static_cast<int64_t>(batch) * p.query_heads + key_head * heads) * p.length + begin + helper, next_left = end - begin;
    int next_iteration = 0, next_head = 0, next_stage = 0, next_key_stage = 0;

    const auto prefetch = [&]() {
      if (next_iteration < iterations) {
        const int count = static_cast<int>(min(next_left, static_cast<int64_t>(C)));
        const uint32_t rows = row_tiles + next_stage * ROW_TILES * TILE;
        if (causal && next_head == 0) {
          const uint32_t keys = key_tiles + next_key_stage * 2 * TILE;
          y_copy.start(keys, count, helper);
          z_copy.start(keys + TILE, count, helper);
          y_copy.next += C * y.token_stride, z_copy.next += C * z.token_stride;
        }
        if constexpr (GATED)
          if (next_head == 0) small.gates.start(args.gates, batch, head_pair, p.length, end - next_left, count, next_key_stage, helper);
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
    const WeightReader<T> key_reader(key_weights, zeros, lane_id);
    StateTile<T, BLOCKS> state;
    float count = load_state<D>(state, at, source, GRAD);
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
      publish_state<T, D>(state, at, Blocks<D>(state_tile, down), lift, small.line, lane_id, [&](int row, float sum) { column_parts.set(row, sum * lift); });
    };
    publish();
    int head = 0, stage = 0, key_stage = 0;
    for (int iteration = 0; iteration < iterations; ++iteration) {
      const uint32_t y_tile = key_tiles + key_stage * 2 * TILE, z_tile = y_tile + TILE;
      copy_wait<STAGES - 2>();
      warpgroup_publish();
      __syncthreads();  // the tiles and the rounded state are here, and nobody reads the tiles that the next copies overwrite
      prepare(stage, key_stage, causal && head == 0);
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
              leave_weights().set(local, leave0), leave_weights().set(local + 8, leave1);
              scale0 *= leave0, scale1 *= leave1;
            }
            key_weights.set(local, scale0), key_weights.set(local + 8, scale1);
          }
        }
        if constexpr (GATED) {
          const ChunkGates<C> gates(small.gates, key_stage, min(tokens_left, C));
          for (int i = helper; i < Shape::STRIPES * C; i += Shape::STATE_THREADS)
            if (i % C < i / C * 16) small.key_gates[i / C][i % C] = Edge(gates, i / C * 16).to_key(gates.key_runs, i % C);
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
        const WeightReader<T> leave_reader(leave_weights(), zeros, lane_id);
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
      if (args.final_state && segment == args.segments - 1)
        store_state<D>(state, at, StateView<D>::of_caller(args.final_state, head_pair), count + (causal && !GATED ? static_cast<float>(end - begin) : 0.f), helper == 0);
    }
    if constexpr (GRAD && GATED)
      if (args.final_sums && segment == args.segments - 1) store_state<D>(state, at, StateView<D>::of_segment(args.final_sums, head_pair, 1, 0), count, helper == 0);
    if constexpr (GRAD) __syncthreads();
    return;
  }

  T *result_rows = head_of<T>(args.result, batch, key_head * heads) + begin * args.result.token_stride;
  int64_t first_number = (static_cast<int64_t>(batch) * p.query_heads + key_head * heads) * p.length + begin, left = end - begin;
  float before = source.data ? source.count() : 0.f;
  const int half = Shape::HALVES > 1 ? warp / Shape::STRIPES : 0;
  const int first_block = half * OUT_PAIRS;
  const uint32_t half_bytes = Tile<D>::columns_at(2 * first_block);
  const T *const column_vector = WeightReader<T>(column_parts, zeros, lane_id).vector;
  int head = 0, stage = 0, key_stage = 0;
  // Later stripes see more keys; turning them every chunk evens the load of the four schedulers.
  int stripe = half && !kGroups ? Shape::STRIPES - 1 - warp % Shape::STRIPES : warp % Shape::STRIPES;
  for (int iteration = 0; iteration < iterations; ++iteration) {
    const int tokens = static_cast<int>(min(left, static_cast<int64_t>(C)));
    const int local0 = 16 * stripe + group, local1 = local0 + 8;
    const uint32_t rows = row_tiles + stage * ROW_TILES * TILE, y_tile = key_tiles + key_stage * 2 * TILE, z_tile = y_tile + TILE;
    const Blocks<D> y_blocks(y_tile, across), z_blocks(z_tile + half_bytes, down);

    __syncthreads();  // the tiles and the rounded state are here
    prepare(stage, key_stage, causal && head == 0);
    float carry0 = 1.f, carry1 = 1.f, row_gate0 = 1.f, row_gate1 = 1.f;
    if constexpr (GATED) {
      const ChunkGates<C> gates(small.gates, key_stage, tokens);
      const Edge edge(gates, 16 * stripe);
      carry0 = gates.carry(local0), carry1 = gates.carry(local1), before = small.count;
      row_gate0 = edge.from_query(gates.query_runs, local0), row_gate1 = edge.from_query(gates.query_runs, local1);
    }
    const auto pair_gates = [&]() {
      if constexpr (GATED) return PairGates(small.gates.decay[key_stage], small.gates.query_runs[key_stage], local0, local1);
      else return 0;
    }();
    uint32_t xs[BLOCKS][4];
    const Blocks<D> x_blocks(rows + stripe * kStripeBytes, down), x_across(rows + stripe * kStripeBytes, across);
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) ldmatrix(xs[block], x_blocks.at(0, block));

    float margin[4] = {0, 0, 0, 0};
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) {
      uint32_t b0, b1;
      WeightReader<T>::two(b0, b1, column_vector, 16 * block);
      E::mma(margin, xs[block], b0, b1);
    }

    // Per row: weight = slope (x . y) + shift; in the gradient with slope 1, the row's own 1 / g left for the end.
    float a = small.coefficients[head][0], b_tau = small.coefficients[head][1], mass_worth = 1.f;
    if constexpr (E::kNarrow && !GRAD) {
      const Lift lift = lift_to(0, fmaxf(fabsf(a), fabsf(b_tau)));
      a *= lift.up, b_tau *= lift.up, mass_worth = lift.down;
    }
    float slope0, slope1, shift0, shift1, query_scale0 = 1.f, query_scale1 = 1.f;
    if constexpr (!GRAD) {
      if (unit) {
        row_products<T>(query_scale0, query_scale1, xs, x_across, 0, lane_id);
        query_scale0 = inverse_norm(query_scale0), query_scale1 = inverse_norm(query_scale1);
      }
      slope0 = b_tau * query_scale0, slope1 = b_tau * query_scale1;
      shift0 = shift1 = a;
    } else {
      row_products<T>(shift0, shift1, xs, x_across, TILE, lane_id);
      const float mass0 = small.numbers[stage][0][local0], mass1 = small.numbers[stage][0][local1];
      slope0 = mass0 == 0.f ? 0.f : reciprocal(mass0), slope1 = mass1 == 0.f ? 0.f : reciprocal(mass1);
      shift0 = small.numbers[stage][1][local0] * mass0 - shift0, shift1 = small.numbers[stage][1][local1] * mass1 - shift1;
      if constexpr (GATED) {
        if (args.noised) shift0 = local0 < tokens ? args.error[first_number + local0] * mass0 : 0.f, shift1 = local1 < tokens ? args.error[first_number + local1] * mass1 : 0.f;
        shift0 = mass0 == 0.f ? 0.f : shift0, shift1 = mass1 == 0.f ? 0.f : shift1;  // padding's gradient may be NaN
      }
      if (unit) {
        uint32_t q[BLOCKS][4];
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block) ldmatrix(q[block], x_blocks.at(0, block) + 2 * TILE);
        row_products<T>(query_scale0, query_scale1, q, x_across, 2 * TILE, lane_id);
        query_scale0 = inverse_norm(query_scale0), query_scale1 = inverse_norm(query_scale1);
      }
    }
    // What products with x count: inside the chunk, and with the rounded state.
    float factor0 = GRAD ? 1.f : slope0, factor1 = GRAD ? 1.f : slope1, state_worth = 1.f;
    if constexpr (E::kNarrow) {
      state_worth = small.state_worth;
      if constexpr (GRAD) {
        float peak0, peak1;
        row_peaks<T>(peak0, peak1, xs);
        const Lift lift0 = lift_to(kRowPeak, fmaxf(peak0, fabsf(shift0))), lift1 = lift_to(kRowPeak, fmaxf(peak1, fabsf(shift1)));
        factor0 = lift0.up, shift0 *= lift0.up, slope0 *= lift0.down;
        factor1 = lift1.up, shift1 *= lift1.up, slope1 *= lift1.down;
      }
    }
    constexpr bool kFactors = !GRAD || E::kNarrow;

    float acc[2 * OUT_PAIRS][4];
#pragma unroll
    for (int q = 0; q < OUT_PAIRS; ++q)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[2 * q][i] = acc[2 * q + 1][i] = 0.f;
    // By warpgroups the scores of all keys at once, beside the product with the state; other head dims later and in two parts, for want of registers.
    constexpr bool kBeside = kGroups && D == 64;
    float scores[kBeside ? 2 * Shape::STRIPES : 1][4];
    uint32_t weights_of[kBeside ? Shape::STRIPES : 1][4];
    float row_sum[4] = {0, 0, 0, 0};
    if constexpr (kGroups) {
      warpgroup_keep(acc);
      if constexpr (kBeside) {
        warpgroup_keep(scores);
        warpgroup_begin();
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block)
          WarpgroupProduct<T, 64, false>::run(scores, warpgroup_operand<D>(rows + Tile<D>::columns_at(2 * block)), warpgroup_operand<D>(y_tile + Tile<D>::columns_at(2 * block)), block > 0);
        warpgroup_commit();
      } else {
        warpgroup_begin();
      }
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block)
        WarpgroupProduct<T, 16 * OUT_PAIRS, true>::run(acc, warpgroup_operand<D>(rows + Tile<D>::columns_at(2 * block)), warpgroup_operand<D>(state_tile + Tile<D>::rows_at(block) + half_bytes, Tile<D>::kPanelBytes), block > 0);
      warpgroup_commit();
      if constexpr (!kBeside) {
        warpgroup_wait<0>();
        warpgroup_keep(acc);
      }
    } else {
      const Blocks<D> state_blocks(state_tile + half_bytes, down);
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block)
#pragma unroll
        for (int q = 0; q < OUT_PAIRS; ++q) {
          uint32_t s[4];
          ldmatrix_transposed(s, state_blocks.at(block, q));
          E::mma(acc[2 * q], xs[block], s[0], s[1]);
          E::mma(acc[2 * q + 1], xs[block], s[2], s[3]);
        }
    }
    // Raw products of 16 keys into their rounded weights.
    const auto weigh = [&](uint32_t(&weights)[4], float(&first_tile)[4], float(&second_tile)[4], bool diagonal, int j) {
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        float(&s)[4] = t == 0 ? first_tile : second_tile;
        const int column = 8 * t + 2 * place;
        const float2 scale = *reinterpret_cast<const float2 *>(small.key_scale + 16 * j + column);
        if constexpr (GRAD) {
          if constexpr (kFactors) s[0] *= factor0, s[1] *= factor0, s[2] *= factor1, s[3] *= factor1;
          s[0] += shift0, s[1] += shift0, s[2] += shift1, s[3] += shift1;
        } else {
          s[0] = s[0] * scale.x * slope0 + shift0, s[1] = s[1] * scale.y * slope0 + shift0;
          s[2] = s[2] * scale.x * slope1 + shift1, s[3] = s[3] * scale.y * slope1 + shift1;
        }
        if constexpr (GATED) {
          if (diagonal) {
            const float2 decay = *reinterpret_cast<const float2 *>(small.gates.decay[key_stage] + 16 * j + column);
            const int2 run = *reinterpret_cast<const int2 *>(small.gates.key_runs[key_stage] + 16 * j + column);
            s[0] *= pair_gates.of_key(0, decay.x, run.x, column <= group), s[1] *= pair_gates.of_key(0, decay.y, run.y, column < group);
            s[2] *= pair_gates.of_key(1, decay.x, run.x, column <= group + 8), s[3] *= pair_gates.of_key(1, decay.y, run.y, column < group + 8);
          } else {
            const float2 gate = *reinterpret_cast<const float2 *>(small.key_gates[stripe] + 16 * j + column);
            s[0] *= row_gate0 * gate.x, s[1] *= row_gate0 * gate.y, s[2] *= row_gate1 * gate.x, s[3] *= row_gate1 * gate.y;
          }
        } else if (diagonal) {
          if (column > group) s[0] = 0.f;
          if (column + 1 > group) s[1] = 0.f;
          if (column > group + 8) s[2] = 0.f;
          if (column + 1 > group + 8) s[3] = 0.f;
        }
        if constexpr (GRAD) {
          row_sum[0] += s[0] + s[1];
          row_sum[2] += s[2] + s[3];
          s[0] *= scale.x, s[1] *= scale.y, s[2] *= scale.x, s[3] *= scale.y;
        }
      }
      weights[0] = E::pack(first_tile[0], first_tile[1]), weights[1] = E::pack(first_tile[2], first_tile[3]);
      weights[2] = E::pack(second_tile[0], second_tile[1]), weights[3] = E::pack(second_tile[2], second_tile[3]);
      // The mass is the sum of the rounded weights, so that a constant v comes back as itself.
      if constexpr (!GRAD) E::mma(row_sum, weights, E::kOnes, E::kOnes);
    };
    if (causal && head == 0) barrier_sync<kScalesReady, Shape::THREADS>();
    if constexpr (kBeside) {
      warpgroup_wait<1>();
      warpgroup_keep(scores);
#pragma unroll
      for (int j = 0; j < Shape::STRIPES; ++j) {
        weights_of[j][0] = weights_of[j][1] = weights_of[j][2] = weights_of[j][3] = 0u;
        if (causal && j < stripe) weigh(weights_of[j], scores[2 * j], scores[2 * j + 1], false, j);
        if (causal && j == stripe) weigh(weights_of[j], scores[2 * j], scores[2 * j + 1], true, j);
      }
      warpgroup_wait<0>();
      warpgroup_keep(acc);
    }
    float total0 = __shfl_sync(0xffffffffu, margin[0] + margin[1], lane_id & ~3), total1 = __shfl_sync(0xffffffffu, margin[2] + margin[3], lane_id & ~3);
    const float enter0 = factor0 * state_worth, enter1 = factor1 * state_worth;
    if constexpr (kFactors) total0 *= enter0, total1 *= enter1;
    total0 += shift0 * before, total1 += shift1 * before;
    if constexpr (GATED) total0 *= carry0, total1 *= carry1;
#pragma unroll
    for (int q = 0; q < OUT_PAIRS; ++q)
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const float2 line = *reinterpret_cast<const float2 *>(small.line + 16 * (first_block + q) + 8 * t + 2 * place);
        if constexpr (kFactors) acc[2 * q + t][0] *= enter0, acc[2 * q + t][1] *= enter0, acc[2 * q + t][2] *= enter1, acc[2 * q + t][3] *= enter1;
        acc[2 * q + t][0] += shift0 * line.x, acc[2 * q + t][1] += shift0 * line.y;
        acc[2 * q + t][2] += shift1 * line.x, acc[2 * q + t][3] += shift1 * line.y;
        if constexpr (GATED) acc[2 * q + t][0] *= carry0, acc[2 * q + t][1] *= carry0, acc[2 * q + t][2] *= carry1, acc[2 * q + t][3] *= carry1;
      }
    if (causal && head == heads - 1) barrier_arrive<kStateRead, Shape::THREADS>();

    if (causal) {
      if constexpr (kGroups && !kBeside) {
        constexpr int kBlocks = 2;
#pragma unroll
        for (int first_key = 0; first_key < Shape::STRIPES; first_key += kBlocks) {
          float part[2 * kBlocks][4];
          uint32_t weights[kBlocks][4];
          warpgroup_keep(part);
          warpgroup_begin();
#pragma unroll
          for (int block = 0; block < BLOCKS; ++block) {
            const uint32_t columns = Tile<D>::columns_at(2 * block);
            WarpgroupProduct<T, 16 * kBlocks, false>::run(part, warpgroup_operand<D>(rows + columns), warpgroup_operand<D>(y_tile + Tile<D>::rows_at(first_key) + columns), block > 0);
          }
          warpgroup_commit();
          warpgroup_wait<0>();
          warpgroup_keep(part);
#pragma unroll
          for (int i = 0; i < kBlocks; ++i) {
            const int j = first_key + i;
            weights[i][0] = weights[i][1] = weights[i][2] = weights[i][3] = 0u;
            if (j < stripe) weigh(weights[i], part[2 * i], part[2 * i + 1], false, j);
            if (j == stripe) weigh(weights[i], part[2 * i], part[2 * i + 1], true, j);
          }
          warpgroup_keep(acc);
          warpgroup_begin();
#pragma unroll
          for (int i = 0; i < kBlocks; ++i)
            WarpgroupProduct<T, 16 * OUT_PAIRS, true>::run(acc, weights[i], warpgroup_operand<D>(z_tile + Tile<D>::rows_at(first_key + i) + half_bytes, Tile<D>::kPanelBytes), true);
          warpgroup_commit();
          warpgroup_wait<0>();
          warpgroup_keep(acc);
        }
      } else if constexpr (kGroups) {
        warpgroup_keep(acc);
        warpgroup_begin();
#pragma unroll
        for (int j = 0; j < Shape::STRIPES; ++j)
          WarpgroupProduct<T, 16 * OUT_PAIRS, true>::run(acc, weights_of[j], warpgroup_operand<D>(z_tile + Tile<D>::rows_at(j) + half_bytes, Tile<D>::kPanelBytes), true);
        warpgroup_commit();
        warpgroup_wait<0>();
        warpgroup_keep(acc);
      } else {
        const auto step = [&](bool diagonal, int j) {
          float s[2][4];
          uint32_t weights[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) s[0][i] = s[1][i] = 0.f;
#pragma unroll
          for (int block = 0; block < BLOCKS; ++block) {
            uint32_t other[4];
            ldmatrix(other, y_blocks.at(0, block) + j * kStripeBytes);
            E::mma(s[0], xs[block], other[0], other[1]);
            E::mma(s[1], xs[block], other[2], other[3]);
          }
          weigh(weights, s[0], s[1], diagonal, j);
#pragma unroll
          for (int q = 0; q < OUT_PAIRS; ++q) {
            uint32_t other[4];
            ldmatrix_transposed(other, z_blocks.at(0, q) + j * kStripeBytes);
            E::mma(acc[2 * q], weights, other[0], other[1]);
            E::mma(acc[2 * q + 1], weights, other[2], other[3]);
          }
        };
#pragma unroll 1
        for (int j = 0; j < stripe; ++j) step(false, j);
        step(true, stripe);
      }
      if constexpr (GRAD) {
        row_sum[0] += __shfl_xor_sync(0xffffffffu, row_sum[0], 1);
        row_sum[2] += __shfl_xor_sync(0xffffffffu, row_sum[2], 1);
        row_sum[0] += __shfl_xor_sync(0xffffffffu, row_sum[0], 2);
        row_sum[2] += __shfl_xor_sync(0xffffffffu, row_sum[2], 2);
      }
      total0 += row_sum[0], total1 += row_sum[2];
    }

    float finish0, finish1;
    if constexpr (!GRAD) {
      if (place == 0 && half == 0) {
        if (local0 < tokens) args.mass_out[first_number + local0] = total0 * mass_worth;
        if (local1 < tokens) args.mass_out[first_number + local1] = total1 * mass_worth;
      }
      finish0 = total0 == 0.f ? 1.f : reciprocal(total0), finish1 = total1 == 0.f ? 1.f : reciprocal(total1);
      if constexpr (GATED)
        if (p.dropout_p) {
          const Noise noise(p);
          const uint32_t number = batch * p.query_heads + key_head * heads + head;
          const int64_t token = end - left;
#pragma unroll
          for (int q = 0; q < 2 * OUT_PAIRS; ++q) {
            const int column = 16 * first_block + 8 * q + 2 * place;
            const float4 factor = noise.two_rows(number, token + local0, token + local1, column);
            acc[q][0] *= factor.x, acc[q][1] *= factor.y, acc[q][2] *= factor.z, acc[q][3] *= factor.w;
          }
        }
    } else {
      uint32_t q_rows[OUT_PAIRS][4];
      const Blocks<D> q_blocks(rows + 2 * TILE + stripe * kStripeBytes + half_bytes, down);
      float dot0 = 0.f, dot1 = 0.f;
#pragma unroll
      for (int q = 0; q < OUT_PAIRS; ++q) {
        ldmatrix(q_rows[q], q_blocks.at(0, q));
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          dot0 += E::low(q_rows[q][2 * t]) * acc[2 * q + t][0] + E::high(q_rows[q][2 * t]) * acc[2 * q + t][1];
          dot1 += E::low(q_rows[q][2 * t + 1]) * acc[2 * q + t][2] + E::high(q_rows[q][2 * t + 1]) * acc[2 * q + t][3];
        }
      }
#pragma unroll
      for (int step = 1; step < 4; step *= 2) {
        dot0 += __shfl_xor_sync(0xffffffffu, dot0, step);
        dot1 += __shfl_xor_sync(0xffffffffu, dot1, step);
      }
      if constexpr (Shape::HALVES == 2) {
        if (place == 0) small.exchange[half][local0] = dot0, small.exchange[half][local1] = dot1;
        barrier_sync<kHalvesExchanged, 32 * Shape::RESULT_WARPS>();
        dot0 = small.exchange[0][local0] + small.exchange[1][local0];
        dot1 = small.exchange[0][local1] + small.exchange[1][local1];
      }
      if (half == 0) {
        const bool real0 = local0 < tokens, real1 = local1 < tokens;
        if (place == 0 && !(GATED && args.noised)) {
          if (real0) args.error[first_number + local0] = shift0 * slope0, args.query_scale[first_number + local0] = query_scale0;
          if (real1) args.error[first_number + local1] = shift1 * slope1, args.query_scale[first_number + local1] = query_scale1;
        }
        if constexpr (GATED)
          if (args.row_sums && place == 0) {
            if (real0) args.row_sums[first_number + local0] = slope0 * (a * total0 + b_tau * query_scale0 * dot0);
            if (real1) args.row_sums[first_number + local1] = slope1 * (a * total1 + b_tau * query_scale1 * dot1);
          }
        float pairs = (real0 ? total0 * slope0 : 0.f) + (real1 ? total1 * slope1 : 0.f);
        float products = (real0 ? dot0 * query_scale0 * slope0 : 0.f) + (real1 ? dot1 * query_scale1 * slope1 : 0.f);
#pragma unroll
        for (int step = 4; step < 32; step *= 2) {
          pairs += __shfl_xor_sync(0xffffffffu, pairs, step);
          products += __shfl_xor_sync(0xffffffffu, products, step);
        }
        if (lane_id == 0) small.totals[warp][head][0] += pairs, small.totals[warp][head][1] += products;
      }
      finish0 = b_tau * query_scale0 * slope0, finish1 = b_tau * query_scale1 * slope1;
      if (unit) {
        dot0 *= query_scale0 * query_scale0, dot1 *= query_scale1 * query_scale1;
#pragma unroll
        for (int q = 0; q < OUT_PAIRS; ++q)
#pragma unroll
          for (int t = 0; t < 2; ++t) {
            acc[2 * q + t][0] -= E::low(q_rows[q][2 * t]) * dot0, acc[2 * q + t][1] -= E::high(q_rows[q][2 * t]) * dot0;
            acc[2 * q + t][2] -= E::low(q_rows[q][2 * t + 1]) * dot1, acc[2 * q + t][3] -= E::high(q_rows[q][2 * t + 1]) * dot1;
          }
      }
    }
    // The results are staged over x, which the warp of the other half must have read.
    if (Shape::HALVES == 2 && !GRAD && (kGroups || !causal || head != 0)) barrier_sync<kHalvesExchanged, 32 * Shape::RESULT_WARPS>();
    __syncwarp();
    {
      const Blocks<D> staged(rows + stripe * kStripeBytes + half_bytes, down);
#pragma unroll
      for (int q = 0; q < OUT_PAIRS; ++q) store_block<T, D>(staged.at(0, q), acc[2 * q], acc[2 * q + 1], finish0, finish1, lane_id);
      __syncwarp();
      store_stripe<T, D, 2 * OUT_PAIRS>(result_rows, args.result.token_stride, shared + stage * ROW_TILES * TILE, 16 * stripe, tokens, lane_id,
                                        [&](int i) { return 2 * first_block + i; });
    }

    stage = stage == STAGES - 1 ? 0 : stage + 1;
    if (head == heads - 1) {
      head = 0;
      key_stage = key_stage == STAGES - 1 ? 0 : key_stage + 1;
      if (!kGroups) stripe = Shape::STRIPES - 1 - stripe;
      left -= C;
      first_number += C - (heads - 1) * p.length;
      result_rows += C * args.result.token_stride - (heads - 1) * args.result.head_stride;
      if (causal && !GATED) before += C;
    } else {
      ++head;
      first_number += p.length;
      result_rows += args.result.head_stride;
    }
  }

  if constexpr (GRAD) {
    __syncthreads();
    if (thread < heads * 2) {
      float total = 0.f;
      for (int w = 0; w < Shape::STRIPES; ++w) total += small.totals[w][thread / 2][thread % 2];
      args.partials[((static_cast<int64_t>(batch) * p.query_heads + key_head * heads + thread / 2) * args.segments + segment) * 2 + thread % 2] = total;
    }
  }
}

}  // namespace linattn_mma
