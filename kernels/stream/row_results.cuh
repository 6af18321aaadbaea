// The warps of the row kernel that compute: a stripe of 16 rows of results each.
#pragma once
#include "stream/row_block.cuh"

namespace linattn_stream {

// What the two rows of a lane weigh with: weight = slope (x . y) + shift; in the gradient with slope 1, the row's own 1 / g left for the end.
struct RowScales {
  float a, b_tau, mass_worth = 1.f;
  float slope0, slope1, shift0, shift1, query_scale0 = 1.f, query_scale1 = 1.f;
  float factor0, factor1, state_worth = 1.f;  // what products with x count: inside the chunk, and with the rounded state
  float carry0 = 1.f, carry1 = 1.f;           // what the state ahead of the chunk counts, by the gates; or, by factors, what all sums do
};

// One of these warps, from chunk to chunk and head to head. Every step is made part of `run`, and every member is a register.
template <typename T, int D, bool GRAD, bool GATED, RowForm FORM, bool SUMS> struct RowResults {
  using Block = RowBlock<T, D, GRAD, GATED, FORM>;
  using Shape = typename Block::Shape;
  using E = Element<T>;
  static constexpr int C = Block::C, BLOCKS = Shape::BLOCKS, STAGES = Block::STAGES, TILE = Block::TILE, ROW_TILES = Block::ROW_TILES;
  static constexpr int kStripeBytes = Tile<D>::kBlockBytes, OUT_PAIRS = Shape::OUT_PAIRS, kRound = Shape::GROUPS * C;
  static constexpr bool kGroups = kWarpgroups<D>, kFactors = !GRAD || E::kNarrow;
  // By warpgroups the scores of all keys at once, beside the product with the state; elsewhere later and in two parts, for want of registers.
  static constexpr bool kBeside = kGroups && (D == 64 || (D == 128 && !GATED && !E::kNarrow));
  // x as a left factor out of registers, which spares shared memory a reading: where they last, until the scores, or longer, until the product with the state.
  static constexpr bool kHeld = kGroups && (D == 64 ? !(GRAD && GATED) : D == 128 && !(GRAD && kBeside)), kHeldLonger = kHeld && !GRAD && !kBeside;

  const Block &job;
  const RowArguments &args;
  const linattn_problem &p;
  typename Block::Small &small;
  const int lane_id, warp, group, place;
  const int turn;  // which of a round's chunks is the warp's
  const uint32_t down, across;
  const int batch, key_head, heads;
  const int64_t begin, end;
  const bool causal, unit;
  T *result_rows;
  int64_t first_number, left;
  float before;
  float pull = 0.f;  // with sums: a e of the lane's rows
  const int half, first_block;
  const uint32_t half_bytes;
  const T *const column_vector;
  int head = 0, stage, key_stage, buffer, stripe;

  // Of the chunk and head at hand.
  int tokens, local0, local1;
  uint32_t rows, y_tile, z_tile;
  uint32_t xs[BLOCKS][4];
  float acc[2 * OUT_PAIRS][4], row_sum[4], total0, total1, finish0, finish1;
  bool factors;  // whether the gates of the chunk's pairs are products, of `carry` and the key's factor
  float scores[kBeside ? 2 * Shape::STRIPES : 1][4];
  uint32_t weights_of[kBeside ? Shape::STRIPES : 1][4];

  // Later stripes see more keys; turning them every chunk evens the load of the four schedulers.
  __device__ __forceinline__ explicit RowResults(const Block &job)
      : job(job), args(job.args), p(args.problem), small(job.small), lane_id(threadIdx.x & 31), warp(warp_number()), group(lane_id >> 2), place(lane_id & 3),
        turn(Shape::kWide ? warp / Shape::CHUNK_WARPS : 0), down(lane_down<D>(lane_id)), across(lane_across<D>(lane_id)), batch(job.batch), key_head(job.key_head),
        heads(job.heads), begin(job.begin), end(job.end), causal(p.causal), unit(p.normalize_qk),
        result_rows(head_of<T>(args.result, batch, key_head * heads) + (begin + turn * C) * args.result.token_stride),
        first_number((static_cast<int64_t>(batch) * p.query_heads + key_head * heads) * p.length + begin + turn * C), left(end - begin - turn * C),
        before((job.source.data ? job.source.count() : 0.f) + turn * C), half(Shape::HALVES > 1 ? warp / Shape::STRIPES : 0), first_block(half * OUT_PAIRS),
        half_bytes(Tile<D>::columns_at(2 * first_block)), column_vector(WeightReader<T>(job.column_parts(), job.zeros(), lane_id).vector), stage(turn), key_stage(turn),
        buffer(turn), stripe(half && !kGroups ? Shape::STRIPES - 1 - warp % Shape::STRIPES : warp % Shape::STRIPES) {}

  __device__ __forceinline__ void run() {
    for (int iteration = 0; iteration < job.iterations; iteration += Shape::GROUPS) {
      tokens = static_cast<int>(min(left, static_cast<int64_t>(C)));
      local0 = 16 * stripe + group, local1 = local0 + 8;
      rows = job.row_tiles + stage * ROW_TILES * TILE, y_tile = job.key_tiles + key_stage * 2 * TILE, z_tile = y_tile + TILE;

      // the tiles and the rounded state are here
      if constexpr (Shape::kWide) {
        __syncthreads();
        if (left <= 0) break;  // in the last round
        factors = job.prepared(key_stage, tokens);
      } else {
        factors = job.prepare(stage, key_stage, causal && head == 0, tokens, C);
      }
      RowScales scales;
      if constexpr (GATED) {
        const ChunkGates<C> gates(small.gates, key_stage, tokens);
        scales.carry0 = gates.carry(local0), scales.carry1 = gates.carry(local1), before = small.count[Block::state_of(buffer)];
      }
      const Blocks<D> x_blocks(rows + stripe * kStripeBytes, down), x_across(rows + stripe * kStripeBytes, across);
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block) ldmatrix(xs[block], x_blocks.at(0, block));

      float margin[4] = {0, 0, 0, 0};
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block) {
        uint32_t b0, b1;
        WeightReader<T>::two(b0, b1, Shape::STATES > 1 ? WeightReader<T>(job.column_parts(buffer), job.zeros(), lane_id).vector : column_vector, 16 * block);
        E::mma(margin, xs[block], b0, b1);
      }
      measure(scales, x_blocks, x_across);
      multiply_by_state();
      if constexpr (SUMS) weigh_rows(scales);
      if (!Block::kAhead && causal && head == 0) barrier_sync<kScalesReady, Shape::THREADS>();
      if constexpr (kBeside) weigh_scores(scales);
      enter(scales, margin);
      if (!Shape::kWide && causal && head == heads - 1) barrier_arrive<kStateRead, Shape::THREADS>();
      if (causal) add_pairs(scales);
      if constexpr (GRAD) finish_gradient(scales);
      else finish_output(scales);
      store();
      advance();
    }
    if constexpr (SUMS) share_pull();
  }

  __device__ __forceinline__ void measure(RowScales &of, const Blocks<D> &x_blocks, const Blocks<D> &x_across) {
    of.a = small.coefficients[head][0], of.b_tau = small.coefficients[head][1];
    if constexpr (E::kNarrow && !GRAD) {
      const Lift lift = lift_to(0, fmaxf(fabsf(of.a), fabsf(of.b_tau)));
      of.a *= lift.up, of.b_tau *= lift.up, of.mass_worth = lift.down;
    }
    if constexpr (!GRAD) {
      if (unit) {
        row_squares<T>(of.query_scale0, of.query_scale1, xs, lane_id);
        of.query_scale0 = inverse_norm(of.query_scale0), of.query_scale1 = inverse_norm(of.query_scale1);
      }
      of.slope0 = of.b_tau * of.query_scale0, of.slope1 = of.b_tau * of.query_scale1;
      of.shift0 = of.shift1 = of.a;
    } else {
      measure_gradient(of, x_blocks, x_across);
    }
    of.factor0 = GRAD ? 1.f : of.slope0, of.factor1 = GRAD ? 1.f : of.slope1;
    if constexpr (E::kNarrow) {
      of.state_worth = small.state_worth;
      if constexpr (GRAD) {
        float peak0, peak1;
        row_peaks<T>(peak0, peak1, xs);
        const Lift lift0 = lift_to(kRowPeak, fmaxf(peak0, fabsf(of.shift0))), lift1 = lift_to(kRowPeak, fmaxf(peak1, fabsf(of.shift1)));
        of.factor0 = lift0.up, of.shift0 *= lift0.up, of.slope0 *= lift0.down;
        of.factor1 = lift1.up, of.shift1 *= lift1.up, of.slope1 *= lift1.down;
      }
    }
  }

  __device__ __forceinline__ void measure_gradient(RowScales &of, const Blocks<D> &x_blocks, const Blocks<D> &x_across) {
    row_products<T>(of.shift0, of.shift1, xs, x_across, TILE, lane_id);
    const float mass0 = small.numbers[stage][0][local0], mass1 = small.numbers[stage][0][local1];
    of.slope0 = mass0 == 0.f ? 0.f : reciprocal(mass0), of.slope1 = mass1 == 0.f ? 0.f : reciprocal(mass1);
    of.shift0 = small.numbers[stage][1][local0] * mass0 - of.shift0, of.shift1 = small.numbers[stage][1][local1] * mass1 - of.shift1;
    if constexpr (GATED) {
      if (args.noised) of.shift0 = local0 < tokens ? args.error[first_number + local0] * mass0 : 0.f, of.shift1 = local1 < tokens ? args.error[first_number + local1] * mass1 : 0.f;
      of.shift0 = mass0 == 0.f ? 0.f : of.shift0, of.shift1 = mass1 == 0.f ? 0.f : of.shift1;  // padding's gradient may be NaN
    }
    if (unit) {
      uint32_t q[BLOCKS][4];
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block) ldmatrix(q[block], x_blocks.at(0, block) + 2 * TILE);
      row_squares<T>(of.query_scale0, of.query_scale1, q, lane_id);
      of.query_scale0 = inverse_norm(of.query_scale0), of.query_scale1 = inverse_norm(of.query_scale1);
    }
  }

  // As the columns of earlier segments weigh the rows.
  __device__ __forceinline__ void weigh_rows(const RowScales &of) {
    if (place == 0) {
      const float error0 = of.shift0 * of.slope0, error1 = of.shift1 * of.slope1, factor0 = of.b_tau * of.query_scale0, factor1 = of.b_tau * of.query_scale1;
      job.row_weights(0).set(local0, factor0 * of.slope0), job.row_weights(0).set(local1, factor1 * of.slope1);
      job.row_weights(1).set(local0, of.a * of.slope0), job.row_weights(1).set(local1, of.a * of.slope1);
      job.row_weights(2).set(local0, factor0 * error0), job.row_weights(2).set(local1, factor1 * error1);
      pull += of.a * (error0 + error1);
    }
    barrier_arrive<kRowsWeighed, Shape::THREADS>();
  }

  __device__ __forceinline__ void share_pull() {
#pragma unroll
    for (int step = 4; step < 32; step *= 2) pull += __shfl_xor_sync(0xffffffffu, pull, step);
    if (lane_id == 0) small.counts[warp] = pull;
  }

  // x as a warpgroup's left factor.
  template <bool HELD> __device__ __forceinline__ auto left_factor(int block) -> std::conditional_t<HELD, const uint32_t (&)[4], uint64_t> {
    if constexpr (HELD) return xs[block];
    else return warpgroup_operand<D>(rows + Tile<D>::columns_at(2 * block));
  }
  // Behind the last product that takes it.
  template <bool HELD> __device__ __forceinline__ void release() {
    if constexpr (HELD) warpgroup_keep(reinterpret_cast<float (&)[BLOCKS][4]>(xs));
  }

  // acc = x S, and by warpgroups the scores beside it.
  __device__ __forceinline__ void multiply_by_state() {
#pragma unroll
    for (int q = 0; q < OUT_PAIRS; ++q)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[2 * q][i] = acc[2 * q + 1][i] = 0.f;
#pragma unroll
    for (int i = 0; i < 4; ++i) row_sum[i] = 0.f;
    if constexpr (kGroups) {
      warpgroup_keep(acc);
      if constexpr (kBeside) {
        warpgroup_keep(scores);
        warpgroup_begin();
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block)
          WarpgroupProduct<T, 64, false>::run(scores, left_factor<kHeld>(block), warpgroup_operand<D>(y_tile + Tile<D>::columns_at(2 * block)), block > 0);
        warpgroup_commit();
      } else {
        warpgroup_begin();
      }
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block)
        WarpgroupProduct<T, 16 * OUT_PAIRS, true>::run(acc, left_factor<kHeldLonger>(block),
                                                       warpgroup_operand<D>(job.state_tile(buffer) + Tile<D>::rows_at(block) + half_bytes, Tile<D>::kPanelBytes), block > 0);
      warpgroup_commit();
      if constexpr (!kBeside) {
        warpgroup_wait<0>();
        warpgroup_keep(acc);
        release<kHeldLonger>();
      }
    } else {
      const Blocks<D> state_blocks(job.state_tile(buffer) + half_bytes, down);
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
  }

  // Of two keys, side by side.
  __device__ __forceinline__ float2 scale_at(int key) const {
    const float *scales = small.key_scale[buffer];
    if constexpr (GATED && Block::kAhead) scales = factors ? small.scale_by_factor[buffer] : scales;
    return *reinterpret_cast<const float2 *>(scales + key);
  }
  __device__ __forceinline__ float2 factor_at(int key) const {
    if constexpr (GATED) {
      const float2 factor = *reinterpret_cast<const float2 *>(small.factor[buffer] + key);
      return Block::kAhead && !factors ? make_float2(1.f, 1.f) : factor;
    }
    return make_float2(1.f, 1.f);
  }

  // Raw products of 16 keys, the j-th of the chunk, into their rounded weights.
  __device__ __forceinline__ void weigh(uint32_t (&weights)[4], float (&first_tile)[4], float (&second_tile)[4], bool diagonal, int j, const RowScales &by) {
    const auto each = [&](const auto &step) {
      step(first_tile, 2 * place);
      step(second_tile, 2 * place + 8);
    };
    each([&](float (&s)[4], int column) {
      if constexpr (GRAD) {
        if constexpr (kFactors) s[0] *= by.factor0, s[1] *= by.factor0, s[2] *= by.factor1, s[3] *= by.factor1;
        s[0] += by.shift0, s[1] += by.shift0, s[2] += by.shift1, s[3] += by.shift1;
      } else {
        const float2 scale = scale_at(16 * j + column), factor = factor_at(16 * j + column), shift = make_float2(by.shift0 * factor.x, by.shift0 * factor.y);
        s[0] = fmaf(s[0] * scale.x, by.slope0, shift.x), s[1] = fmaf(s[1] * scale.y, by.slope0, shift.y);
        s[2] = fmaf(s[2] * scale.x, by.slope1, shift.x), s[3] = fmaf(s[3] * scale.y, by.slope1, shift.y);
      }
    });
    if (GATED && !factors) {
      each([&](float (&s)[4], int column) { gate_pairs(s, diagonal, 16 * j + column); });
    } else if (diagonal) {
      each([&](float (&s)[4], int column) {
        if (column > group) s[0] = 0.f;
        if (column + 1 > group) s[1] = 0.f;
        if (column > group + 8) s[2] = 0.f;
        if (column + 1 > group + 8) s[3] = 0.f;
      });
    }
    if constexpr (GRAD)
      each([&](float (&s)[4], int column) {
        const float2 scale = scale_at(16 * j + column), factor = factor_at(16 * j + column);
        row_sum[0] += s[0] * factor.x + s[1] * factor.y;
        row_sum[2] += s[2] * factor.x + s[3] * factor.y;
        s[0] *= scale.x, s[1] *= scale.y, s[2] *= scale.x, s[3] *= scale.y;
      });
    weights[0] = E::pack(first_tile[0], first_tile[1]), weights[1] = E::pack(first_tile[2], first_tile[3]);
    weights[2] = E::pack(second_tile[0], second_tile[1]), weights[3] = E::pack(second_tile[2], second_tile[3]);
    // The mass is the sum of the rounded weights, so that a constant v comes back as itself.
    if constexpr (!GRAD) E::mma(row_sum, weights, E::kOnes, E::kOnes);
  }

  // Where no factors make it up, each pair's gate.
  __device__ __forceinline__ void gate_pairs(float (&s)[4], bool diagonal, int key) const {
    if constexpr (GATED) {
      const PairGates gate(small.gates.decay[key_stage], small.gates.query_runs[key_stage], local0, local1);
      const float2 decay = *reinterpret_cast<const float2 *>(small.gates.decay[key_stage] + key);
      const int2 run = *reinterpret_cast<const int2 *>(small.gates.key_runs[key_stage] + key);
      s[0] *= gate.of_key(0, decay.x, run.x, !diagonal || key <= local0), s[1] *= gate.of_key(0, decay.y, run.y, !diagonal || key < local0);
      s[2] *= gate.of_key(1, decay.x, run.x, !diagonal || key <= local1), s[3] *= gate.of_key(1, decay.y, run.y, !diagonal || key < local1);
    }
  }

  __device__ __forceinline__ void weigh_scores(const RowScales &scales) {
    warpgroup_wait<1>();
    warpgroup_keep(scores);
    release<kHeld>();
#pragma unroll
    for (int j = 0; j < Shape::STRIPES; ++j) {
      weights_of[j][0] = weights_of[j][1] = weights_of[j][2] = weights_of[j][3] = 0u;
      if (causal && j < stripe) weigh(weights_of[j], scores[2 * j], scores[2 * j + 1], false, j, scales);
      if (causal && j == stripe) weigh(weights_of[j], scores[2 * j], scores[2 * j + 1], true, j, scales);
    }
    warpgroup_wait<0>();
    warpgroup_keep(acc);
    release<kHeldLonger>();
  }

  // What was before the chunk, as the rows weigh it.
  __device__ __forceinline__ void enter(const RowScales &of, const float (&margin)[4]) {
    total0 = __shfl_sync(0xffffffffu, margin[0] + margin[1], lane_id & ~3), total1 = __shfl_sync(0xffffffffu, margin[2] + margin[3], lane_id & ~3);
    const float enter0 = of.factor0 * of.state_worth, enter1 = of.factor1 * of.state_worth;
    if constexpr (kFactors) total0 *= enter0, total1 *= enter1;
    total0 += of.shift0 * before, total1 += of.shift1 * before;
#pragma unroll
    for (int q = 0; q < OUT_PAIRS; ++q)
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const float2 line = *reinterpret_cast<const float2 *>(small.line[Block::state_of(buffer)] + 16 * (first_block + q) + 8 * t + 2 * place);
        if constexpr (kFactors) acc[2 * q + t][0] *= enter0, acc[2 * q + t][1] *= enter0, acc[2 * q + t][2] *= enter1, acc[2 * q + t][3] *= enter1;
        acc[2 * q + t][0] += of.shift0 * line.x, acc[2 * q + t][1] += of.shift0 * line.y;
        acc[2 * q + t][2] += of.shift1 * line.x, acc[2 * q + t][3] += of.shift1 * line.y;
      }
    if (GATED && !factors) {
      total0 *= of.carry0, total1 *= of.carry1;
#pragma unroll
      for (int q = 0; q < 2 * OUT_PAIRS; ++q) acc[q][0] *= of.carry0, acc[q][1] *= of.carry0, acc[q][2] *= of.carry1, acc[q][3] *= of.carry1;
    }
  }

  // The pairs inside the chunk.
  __device__ __forceinline__ void add_pairs(const RowScales &scales) {
    if constexpr (kBeside) gather_by_group();
    else if constexpr (kGroups) add_pairs_by_group(scales);
    else add_pairs_by_warp(scales);
    if constexpr (GRAD) {
      row_sum[0] += __shfl_xor_sync(0xffffffffu, row_sum[0], 1);
      row_sum[2] += __shfl_xor_sync(0xffffffffu, row_sum[2], 1);
      row_sum[0] += __shfl_xor_sync(0xffffffffu, row_sum[0], 2);
      row_sum[2] += __shfl_xor_sync(0xffffffffu, row_sum[2], 2);
    }
    total0 += row_sum[0], total1 += row_sum[2];
  }

  __device__ __forceinline__ void gather_by_group() {
    warpgroup_keep(acc);
    warpgroup_begin();
#pragma unroll
    for (int j = 0; j < Shape::STRIPES; ++j)
      WarpgroupProduct<T, 16 * OUT_PAIRS, true>::run(acc, weights_of[j], warpgroup_operand<D>(z_tile + Tile<D>::rows_at(j) + half_bytes, Tile<D>::kPanelBytes), true);
    warpgroup_commit();
    warpgroup_wait<0>();
    warpgroup_keep(acc);
  }

  __device__ __forceinline__ void add_pairs_by_group(const RowScales &scales) {
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
        WarpgroupProduct<T, 16 * kBlocks, false>::run(part, left_factor<kHeld>(block), warpgroup_operand<D>(y_tile + Tile<D>::rows_at(first_key) + columns), block > 0);
      }
      warpgroup_commit();
      warpgroup_wait<0>();
      warpgroup_keep(part);
      release<kHeld>();
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
        const int j = first_key + i;
        weights[i][0] = weights[i][1] = weights[i][2] = weights[i][3] = 0u;
        if (j < stripe) weigh(weights[i], part[2 * i], part[2 * i + 1], false, j, scales);
        if (j == stripe) weigh(weights[i], part[2 * i], part[2 * i + 1], true, j, scales);
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
  }

  __device__ __forceinline__ void add_pairs_by_warp(const RowScales &scales) {
    const Blocks<D> y_blocks(y_tile, across), z_blocks(z_tile + half_bytes, down);
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
      weigh(weights, s[0], s[1], diagonal, j, scales);
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

  __device__ __forceinline__ void finish_output(const RowScales &of) {
    if (place == 0 && half == 0) {
      const float worth0 = of.mass_worth * (factors ? of.carry0 : 1.f), worth1 = of.mass_worth * (factors ? of.carry1 : 1.f);
      if (local0 < tokens) args.mass_out[first_number + local0] = total0 * worth0;
      if (local1 < tokens) args.mass_out[first_number + local1] = total1 * worth1;
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
  }

  // acc from the gradient of q^ to that of q, and what the column kernel and the coefficients take from these rows.
  __device__ __forceinline__ void finish_gradient(RowScales &of) {
    if (half == 0) put_rows(of);
    if (GATED && factors) of.slope0 *= of.carry0, of.slope1 *= of.carry1;
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
    if (half == 0) put_sums(of, dot0, dot1);
    finish0 = of.b_tau * of.query_scale0 * of.slope0, finish1 = of.b_tau * of.query_scale1 * of.slope1;
    if (unit) {
      dot0 *= of.query_scale0 * of.query_scale0, dot1 *= of.query_scale1 * of.query_scale1;
#pragma unroll
      for (int q = 0; q < OUT_PAIRS; ++q)
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          acc[2 * q + t][0] -= E::low(q_rows[q][2 * t]) * dot0, acc[2 * q + t][1] -= E::high(q_rows[q][2 * t]) * dot0;
          acc[2 * q + t][2] -= E::low(q_rows[q][2 * t + 1]) * dot1, acc[2 * q + t][3] -= E::high(q_rows[q][2 * t + 1]) * dot1;
        }
    }
  }

  __device__ __forceinline__ void put_rows(const RowScales &of) const {
    if (place == 0 && !(GATED && args.noised)) {
      if (local0 < tokens) args.error[first_number + local0] = of.shift0 * of.slope0, args.query_scale[first_number + local0] = of.query_scale0;
      if (local1 < tokens) args.error[first_number + local1] = of.shift1 * of.slope1, args.query_scale[first_number + local1] = of.query_scale1;
    }
  }

  __device__ __forceinline__ void put_sums(const RowScales &of, float dot0, float dot1) {
    const bool real0 = local0 < tokens, real1 = local1 < tokens;
    if constexpr (GATED)
      if (args.row_sums && place == 0) {
        if (real0) args.row_sums[first_number + local0] = of.slope0 * (of.a * total0 + of.b_tau * of.query_scale0 * dot0);
        if (real1) args.row_sums[first_number + local1] = of.slope1 * (of.a * total1 + of.b_tau * of.query_scale1 * dot1);
      }
    float pairs = (real0 ? total0 * of.slope0 : 0.f) + (real1 ? total1 * of.slope1 : 0.f);
    float products = (real0 ? dot0 * of.query_scale0 * of.slope0 : 0.f) + (real1 ? dot1 * of.query_scale1 * of.slope1 : 0.f);
#pragma unroll
    for (int step = 4; step < 32; step *= 2) {
      pairs += __shfl_xor_sync(0xffffffffu, pairs, step);
      products += __shfl_xor_sync(0xffffffffu, products, step);
    }
    if (lane_id == 0) small.totals[warp][head][0] += pairs, small.totals[warp][head][1] += products;
  }

  // The results are staged over x, which the warp of the other half must have read; with sums, which x goes into, over the outputs.
  __device__ __forceinline__ void store() {
    if (Shape::HALVES == 2 && !GRAD && (kGroups || !causal || head != 0)) barrier_sync<kHalvesExchanged, 32 * Shape::RESULT_WARPS>();
    __syncwarp();
    const Blocks<D> staged(rows + (SUMS ? TILE : 0) + stripe * kStripeBytes + half_bytes, down);
#pragma unroll
    for (int q = 0; q < OUT_PAIRS; ++q) store_block<T, D>(staged.at(0, q), acc[2 * q], acc[2 * q + 1], finish0, finish1, lane_id);
    __syncwarp();
    store_stripe<T, D, 2 * OUT_PAIRS>(result_rows, args.result.token_stride, job.shared + (stage * ROW_TILES + (SUMS ? 1 : 0)) * TILE, 16 * stripe, tokens, lane_id,
                                      [&](int i) { return 2 * first_block + i; });
  }

  static __device__ __forceinline__ int next(int i, int count) { return i >= count - Shape::GROUPS ? i - (count - Shape::GROUPS) : i + Shape::GROUPS; }

  // To the group's next head, or the next round.
  __device__ __forceinline__ void advance() {
    stage = next(stage, STAGES);
    if (head == heads - 1) {
      head = 0;
      key_stage = next(key_stage, STAGES);
      if constexpr (Block::kAhead) buffer = next(buffer, Shape::BUFFERS);
      if (!kGroups) stripe = Shape::STRIPES - 1 - stripe;
      left -= kRound;
      first_number += kRound - (heads - 1) * p.length;
      result_rows += kRound * args.result.token_stride - (heads - 1) * args.result.head_stride;
      if (causal && !GATED) before += kRound;
    } else {
      ++head;
      first_number += p.length;
      result_rows += args.result.head_stride;
    }
  }
};

}  // namespace linattn_stream
