// What the column kernel's warps compute: a stripe of 16 keys' dv, or of their dk.
#pragma once
#include "stream/column_state.cuh"

namespace linattn_stream {

// One of these warps, from chunk to chunk and head to head. Every step is made part of `run`, and every member is a register.
template <typename T, int D, bool GATED> struct ColumnResults {
  using Block = ColumnBlock<T, D, GATED>;
  using Shape = typename Block::Shape;
  using E = Element<T>;
  using Keeper = ColumnState<T, D, GATED>;
  using Gate = typename Keeper::Gate;
  static constexpr int C = Shape::C, BLOCKS = Shape::BLOCKS, STAGES = Shape::STAGES, TILE = Shape::TILE, STRIPES = Shape::STRIPES;
  static constexpr int kStripeBytes = Tile<D>::kBlockBytes;
  static constexpr bool kGroups = kColumnsByGroups<D>;
  static constexpr int kHalves = (D + 63) / 64, kWide = D / kHalves;  // how warpgroups cut the columns of results
  static constexpr float kValueScale = E::kNarrow ? 1.f / kSlopeWorth : 1.f;
  using Own = uint32_t[BLOCKS][4];
  using Sums = float[2 * BLOCKS][4];

  // What the sums of a lane's two keys count at the end.
  struct Worth {
    float first, second;
  };

  // Of two keys and two queries: key 0 with both, then key 1.
  struct PairFactors {
    float of[4];
  };

  // What a lane's two keys weigh with: weight = scale (x . y) slope + shift, of each query.
  struct Scales {
    float scale0, scale1;
    const float *shifts, *slopes;
  };

  const Block &job;
  const ColumnArguments &args;
  const linattn_problem &p;
  typename Block::Small &small;
  const int thread, lane_id, warp, group, place;
  const uint32_t down, across;
  const bool causal, unit;
  const int heads;
  const int role;                             // 0: dv, from k; 1: dk, from v
  const linattn_tensor &result;
  T *result_rows;
  float key_scale0 = 1.f, key_scale1 = 1.f;
  float key_down0 = 1.f, key_down1 = 1.f;     // float16: what undoes the lift of the keys
  float slope_sum0 = 0.f, slope_sum1 = 0.f;   // of a lane's two keys: a dA summed over the rows
  int64_t token;
  int head = 0, stage = 0, key_stage = 0, tokens;
  int stripe;                                 // turned every chunk, as the earlier ones see more queries
  bool factors = true;                        // whether the gates of the chunk's pairs are products, of the query's factor and what the key leaves

  __device__ __forceinline__ explicit ColumnResults(const Block &job)
      : job(job), args(job.args), p(args.problem), small(job.small), thread(threadIdx.x), lane_id(thread & 31), warp(warp_number()), group(lane_id >> 2), place(lane_id & 3),
        down(lane_down<D>(lane_id)), across(lane_across<D>(lane_id)), causal(p.causal), unit(p.normalize_qk), heads(job.heads), role(warp / STRIPES),
        result(role == 0 ? args.grad_value : args.grad_key), result_rows(head_of<T>(result, job.batch, job.key_head) + job.last * result.token_stride), token(job.last),
        tokens(static_cast<int>(job.end - job.last)), stripe(role && !kGroups ? STRIPES - 1 - warp % STRIPES : warp % STRIPES) {}

  __device__ __forceinline__ void run() {
    ColumnCopies<T, D, GATED> copies(job);
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) copies.prefetch();
    fill();
    Keeper keeper(job, warp);
    typename Keeper::State state;
    keeper.load(state);
    Own own;
    Sums acc;
    for (int iteration = 0; iteration < job.iterations; ++iteration) {
      const uint32_t k_tile = job.key_tiles + key_stage * 2 * TILE, q_tile = job.query_tiles + stage * 2 * TILE;
      const Blocks<D> k_blocks(k_tile + stripe * kStripeBytes, down);
      copy_wait<STAGES - 2>();
      warpgroup_publish();
      arrive();
      const Lift gradient = lift_tiles(acc, keeper);
      copies.prefetch();
      if (GATED && head == 0 && args.column_sums) keeper.share_count();
      if (causal && thread < C) keeper.weigh(gates_of_chunk(), gradient, head, stage, factors);
      if (head == 0) {
        read_keys(own, k_blocks, k_tile);
        if ((causal || iteration == 0) && keeper.holds) keeper.publish(state);
      }
      warpgroup_publish();
      __syncthreads();  // the rounded state and the weights are written

      const uint32_t own_tile = role == 0 ? k_tile : k_tile + TILE;
      if (head == 0) {
        multiply_by_state(acc, own, own_tile);
        enter(acc, own, keeper, k_tile);
        if constexpr (GATED)
          if (causal && keeper.holds) scale_state(state, gates_of_chunk().keep());
      }
      if (causal) add_pairs(acc, own, own_tile, q_tile);
      if (head == heads - 1) {
        const Worth worth = worth_of_sums(keeper);
        if (role == 1) finish_keys(acc, k_blocks, worth);
        store(acc, worth, k_tile);
        next_chunk();
      }
      if (causal && keeper.holds) keeper.take_in(state, q_tile);
      if constexpr (E::kNarrow)
        if (causal && head == heads - 1) keeper.state_lift.lift = keeper.summed, keeper.measure(state);
      stage = stage == STAGES - 1 ? 0 : stage + 1;
      head = head == heads - 1 ? 0 : head + 1;
    }
    copy_wait<0>();
    if (args.grad_initial_state) keeper.store(state);
  }

  // The zeros that readers take, and the coefficients of the group's heads.
  __device__ __forceinline__ void fill() const {
    if (thread < C) small.zeros[thread] = 0;
    if (thread < heads) {
      const int head = job.first_head + thread;
      small.coefficients[thread][0] = p.coefficients[head], small.coefficients[thread][1] = p.coefficients[p.query_heads + head] * p.coefficients[3 * p.query_heads + head];
    }
  }

  // Behind this the tiles are here, padding reads as zero, and nobody reads the tiles that the next copies overwrite.
  __device__ __forceinline__ void arrive() {
    if constexpr (GATED) {
      const bool padded = small.gates.arrive(args.gates, key_stage, tokens, thread);
      factors = gates_of_chunk().template factors<T>(padded);
      if (padded) {
        for (int i = 0; i < 2; ++i) {
          if (causal) zero_padding<D, C, Shape::THREADS>(job.queries(stage) + i * TILE, small.gates.query_runs[key_stage], thread);
          if (head == 0) zero_padding<D, C, Shape::THREADS>(job.keys(key_stage) + i * TILE, small.gates.key_runs[key_stage], thread);
        }
        warpgroup_publish();
        __syncthreads();
      }
    } else {
      __syncthreads();
    }
  }

  // float16: what is multiplied comes into its range, and the sums of earlier heads into the units of this one; what dO / g was lifted by.
  __device__ __forceinline__ Lift lift_tiles(Sums &acc, Keeper &keeper) {
    Lift gradient{1.f, 1.f};
    if constexpr (E::kNarrow) {
      unsigned char *const keys = job.keys(key_stage), *const queries = job.queries(stage);
      const DividedByMass<T, D, C, Shape::THREADS> divided{queries + TILE, small.numbers[stage][0], small.numbers[stage][1]};
      if (head == 0) lift_rows<T, D, C, Shape::THREADS>(keys, small.key_down, thread), keeper.rounded = lift_to(kStatePeak, peak_of_warps<Shape::WARPS>(small.state_peaks));
      if (causal) lift_rows<T, D, C, Shape::THREADS>(queries, small.query_down, thread), divided.measure(small.gradient_peaks, thread);
      __syncthreads();
      if (causal) {
        gradient = lift_to(kStatePeak, peak_of_warps<Shape::WARPS>(small.gradient_peaks));
        divided.divide(gradient, thread);
        const Lift lift = chunk_lift(small.coefficients[head], gradient);
        const float change = keeper.summed.down * lift.up;
        if (head > 0 && change != 1.f) {
          slope_sum0 *= change, slope_sum1 *= change;
#pragma unroll
          for (int q = 0; q < 2 * BLOCKS; ++q)
#pragma unroll
            for (int i = 0; i < 4; ++i) acc[q][i] *= change;
        }
        keeper.summed = lift;
      }
    }
    return gradient;
  }

  // Made again wherever they are asked for: they would take registers that the products need.
  __device__ __forceinline__ Gate gates_of_chunk() const {
    if constexpr (GATED) return ChunkGates<C>(small.gates, key_stage, tokens);
    else return 0;
  }

  // The stripe's keys, or values, and 1 / |k| of each.
  __device__ __forceinline__ void read_keys(Own &own, const Blocks<D> &k_blocks, uint32_t k_tile) {
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) ldmatrix(own[block], k_blocks.at(0, block));
    if constexpr (E::kNarrow) key_down0 = small.key_down[16 * stripe + group], key_down1 = small.key_down[16 * stripe + group + 8];
    if (unit) {
      if constexpr (GATED && D == 64) row_products<T>(key_scale0, key_scale1, own, Blocks<D>(k_tile + stripe * kStripeBytes, across), 0, lane_id);
      else row_squares<T>(key_scale0, key_scale1, own, lane_id);
      key_scale0 = inverse_norm(key_scale0), key_scale1 = inverse_norm(key_scale1);
    }
    if (role == 1 && !kGroups) {
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block) ldmatrix(own[block], k_blocks.at(0, block) + TILE);
    }
  }

  static __device__ __forceinline__ float2 two_at(const float *numbers, int query) { return *reinterpret_cast<const float2 *>(numbers + query); }

  __device__ __forceinline__ Scales scales() const {
    return {role == 0 ? key_scale0 : kValueScale, role == 0 ? key_scale1 : kValueScale, role == 0 ? small.level : small.slope, small.mixed};
  }

  __device__ __forceinline__ Worth worth_of_sums(const Keeper &keeper) const {
    Worth worth{1.f, 1.f};
    if constexpr (E::kNarrow) worth.first = worth.second = keeper.summed.down * (role == 0 ? 1.f : kSlopeWorth);
    if constexpr (GATED)
      if (factors) worth.first *= gates_of_chunk().leave(16 * stripe + group), worth.second *= gates_of_chunk().leave(16 * stripe + group + 8);
    return worth;
  }

  // acc = k R, or v R^T.
  __device__ __forceinline__ void multiply_by_state(Sums &acc, const Own &own, uint32_t own_tile) const {
    if constexpr (kGroups) {
      if (role == 0) {
        multiply_by_group(acc, own_tile);
      } else {
        multiply_transposed_by_group(acc, own_tile);
        if (causal) barrier_arrive<kStateRead, Shape::THREADS>();
      }
    } else {
      multiply_by_warp(acc, own);
    }
  }

  __device__ __forceinline__ void multiply_by_group(Sums &acc, uint32_t own_tile) const {
    warpgroup_keep(acc);
    warpgroup_begin();
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      float (&part)[kWide / 8][4] = reinterpret_cast<float (&)[kWide / 8][4]>(acc[8 * half]);
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block)
        WarpgroupProduct<T, kWide, true>::run(part, warpgroup_operand<D>(own_tile + Tile<D>::columns_at(2 * block)),
                                              warpgroup_operand<D>(job.state_tile + Tile<D>::rows_at(block) + Tile<D>::columns_at(8 * half)), block > 0);
    }
    warpgroup_commit();
    warpgroup_wait<0>();
    warpgroup_keep(acc);
  }

  __device__ __forceinline__ void multiply_transposed_by_group(Sums &acc, uint32_t own_tile) const {
    warpgroup_keep(acc);
    warpgroup_begin();
#pragma unroll
    for (int rows = 0; rows < kHalves; ++rows) {
      float (&part)[kWide / 8][4] = reinterpret_cast<float (&)[kWide / 8][4]>(acc[8 * rows]);
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block) {
        const uint32_t columns = Tile<D>::columns_at(2 * block);
        WarpgroupProduct<T, kWide, false>::run(part, warpgroup_operand<D>(own_tile + columns), warpgroup_operand<D>(job.state_tile + Tile<D>::rows_at(4 * rows) + columns),
                                               block > 0);
      }
    }
    warpgroup_commit();
    warpgroup_wait<0>();
    warpgroup_keep(acc);
  }

  __device__ __forceinline__ void multiply_by_warp(Sums &acc, const Own &own) const {
    const Blocks<D> state_blocks(job.state_tile, role == 0 ? down : across);
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

  // What is behind the chunk, as the keys weigh it.
  __device__ __forceinline__ void enter(Sums &acc, const Own &own, const Keeper &keeper, uint32_t k_tile) {
    const Scales by = scales();
    const float enter = E::kNarrow ? keeper.state_lift.lift.down * keeper.summed.up : 1.f;
    const float from_state0 = by.scale0 * enter * keeper.rounded.down, from_state1 = by.scale1 * enter * keeper.rounded.down;
    if constexpr (GATED)
      if (args.column_sums && role == 1) sum_later_slopes(own, keeper, enter, k_tile);
    const float *const margin = (role == 0 ? small.line : small.column) + 2 * place;
#pragma unroll
    for (int q = 0; q < BLOCKS; ++q)
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        float2 add = *reinterpret_cast<const float2 *>(margin + 16 * q + 8 * t);
        if constexpr (E::kNarrow) add.x *= enter, add.y *= enter;
        acc[2 * q + t][0] = acc[2 * q + t][0] * from_state0 + add.x, acc[2 * q + t][1] = acc[2 * q + t][1] * from_state0 + add.y;
        acc[2 * q + t][2] = acc[2 * q + t][2] * from_state1 + add.x, acc[2 * q + t][3] = acc[2 * q + t][3] * from_state1 + add.y;
      }
    if constexpr (GATED)
      if (!factors) {
        const Gate gates = gates_of_chunk();
        const float leave0 = gates.leave(16 * stripe + group), leave1 = gates.leave(16 * stripe + group + 8);
        slope_sum0 *= leave0, slope_sum1 *= leave1;
#pragma unroll
        for (int q = 0; q < 2 * BLOCKS; ++q) acc[q][0] *= leave0, acc[q][1] *= leave0, acc[q][2] *= leave1, acc[q][3] *= leave1;
      }
  }

  // a dA of all later rows together: level . v and the sum of a e; the lanes of a row share it out.
  __device__ __forceinline__ void sum_later_slopes(const Own &own, const Keeper &keeper, float enter, uint32_t k_tile) {
    float later = 0.f;
    for (int w = 0; w < Keeper::kCounting; ++w) later += small.counts[w];
    slope_sum0 = slope_sum1 = place == 0 ? later * keeper.summed.up : 0.f;
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
  }

  // Raw products with 16 queries, the j-th of the chunk, into their rounded weights.
  __device__ __forceinline__ void weigh(uint32_t (&weights)[4], float (&first_tile)[4], float (&second_tile)[4], bool diagonal, int j, const Scales &by) {
    const auto each = [&](const auto &step) {
      step(first_tile, 2 * place);
      step(second_tile, 2 * place + 8);
    };
    const bool sloped = GATED && args.column_sums && role == 1;
    if (GATED && !factors) {
      each([&](float (&s)[4], int column) {
        const PairFactors gate = gates_of_pairs(diagonal, 16 * j + column);
        if (sloped) sum_slopes(s, gate, 16 * j + column);
        weigh_plain(s, 16 * j + column, by);
        for (int i = 0; i < 4; ++i) s[i] *= gate.of[i];
      });
    } else {
      const auto seen = [&](int i, int column) { return !diagonal || column + (i & 1) >= group + 4 * (i & 2); };
      if (sloped)
        each([&](const float (&s)[4], int column) {
          sum_slopes(s, {seen(0, column) ? 1.f : 0.f, seen(1, column) ? 1.f : 0.f, seen(2, column) ? 1.f : 0.f, seen(3, column) ? 1.f : 0.f}, 16 * j + column);
        });
      each([&](float (&s)[4], int column) {
        weigh_plain(s, 16 * j + column, by);
        for (int i = 0; i < 4; ++i) s[i] = seen(i, column) ? s[i] : 0.f;
      });
    }
    weights[0] = E::pack(first_tile[0], first_tile[1]), weights[1] = E::pack(first_tile[2], first_tile[3]);
    weights[2] = E::pack(second_tile[0], second_tile[1]), weights[3] = E::pack(second_tile[2], second_tile[3]);
  }

  // Two of the lane's queries, side by side, with its two keys.
  __device__ __forceinline__ void weigh_plain(float (&s)[4], int query, const Scales &by) const {
    const float2 weight = two_at(by.slopes, query), shift = two_at(by.shifts, query);
    s[0] = s[0] * by.scale0 * weight.x + shift.x, s[1] = s[1] * by.scale0 * weight.y + shift.y;
    s[2] = s[2] * by.scale1 * weight.x + shift.x, s[3] = s[3] * by.scale1 * weight.y + shift.y;
  }

  // a dA of each pair.
  __device__ __forceinline__ void sum_slopes(const float (&s)[4], const PairFactors &by, int query) {
    if constexpr (GATED) {
      const float2 level = two_at(small.level, query), pull = two_at(small.pull, query);
      slope_sum0 += (s[0] * level.x + pull.x) * by.of[0] + (s[1] * level.y + pull.y) * by.of[1];
      slope_sum1 += (s[2] * level.x + pull.x) * by.of[2] + (s[3] * level.y + pull.y) * by.of[3];
    }
  }

  // Where no factors make it up, each pair's gate.
  __device__ __forceinline__ PairFactors gates_of_pairs(bool diagonal, int query) const {
    if constexpr (GATED) {
      const int local0 = 16 * stripe + group, local1 = local0 + 8;
      const PairGates keys(small.gates.decay[key_stage], small.gates.key_runs[key_stage], local0, local1);
      const float2 decay = two_at(small.gates.decay[key_stage], query);
      const int2 run = *reinterpret_cast<const int2 *>(small.gates.query_runs[key_stage] + query);
      return {keys.of_query(0, decay.x, run.x, !diagonal || query >= local0), keys.of_query(0, decay.y, run.y, !diagonal || query + 1 >= local0),
              keys.of_query(1, decay.x, run.x, !diagonal || query >= local1), keys.of_query(1, decay.y, run.y, !diagonal || query + 1 >= local1)};
    }
    return {};
  }

  // The pairs inside the chunk.
  __device__ __forceinline__ void add_pairs(Sums &acc, const Own &own, uint32_t own_tile, uint32_t q_tile) {
    const Scales by = scales();
    const uint32_t pair_tile = role == 0 ? q_tile : q_tile + TILE, sum_tile = role == 0 ? q_tile + TILE : q_tile;
    if constexpr (kGroups) add_pairs_by_group(acc, by, own_tile, pair_tile, sum_tile);
    else add_pairs_by_warp(acc, own, by, pair_tile, sum_tile);
  }

  // At D = 128 in two parts, or the registers do not suffice.
  __device__ __forceinline__ void add_pairs_by_group(Sums &acc, const Scales &by, uint32_t own_tile, uint32_t pair_tile, uint32_t sum_tile) {
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
        WarpgroupProduct<T, 16 * kBlocks, false>::run(scores, warpgroup_operand<D>(own_tile + columns), warpgroup_operand<D>(pair_tile + Tile<D>::rows_at(first_block) + columns),
                                                      block > 0);
      }
      warpgroup_commit();
      warpgroup_wait<0>();
      warpgroup_keep(scores);
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
        const int j = first_block + i;
        weights_of[i][0] = weights_of[i][1] = weights_of[i][2] = weights_of[i][3] = 0u;
        if (j > stripe) weigh(weights_of[i], scores[2 * i], scores[2 * i + 1], false, j, by);
        if (j == stripe) weigh(weights_of[i], scores[2 * i], scores[2 * i + 1], true, j, by);
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
  }

  __device__ __forceinline__ void add_pairs_by_warp(Sums &acc, const Own &own, const Scales &by, uint32_t pair_tile, uint32_t sum_tile) {
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
      weigh(weights, s[0], s[1], diagonal, j, by);
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

  // acc from the gradient of k^ to that of k, and what the decay's gradient takes from these keys.
  __device__ __forceinline__ void finish_keys(Sums &acc, const Blocks<D> &k_blocks, const Worth &worth) {
    Own k;
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
      if (args.column_sums) put_sums(worth, dot0, dot1);
    dot0 = unit ? dot0 * key_scale0 * key_scale0 : 0.f, dot1 = unit ? dot1 * key_scale1 * key_scale1 : 0.f;
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block)
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        acc[2 * block + t][0] -= E::low(k[block][2 * t]) * dot0, acc[2 * block + t][1] -= E::high(k[block][2 * t]) * dot0;
        acc[2 * block + t][2] -= E::low(k[block][2 * t + 1]) * dot1, acc[2 * block + t][3] -= E::high(k[block][2 * t + 1]) * dot1;
      }
  }

  // A dA = a dA + k^ . (what dA sends to k^).
  __device__ __forceinline__ void put_sums(const Worth &worth, float dot0, float dot1) {
#pragma unroll
    for (int shift = 1; shift < 4; shift *= 2) {
      slope_sum0 += __shfl_xor_sync(0xffffffffu, slope_sum0, shift);
      slope_sum1 += __shfl_xor_sync(0xffffffffu, slope_sum1, shift);
    }
    float *const sums = args.column_sums + static_cast<int64_t>(job.head_pair) * p.length + token;
    const int local0 = 16 * stripe + group, local1 = local0 + 8;
    if (place == 0 && local0 < tokens) sums[local0] = slope_sum0 * worth.first * kValueScale + dot0 * key_scale0 * worth.first;
    if (place == 0 && local1 < tokens) sums[local1] = slope_sum1 * worth.second * kValueScale + dot1 * key_scale1 * worth.second;
  }

  // Where results are staged, nobody may read any more. By registers: dv over v and dk over k, both taken before the second barrier (k again
  // by the warps of dk just now). By warpgroups: dk over v, which only they read, and dv over the rounded state, which the next chunk renews.
  __device__ __forceinline__ void store(const Sums &acc, const Worth &worth, uint32_t k_tile) const {
    int staged = static_cast<int>(k_tile - job.key_tiles) + (role == 0 ? TILE : 0);
    if (kGroups && causal) {
      staged = role == 0 ? static_cast<int>(job.state_tile - job.key_tiles) : static_cast<int>(k_tile - job.key_tiles) + TILE;
      if (role == 0) barrier_sync<kStateRead, Shape::THREADS>();
    } else if (kGroups) {
      barrier_sync<kStateRead, Shape::THREADS>();
    }
    __syncwarp();
    const Blocks<D> staged_blocks(job.key_tiles + staged + stripe * kStripeBytes, down);
    const float finish0 = worth.first * (role == 0 ? 1.f : key_scale0 / key_down0), finish1 = worth.second * (role == 0 ? 1.f : key_scale1 / key_down1);
#pragma unroll
    for (int q = 0; q < BLOCKS; ++q) store_block<T, D>(staged_blocks.at(0, q), acc[2 * q], acc[2 * q + 1], finish0, finish1, lane_id);
    __syncwarp();
    store_stripe<T, D, 2 * BLOCKS>(result_rows, result.token_stride, job.shared + staged, 16 * stripe, tokens, lane_id, [](int i) { return i; });
  }

  __device__ __forceinline__ void next_chunk() {
    result_rows -= C * result.token_stride;
    token -= C;
    tokens = C;
    if (!kGroups) stripe = STRIPES - 1 - stripe;
    key_stage = key_stage == STAGES - 1 ? 0 : key_stage + 1;
  }
};

}  // namespace linattn_stream
