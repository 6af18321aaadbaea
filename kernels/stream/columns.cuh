// The backward direction in n: dk and dv, one block a (batch, key head, segment), chunk after chunk from the last token to the first.
// With the rows' mass g_i, e_i and 1 / |q_i| from the row kernel, and r_n = 1 / |k_n|, summed over the group's query heads:
//   dv_n  = sum_i (level_i + mixed_i r_n (k_n . q_i)) W_i               level = a / g, mixed = b tau / (|q| g)
//   dk^_n = sum_i (mixed_i (v_n . W_i) + slope_i) q_i                    slope = b tau e / |q|
// Half of the warps take dv, half dk; both need the state R = sum_i mixed_i q_i W_i^T of the later chunks, and its margins.
#pragma once
#include <type_traits>

#include "stream/segments.cuh"

namespace linattn_stream {

struct ColumnArguments {
  linattn_problem problem;
  linattn_tensor grad_out, grad_key, grad_value;
  const float *mass, *error, *query_scale;
  const float *states;             // of the segments after each, or null: grad_state or nothing
  const float *grad_state;
  float *grad_initial_state;       // one segment only, or null
  int32_t segments;
  int64_t segment_length;
  Gates gates;
  float *column_sums;              // (batch, state heads, length): sum of A dA over the key's rows, or null
};

template <int D> struct ColumnShape {
  static constexpr int C = D == 32 || D == 128 ? 64 : D;
  static constexpr int STRIPES = C / 16, BLOCKS = D / 16;
  static constexpr int WARPS = 2 * STRIPES, THREADS = 32 * WARPS;
  static constexpr int SPLIT = WARPS / BLOCKS < BLOCKS ? WARPS / BLOCKS : BLOCKS;  // warps to a row block of the state
  static constexpr int PAIRS = (BLOCKS + SPLIT - 1) / SPLIT;
  static constexpr int STAGES = 2, TILE = C * D * 2, STATE_TILE = (D > C ? D : C) * D * 2;  // dv is staged there
  static constexpr int MIN_BLOCKS = D <= 64 ? 2 : 1;
  struct Small {
    alignas(16) float mixed[C], level[C], slope[C], column[D], line[D], numbers[STAGES][3][C];
    alignas(16) uint16_t high[3][C], low[3][C], zeros[C];
    float counts[WARPS], coefficients[kMaxGroup][2];
    float key_down[C], query_down[C], gradient_peaks[WARPS], state_peaks[WARPS];  // float16
  };
  struct GatedSmall : Small {
    GateTiles<C, STAGES> gates;
    alignas(16) float pull[C];  // a e
  };
  template <bool GATED> using AllSmall = std::conditional_t<GATED, GatedSmall, Small>;
  template <bool GATED> static constexpr int SHARED = STAGES * 4 * TILE + STATE_TILE + static_cast<int>(sizeof(AllSmall<GATED>));
};

template <typename T, int D, bool GATED>
__global__ void __launch_bounds__(ColumnShape<D>::THREADS, ColumnShape<D>::MIN_BLOCKS) columns_kernel(const __grid_constant__ ColumnArguments args) {
  using Shape = ColumnShape<D>;
  using E = Element<T>;
  constexpr int C = Shape::C, BLOCKS = Shape::BLOCKS, STAGES = Shape::STAGES, TILE = Shape::TILE, STRIPES = Shape::STRIPES;
  constexpr int kStripeBytes = Tile<D>::kBlockBytes;
  constexpr bool kGroups = kWarpgroups<D> && D <= 64;  // at D = 128 their accumulators leave too few registers: 9 % slower
  constexpr int kHalves = (D + 63) / 64, kWide = D / kHalves;  // how warpgroups cut the columns of results
  using Place = StatePlace<D, (Shape::SPLIT > 1 && !(kStateByGroups<D> && kGroups))>;
  extern __shared__ __align__(1024) unsigned char shared[];
  using Small = typename Shape::template AllSmall<GATED>;
  Small &small = *reinterpret_cast<Small *>(shared + STAGES * 4 * TILE + Shape::STATE_TILE);
  const auto weights_of = [&](int i) { return SplitWeights<T>{reinterpret_cast<const T *>(small.high[i]), reinterpret_cast<const T *>(small.low[i])}; };

  const linattn_problem &p = args.problem;
  const int thread = threadIdx.x, lane_id = thread & 31, warp = warp_number(), group = lane_id >> 2, place = lane_id & 3;
  const uint32_t down = lane_down<D>(lane_id), across = lane_across<D>(lane_id);
  const uint32_t key_tiles = shared_address(shared);                    // (stage, k and v)
  const uint32_t query_tiles = key_tiles + STAGES * 2 * TILE;           // (stage, q and W)
  const uint32_t state_tile = query_tiles + STAGES * 2 * TILE;

  const int head_pair = blockIdx.x / args.segments, segment = blockIdx.x % args.segments;
  const int batch = head_pair / p.state_heads, key_head = head_pair % p.state_heads;
  const int memory_head = key_head / (p.state_heads / p.key_heads);  // whose keys and values these are
  const bool causal = p.causal, unit = p.normalize_qk;
  const int heads = causal ? p.query_heads / p.state_heads : 1;  // without a mask the queries are in the state alone
  const int64_t begin = segment * args.segment_length, end = min(p.length, begin + args.segment_length);
  const int chunks = static_cast<int>((end - begin + C - 1) / C), iterations = chunks * heads;
  const int64_t last = begin + static_cast<int64_t>(chunks - 1) * C;  // where the first chunk to be worked on begins

  using Copy = TileCopy<T, D, C, Shape::THREADS>;
  const int first_head = key_head * (p.query_heads / p.state_heads);
  if constexpr (GATED) {
    small.gates.clear(thread, Shape::THREADS);
    __syncthreads();  // before the first copies into them
  }
  int64_t next_begin = last;
  Copy k_copy(head_of<const T>(p.key, batch, memory_head), p.key.token_stride, last, thread);
  Copy v_copy(head_of<const T>(p.value, batch, memory_head), p.value.token_stride, last, thread);
  Copy q_copy(head_of<const T>(p.query, batch, first_head), p.query.token_stride, last, thread);
  Copy w_copy(head_of<const T>(args.grad_out, batch, first_head), args.grad_out.token_stride, last, thread);
  int64_t next_number = (static_cast<int64_t>(batch) * p.query_heads + first_head) * p.length + last + thread;
  int next_count = static_cast<int>(end - last), next_iteration = 0, next_head = 0, next_stage = 0, next_key_stage = 0;
  const auto prefetch = [&]() {
    if (next_iteration < iterations) {
      if (next_head == 0) {
        const uint32_t keys = key_tiles + next_key_stage * 2 * TILE;
        k_copy.start(keys, next_count, thread);
        v_copy.start(keys + TILE, next_count, thread);
        if constexpr (GATED) small.gates.start(args.gates, batch, head_pair, p.length, next_begin, next_count, next_key_stage, thread), next_begin -= C;
        k_copy.next -= C * p.key.token_stride, v_copy.next -= C * p.value.token_stride;
      }
      const bool wraps = next_head == heads - 1;
      if (causal) {
        const uint32_t queries = query_tiles + next_stage * 2 * TILE;
        q_copy.start(queries, next_count, thread);
        w_copy.start(queries + TILE, next_count, thread);
        q_copy.next += wraps ? -C * p.query.token_stride - (heads - 1) * p.query.head_stride : p.query.head_stride;
        w_copy.next += wraps ? -C * args.grad_out.token_stride - (heads - 1) * args.grad_out.head_stride : args.grad_out.head_stride;
        if (thread < C) {
          const uint32_t numbers = shared_address(small.numbers[next_stage][0] + thread);
          const bool valid = thread < next_count;
          copy_number_async(numbers, args.mass + (valid ? next_number : 0), valid);
          copy_number_async(numbers + 4 * C, args.error + (valid ? next_number : 0), valid);
          copy_number_async(numbers + 8 * C, args.query_scale + (valid ? next_number : 0), valid);
        }
        next_number += wraps ? -C - (heads - 1) * p.length : p.length;
      }
      next_stage = next_stage == STAGES - 1 ? 0 : next_stage + 1;
      next_head = wraps ? 0 : next_head + 1;
      if (wraps) next_count = C, next_key_stage = next_key_stage == STAGES - 1 ? 0 : next_key_stage + 1;
    }
    ++next_iteration;
    copy_commit();
  };
#pragma unroll
  for (int i = 0; i < STAGES - 1; ++i) prefetch();

  if (thread < C) small.zeros[thread] = 0;
  if (thread < heads) {
    const int head = first_head + thread;
    small.coefficients[thread][0] = p.coefficients[head], small.coefficients[thread][1] = p.coefficients[p.query_heads + head] * p.coefficients[3 * p.query_heads + head];
  }
  const int state_part = warp / BLOCKS;
  const bool holds_state = Shape::WARPS == Shape::SPLIT * BLOCKS || state_part < Shape::SPLIT;
  const int pairs_held = BLOCKS % Shape::SPLIT == 0 ? Shape::PAIRS : (BLOCKS + 1 - state_part) / 2;
  const Place at(warp % BLOCKS, state_part == 0, Shape::SPLIT > 1 ? state_part : 0, pairs_held, lane_id, Shape::SPLIT > 1 ? state_part * Shape::PAIRS : 0);
  const bool owns_line = at.line_block() >= 0;
  const T *const zeros = reinterpret_cast<const T *>(small.zeros);
  const WeightReader<T> mixed(weights_of(0), zeros, lane_id), level(weights_of(1), zeros, lane_id), slope(weights_of(2), zeros, lane_id);
  StateTile<T, Shape::PAIRS> state;
  state.clear();
  const StateView<D> source =
      args.states ? StateView<D>::of_segment(args.states, head_pair, args.segments, causal ? segment : 0) : StateView<D>::of_caller(args.grad_state, head_pair);
  StateLift state_lift;  // float16: the factors of the rounded state, and of what is summed
  Lift rounded{1.f, 1.f}, summed{1.f, 1.f};
  if (holds_state) load_state<D>(state, at, source, false);
  const auto measure_state = [&]() { small.state_peaks[warp] = holds_state ? state_peak(state, pairs_held, false) : 0.f; };
  if constexpr (E::kNarrow) state_lift.enter(state), measure_state();
  const float source_count = source.data && thread == 0 ? source.count() : 0.f;

  const int role = warp / STRIPES;  // 0: dv, from k; 1: dk, from v
  const linattn_tensor &result = role == 0 ? args.grad_value : args.grad_key;
  T *result_rows = head_of<T>(result, batch, key_head) + last * result.token_stride;
  uint32_t own[BLOCKS][4];
  float acc[2 * BLOCKS][4], key_scale0 = 1.f, key_scale1 = 1.f, count = source_count;  // the sum of a e, shared out over the threads
  float key_down0 = 1.f, key_down1 = 1.f;    // float16: what undoes the lift of the keys
  float slope_sum0 = 0.f, slope_sum1 = 0.f;  // of a lane's two keys: a dA summed over the rows
  int64_t token = last;
  int head = 0, stage = 0, key_stage = 0, tokens = static_cast<int>(end - last);
  int stripe = role && !kGroups ? STRIPES - 1 - warp % STRIPES : warp % STRIPES;  // turned every chunk, as the earlier ones see more queries
  for (int iteration = 0; iteration < iterations; ++iteration) {
    const uint32_t k_tile = key_tiles + key_stage * 2 * TILE, q_tile = query_tiles + stage * 2 * TILE;
    const Blocks<D> k_blocks(k_tile + stripe * kStripeBytes, down);

    copy_wait<STAGES - 2>();
    warpgroup_publish();
    __syncthreads();  // the tiles are here, and nobody reads the ones that the next copies overwrite
    if constexpr (GATED) {
      const int32_t *const query_runs = small.gates.query_runs[key_stage], *const key_runs = small.gates.key_runs[key_stage];
      if (args.gates.key_runs && any_padding<C>(query_runs, key_runs, thread)) {
        for (int i = 0; i < 2; ++i) {
          if (causal) zero_padding<D, C, Shape::THREADS>(shared + (q_tile - key_tiles) + i * TILE, query_runs, thread);
          if (head == 0) zero_padding<D, C, Shape::THREADS>(shared + (k_tile - key_tiles) + i * TILE, key_runs, thread);
        }
        warpgroup_publish();
        __syncthreads();
      }
    }
    Lift gradient{1.f, 1.f};
    if constexpr (E::kNarrow) {
      unsigned char *const keys = shared + (k_tile - key_tiles), *const queries = shared + (q_tile - key_tiles);
      const DividedByMass<T, D, C, Shape::THREADS> divided{queries + TILE, small.numbers[stage][0], small.numbers[stage][1]};
      if (head == 0) lift_rows<T, D, C, Shape::THREADS>(keys, small.key_down, thread), rounded = lift_to(kStatePeak, peak_of_warps<Shape::WARPS>(small.state_peaks));
      if (causal) lift_rows<T, D, C, Shape::THREADS>(queries, small.query_down, thread), divided.measure(small.gradient_peaks, thread);
      __syncthreads();
      if (causal) {
        gradient = lift_to(kStatePeak, peak_of_warps<Shape::WARPS>(small.gradient_peaks));
        divided.divide(gradient, thread);
        const Lift lift = chunk_lift(small.coefficients[head], gradient);
        const float change = summed.down * lift.up;
        if (head > 0 && change != 1.f) {
          slope_sum0 *= change, slope_sum1 *= change;
#pragma unroll
          for (int q = 0; q < 2 * BLOCKS; ++q)
#pragma unroll
            for (int i = 0; i < 4; ++i) acc[q][i] *= change;
        }
        summed = lift;
      }
    }
    const auto gates = [&]() {
      if constexpr (GATED) return ChunkGates<C>(small.gates, key_stage, tokens);
      else return 0;
    }();
    prefetch();
    if (GATED && head == 0) {
      // The sum of a e of the later rows, which the chunk's keys see: as exact as the margins, and like them before this chunk's rows enter.
      float later = count;
#pragma unroll
      for (int shift = 1; shift < 32; shift *= 2) later += __shfl_xor_sync(0xffffffffu, later, shift);
      if (lane_id == 0) small.counts[warp] = later;
    }
    if (causal && thread < C) {
      const float *const numbers = small.numbers[stage][0] + thread;
      const float a = small.coefficients[head][0], error = numbers[C];
      const QueryWeights weights = query_weights<T>(a, small.coefficients[head][1], numbers[0], error, numbers[2 * C] * (E::kNarrow ? small.query_down[thread] : 1.f), gradient);
      small.mixed[thread] = weights.mixed, small.level[thread] = weights.level, small.slope[thread] = weights.slope;
      float carry = 1.f;
      if constexpr (GATED) {
        carry = gates.carry(thread), small.pull[thread] = a * error * summed.up;
        if (head == 0) count *= gates.keep();
      }
      weights_of(0).set(thread, weights.mixed * carry), weights_of(1).set(thread, weights.level * carry), weights_of(2).set(thread, weights.slope * carry);
      count += a * error * carry;
    }
    if (head == 0) {
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block) ldmatrix(own[block], k_blocks.at(0, block));
      if constexpr (E::kNarrow) key_down0 = small.key_down[16 * stripe + group], key_down1 = small.key_down[16 * stripe + group + 8];
      if (unit) {
        row_products<T>(key_scale0, key_scale1, own, Blocks<D>(k_tile + stripe * kStripeBytes, across), 0, lane_id);
        key_scale0 = inverse_norm(key_scale0), key_scale1 = inverse_norm(key_scale1);
      }
      if (role == 1 && !kGroups) {
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block) ldmatrix(own[block], k_blocks.at(0, block) + TILE);
      }
      if ((causal || iteration == 0) && holds_state)
        publish_state<T, D>(state, at, Blocks<D>(state_tile, down), rounded.up, small.line, lane_id, [&](int row, float sum) { small.column[row] = sum; });
    }
    warpgroup_publish();
    __syncthreads();  // the rounded state and the weights are written

    constexpr float kValueScale = E::kNarrow ? 1.f / kSlopeWorth : 1.f;
    const float scale0 = role == 0 ? key_scale0 : kValueScale, scale1 = role == 0 ? key_scale1 : kValueScale;
    const uint32_t pair_tile = role == 0 ? q_tile : q_tile + TILE, sum_tile = role == 0 ? q_tile + TILE : q_tile;
    const float *const shifts = (role == 0 ? small.level : small.slope) + 2 * place, *const slopes = small.mixed + 2 * place;
    const auto pair_gates = [&]() {
      if constexpr (GATED) return PairGates(small.gates.decay[key_stage], small.gates.key_runs[key_stage], 16 * stripe + group, 16 * stripe + group + 8);
      else return 0;
    }();
    // Raw products with 16 queries into their rounded weights.
    const auto weigh = [&](uint32_t (&weights)[4], float (&first_tile)[4], float (&second_tile)[4], bool diagonal, int j) {
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        float (&s)[4] = t == 0 ? first_tile : second_tile;
        const float2 weight = *reinterpret_cast<const float2 *>(slopes + 16 * j + 8 * t), shift = *reinterpret_cast<const float2 *>(shifts + 16 * j + 8 * t);
        if constexpr (GATED) {
          const int column = 8 * t + 2 * place;
          const float2 decay = *reinterpret_cast<const float2 *>(small.gates.decay[key_stage] + 16 * j + column);
          const int2 run = *reinterpret_cast<const int2 *>(small.gates.query_runs[key_stage] + 16 * j + column);
          const float gate[4] = {pair_gates.of_query(0, decay.x, run.x, !diagonal || column >= group), pair_gates.of_query(0, decay.y, run.y, !diagonal || column + 1 >= group),
                                 pair_gates.of_query(1, decay.x, run.x, !diagonal || column >= group + 8),
                                 pair_gates.of_query(1, decay.y, run.y, !diagonal || column + 1 >= group + 8)};
          if (args.column_sums && role == 1) {
            const float2 level = *reinterpret_cast<const float2 *>(small.level + 16 * j + column), pull = *reinterpret_cast<const float2 *>(small.pull + 16 * j + column);
            slope_sum0 += (s[0] * level.x + pull.x) * gate[0] + (s[1] * level.y + pull.y) * gate[1];
            slope_sum1 += (s[2] * level.x + pull.x) * gate[2] + (s[3] * level.y + pull.y) * gate[3];
          }
          s[0] = (s[0] * scale0 * weight.x + shift.x) * gate[0], s[1] = (s[1] * scale0 * weight.y + shift.y) * gate[1];
          s[2] = (s[2] * scale1 * weight.x + shift.x) * gate[2], s[3] = (s[3] * scale1 * weight.y + shift.y) * gate[3];
          continue;
        }
        s[0] = s[0] * scale0 * weight.x + shift.x, s[1] = s[1] * scale0 * weight.y + shift.y;
        s[2] = s[2] * scale1 * weight.x + shift.x, s[3] = s[3] * scale1 * weight.y + shift.y;
        if (diagonal) {
          const int column = 8 * t + 2 * place;
          if (column < group) s[0] = 0.f;
          if (column + 1 < group) s[1] = 0.f;
          if (column < group + 8) s[2] = 0.f;
          if (column + 1 < group + 8) s[3] = 0.f;
        }
      }
      weights[0] = E::pack(first_tile[0], first_tile[1]), weights[1] = E::pack(first_tile[2], first_tile[3]);
      weights[2] = E::pack(second_tile[0], second_tile[1]), weights[3] = E::pack(second_tile[2], second_tile[3]);
    };
    const uint32_t own_tile = role == 0 ? k_tile : k_tile + TILE;
    if (head == 0) {
      if constexpr (kGroups) {
        if (role == 0) {
          warpgroup_keep(acc);
          warpgroup_begin();
#pragma unroll
          for (int half = 0; half < kHalves; ++half) {
            float (&part)[kWide / 8][4] = reinterpret_cast<float (&)[kWide / 8][4]>(acc[8 * half]);
#pragma unroll
            for (int block = 0; block < BLOCKS; ++block)
              WarpgroupProduct<T, kWide, true>::run(part, warpgroup_operand<D>(own_tile + Tile<D>::columns_at(2 * block)),
                                                    warpgroup_operand<D>(state_tile + Tile<D>::rows_at(block) + Tile<D>::columns_at(8 * half)), block > 0);
          }
          warpgroup_commit();
          warpgroup_wait<0>();
          warpgroup_keep(acc);
        } else {
          warpgroup_keep(acc);
          warpgroup_begin();
#pragma unroll
          for (int rows = 0; rows < kHalves; ++rows) {
            float (&part)[kWide / 8][4] = reinterpret_cast<float (&)[kWide / 8][4]>(acc[8 * rows]);
#pragma unroll
            for (int block = 0; block < BLOCKS; ++block) {
              const uint32_t columns = Tile<D>::columns_at(2 * block);
              WarpgroupProduct<T, kWide, false>::run(part, warpgroup_operand<D>(own_tile + columns), warpgroup_operand<D>(state_tile + Tile<D>::rows_at(4 * rows) + columns),
                                                     block > 0);
            }
          }
          warpgroup_commit();
          warpgroup_wait<0>();
          warpgroup_keep(acc);
          if (causal) barrier_arrive<kStateRead, Shape::THREADS>();
        }
      }
      if constexpr (!kGroups) {
        const Blocks<D> state_blocks(state_tile, role == 0 ? down : across);
#pragma unroll
        for (int q = 0; q < BLOCKS; ++q)
#pragma unroll
          for (int i = 0; i < 4; ++i) acc[2 * q][i] = acc[2 * q + 1][i] = 0.f;
        if (role == 0) {
#pragma unroll
          for (int block = 0; block < BLOCKS; ++block)
#pragma unroll
            for (int q = 0; q < BLOCKS; ++q) {
              uint32_t s[4];
              ldmatrix_transposed(s, state_blocks.at(block, q));
              E::mma(acc[2 * q], own[block], s[0], s[1]);
              E::mma(acc[2 * q + 1], own[block], s[2], s[3]);
            }
        } else {
#pragma unroll
          for (int block = 0; block < BLOCKS; ++block)
#pragma unroll
            for (int q = 0; q < BLOCKS; ++q) {
              uint32_t s[4];
              ldmatrix(s, state_blocks.at(q, block));
              E::mma(acc[2 * q], own[block], s[0], s[1]);
              E::mma(acc[2 * q + 1], own[block], s[2], s[3]);
            }
        }
      }
      const float enter = E::kNarrow ? state_lift.lift.down * summed.up : 1.f, from_state0 = scale0 * enter * rounded.down, from_state1 = scale1 * enter * rounded.down;
      float leave0 = 1.f, leave1 = 1.f;
      if constexpr (GATED) {
        leave0 = gates.leave(16 * stripe + group), leave1 = gates.leave(16 * stripe + group + 8);
        if (args.column_sums && role == 1) {
          // a dA of all later rows together: level . v and the sum of a e; the lanes of a row share it out
          float later = 0.f;
          for (int w = 0; w < Shape::WARPS; ++w) later += small.counts[w];
          slope_sum0 = slope_sum1 = place == 0 ? later * summed.up : 0.f;
          const Blocks<D> v_blocks(k_tile + TILE + stripe * kStripeBytes, down);
#pragma unroll
          for (int block = 0; block < BLOCKS; ++block) {
            uint32_t v[4];
            if constexpr (kGroups) ldmatrix(v, v_blocks.at(0, block));
            else
              for (int i = 0; i < 4; ++i) v[i] = own[block][i];  // by registers dv may be staged over v by now
#pragma unroll
            for (int t = 0; t < 2; ++t) {
              float2 line = *reinterpret_cast<const float2 *>(small.line + 16 * block + 8 * t + 2 * place);
              if constexpr (E::kNarrow) line.x *= enter, line.y *= enter;
              slope_sum0 += E::low(v[2 * t]) * line.x + E::high(v[2 * t]) * line.y;
              slope_sum1 += E::low(v[2 * t + 1]) * line.x + E::high(v[2 * t + 1]) * line.y;
            }
          }
          slope_sum0 *= leave0, slope_sum1 *= leave1;
        }
      }
      const float *const margin = (role == 0 ? small.line : small.column) + 2 * place;
#pragma unroll
      for (int q = 0; q < BLOCKS; ++q)
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          float2 add = *reinterpret_cast<const float2 *>(margin + 16 * q + 8 * t);
          if constexpr (E::kNarrow) add.x *= enter, add.y *= enter;
          acc[2 * q + t][0] = acc[2 * q + t][0] * from_state0 + add.x, acc[2 * q + t][1] = acc[2 * q + t][1] * from_state0 + add.y;
          acc[2 * q + t][2] = acc[2 * q + t][2] * from_state1 + add.x, acc[2 * q + t][3] = acc[2 * q + t][3] * from_state1 + add.y;
          if constexpr (GATED) acc[2 * q + t][0] *= leave0, acc[2 * q + t][1] *= leave0, acc[2 * q + t][2] *= leave1, acc[2 * q + t][3] *= leave1;
        }
    }

    if (causal) {
      if constexpr (kGroups) {
        // At D = 128 in two parts, or the registers do not suffice.
        constexpr int kBlocks = STRIPES / kHalves;
#pragma unroll
        for (int first_block = 0; first_block < STRIPES; first_block += kBlocks) {
          float scores[2 * kBlocks][4];
          uint32_t weights_of[kBlocks][4];
          warpgroup_keep(scores);
          warpgroup_begin();
#pragma unroll
          for (int block = 0; block < BLOCKS; ++block) {
            const uint32_t columns = Tile<D>::columns_at(2 * block);
            WarpgroupProduct<T, 16 * kBlocks, false>::run(scores, warpgroup_operand<D>(own_tile + columns),
                                                          warpgroup_operand<D>(pair_tile + Tile<D>::rows_at(first_block) + columns), block > 0);
          }
          warpgroup_commit();
          warpgroup_wait<0>();
          warpgroup_keep(scores);
#pragma unroll
          for (int i = 0; i < kBlocks; ++i) {
            const int j = first_block + i;
            weights_of[i][0] = weights_of[i][1] = weights_of[i][2] = weights_of[i][3] = 0u;
            if (j > stripe) weigh(weights_of[i], scores[2 * i], scores[2 * i + 1], false, j);
            if (j == stripe) weigh(weights_of[i], scores[2 * i], scores[2 * i + 1], true, j);
          }
          warpgroup_keep(acc);
          warpgroup_begin();
#pragma unroll
          for (int half = 0; half < kHalves; ++half) {
            float (&part)[kWide / 8][4] = reinterpret_cast<float (&)[kWide / 8][4]>(acc[8 * half]);
#pragma unroll
            for (int i = 0; i < kBlocks; ++i)
              WarpgroupProduct<T, kWide, true>::run(part, weights_of[i], warpgroup_operand<D>(sum_tile + Tile<D>::rows_at(first_block + i) + Tile<D>::columns_at(8 * half)), true);
          }
          warpgroup_commit();
          warpgroup_wait<0>();
          warpgroup_keep(acc);
        }
      } else {
        const Blocks<D> pair_blocks(pair_tile, across), sum_blocks(sum_tile, down);
        const auto step = [&](bool diagonal, int j) {
          float s[2][4];
          uint32_t weights[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) s[0][i] = s[1][i] = 0.f;
#pragma unroll
          for (int block = 0; block < BLOCKS; ++block) {
            uint32_t other[4];
            ldmatrix(other, pair_blocks.at(0, block) + j * kStripeBytes);
            E::mma(s[0], own[block], other[0], other[1]);
            E::mma(s[1], own[block], other[2], other[3]);
          }
          weigh(weights, s[0], s[1], diagonal, j);
#pragma unroll
          for (int q = 0; q < BLOCKS; ++q) {
            uint32_t other[4];
            ldmatrix_transposed(other, sum_blocks.at(0, q) + j * kStripeBytes);
            E::mma(acc[2 * q], weights, other[0], other[1]);
            E::mma(acc[2 * q + 1], weights, other[2], other[3]);
          }
        };
        step(true, stripe);
#pragma unroll 1
        for (int j = stripe + 1; j < STRIPES; ++j) step(false, j);
      }
    }

    if (head == heads - 1) {
      const float worth = E::kNarrow ? summed.down * (role == 0 ? 1.f : kSlopeWorth) : 1.f;  // of what `acc` holds
      if (role == 1) {
        uint32_t k[BLOCKS][4];
        float dot0 = 0.f, dot1 = 0.f;
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block) {
          ldmatrix(k[block], k_blocks.at(0, block));
#pragma unroll
          for (int t = 0; t < 2; ++t) {
            dot0 += E::low(k[block][2 * t]) * acc[2 * block + t][0] + E::high(k[block][2 * t]) * acc[2 * block + t][1];
            dot1 += E::low(k[block][2 * t + 1]) * acc[2 * block + t][2] + E::high(k[block][2 * t + 1]) * acc[2 * block + t][3];
          }
        }
#pragma unroll
        for (int shift = 1; shift < 4; shift *= 2) {
          dot0 += __shfl_xor_sync(0xffffffffu, dot0, shift);
          dot1 += __shfl_xor_sync(0xffffffffu, dot1, shift);
        }
        if constexpr (GATED)
          if (args.column_sums) {
          // A dA = a dA + k^ . (what dA sends to k^)
#pragma unroll
            for (int shift = 1; shift < 4; shift *= 2) {
              slope_sum0 += __shfl_xor_sync(0xffffffffu, slope_sum0, shift);
              slope_sum1 += __shfl_xor_sync(0xffffffffu, slope_sum1, shift);
            }
            float *const sums = args.column_sums + static_cast<int64_t>(head_pair) * p.length + token;
            const int local0 = 16 * stripe + group, local1 = local0 + 8;
            if (place == 0 && local0 < tokens) sums[local0] = slope_sum0 * summed.down + dot0 * key_scale0 * worth;
            if (place == 0 && local1 < tokens) sums[local1] = slope_sum1 * summed.down + dot1 * key_scale1 * worth;
          }
        dot0 = unit ? dot0 * key_scale0 * key_scale0 : 0.f, dot1 = unit ? dot1 * key_scale1 * key_scale1 : 0.f;
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block)
#pragma unroll
          for (int t = 0; t < 2; ++t) {
            acc[2 * block + t][0] -= E::low(k[block][2 * t]) * dot0, acc[2 * block + t][1] -= E::high(k[block][2 * t]) * dot0;
            acc[2 * block + t][2] -= E::low(k[block][2 * t + 1]) * dot1, acc[2 * block + t][3] -= E::high(k[block][2 * t + 1]) * dot1;
          }
      }
      // Where results are staged, nobody may read any more. By registers: dv over v and dk over k, both taken before the second barrier (k again
      // by the warps of dk just now). By warpgroups: dk over v, which only they read, and dv over the rounded state, which the next chunk renews.
      int staged = static_cast<int>(k_tile - key_tiles) + (role == 0 ? TILE : 0);
      if (kGroups && causal) {
        staged = role == 0 ? static_cast<int>(state_tile - key_tiles) : static_cast<int>(k_tile - key_tiles) + TILE;
        if (role == 0) barrier_sync<kStateRead, Shape::THREADS>();
      } else if (kGroups) {
        barrier_sync<kStateRead, Shape::THREADS>();
      }
      __syncwarp();
      const Blocks<D> staged_blocks(key_tiles + staged + stripe * kStripeBytes, down);
      const float finish0 = worth * (role == 0 ? 1.f : key_scale0 / key_down0), finish1 = worth * (role == 0 ? 1.f : key_scale1 / key_down1);
#pragma unroll
      for (int q = 0; q < BLOCKS; ++q) store_block<T, D>(staged_blocks.at(0, q), acc[2 * q], acc[2 * q + 1], finish0, finish1, lane_id);
      __syncwarp();
      store_stripe<T, D, 2 * BLOCKS>(result_rows, result.token_stride, shared + staged, 16 * stripe, tokens, lane_id, [](int i) { return i; });
      result_rows -= C * result.token_stride;
      token -= C;
      tokens = C;
      if (!kGroups) stripe = STRIPES - 1 - stripe;
      key_stage = key_stage == STAGES - 1 ? 0 : key_stage + 1;
    }

    if (causal && holds_state) {
      if constexpr (GATED)
        if (head == 0) scale_state(state, gates.keep());
      if constexpr (E::kNarrow) state_lift.change(state, summed);
      const Blocks<D> w_flipped(q_tile + TILE, down, at.flip);
      const uint32_t q_block = Blocks<D>(q_tile, across).at_column(0, at.row), w_block = Blocks<D>(q_tile + TILE, down).at_column(0, at.row);
      if constexpr (kStateByGroups<D> && kGroups) {
        update_state_by_groups<T, D, 16 * Shape::PAIRS, false, false>(state, at, owns_line, q_block, w_block, q_tile + TILE + Tile<D>::columns_at(2 * at.first), mixed, slope,
                                                                      level);
      } else
#pragma unroll
        for (int block = 0; block < STRIPES; ++block) update_state<T, D, false, false>(state, at, owns_line, q_block, w_block, w_flipped, block, mixed, slope, level);
    }
    if constexpr (E::kNarrow)
      if (causal && head == heads - 1) state_lift.lift = summed, measure_state();
    stage = stage == STAGES - 1 ? 0 : stage + 1;
    head = head == heads - 1 ? 0 : head + 1;
  }
  copy_wait<0>();

  if (args.grad_initial_state) {
#pragma unroll
    for (int shift = 1; shift < 32; shift *= 2) count += __shfl_xor_sync(0xffffffffu, count, shift);
    __syncthreads();  // the last chunk's counts have been read
    if (lane_id == 0) small.counts[warp] = count;
    __syncthreads();
    count = 0.f;
    for (int w = 0; w < Shape::WARPS; ++w) count += small.counts[w];
    if constexpr (E::kNarrow) state_lift.leave(state);
    if (holds_state) store_state<D>(state, at, StateView<D>::of_caller(args.grad_initial_state, head_pair), count, thread == 0);
  }
}

}  // namespace linattn_stream
