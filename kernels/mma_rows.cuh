// The forward direction in n: o (forward) or dq (backward), one block a (batch, key head, segment), chunk after chunk.
//
// Both are the same sums with other names. With x the row operand, y the key operand, z the value operand and r_n = 1 / |k_n|:
//   forward   x = q, y = k, z = v:   o_i  g_i = sum_n (a + alpha_i (x_i . y_n) r_n) z_n           alpha_i = b tau / |q_i|
//   gradient  x = W, y = v, z = k:   dq^_i    = b tau sum_n ((x_i . y_n) / g_i + e_i) r_n z_n
// Inside a chunk through the masked matrix of pairs, before it through the state sum_n r_n y_n z_n^T (float32 in registers, rounded once a chunk).
#pragma once
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
};

template <int D, bool GRAD> struct RowShape {
  static constexpr int C = D == 32 || D == 128 ? 64 : D;
  static constexpr int STRIPES = C / 16;
  static constexpr int WARPS = D == 128 ? 8 : STRIPES;
  static constexpr int THREADS = 32 * WARPS;
  static constexpr int HALVES = WARPS / STRIPES;         // the columns of a stripe's results are shared out among so many warps
  static constexpr int BLOCKS = D / 16;                  // 16-wide blocks along D
  static constexpr int OUT_PAIRS = BLOCKS / HALVES;
  static constexpr int STATE_SPLIT = WARPS / BLOCKS;     // warps to a row block of the state
  static constexpr int STATE_PAIRS = BLOCKS / STATE_SPLIT;
  static constexpr int STAGES = 2;
  static constexpr int ROW_TILES = GRAD ? 3 : 1;         // x; and o, q for the gradient
  static constexpr int TILE = C * D * 2;
  static constexpr int STATE_TILE = D * D * 2;
  static constexpr int MIN_BLOCKS = D == 32 ? 4 : D == 64 ? (GRAD ? 2 : 3) : D == 80 ? 2 : 1;
  struct Small {
    float key_scale[C];
    float line[D];
    alignas(16) uint16_t key_high[C], key_low[C], column_high[D], column_low[D];
    float exchange[2][C];
    float totals[WARPS][kMaxGroup][2];
  };
  static constexpr int SHARED = STAGES * (ROW_TILES + 2) * TILE + STATE_TILE + static_cast<int>(sizeof(Small));
};

template <typename T, int D, bool GRAD>
__global__ void __launch_bounds__(RowShape<D, GRAD>::THREADS, RowShape<D, GRAD>::MIN_BLOCKS)
rows_kernel(const __grid_constant__ RowArguments args) {
  using Shape = RowShape<D, GRAD>;
  using E = Element<T>;
  constexpr int C = Shape::C, BLOCKS = Shape::BLOCKS, OUT_PAIRS = Shape::OUT_PAIRS, STATE_PAIRS = Shape::STATE_PAIRS;
  constexpr int STAGES = Shape::STAGES, TILE = Shape::TILE, ROW_TILES = Shape::ROW_TILES;
  extern __shared__ __align__(128) unsigned char shared[];
  typename Shape::Small &small = *reinterpret_cast<typename Shape::Small *>(shared + STAGES * (ROW_TILES + 2) * TILE + Shape::STATE_TILE);
  T *const key_high = reinterpret_cast<T *>(small.key_high), *const key_low = reinterpret_cast<T *>(small.key_low);
  T *const column_high = reinterpret_cast<T *>(small.column_high), *const column_low = reinterpret_cast<T *>(small.column_low);

  const linattn_problem &p = args.problem;
  const int thread = threadIdx.x, lane_id = thread & 31, warp = thread >> 5, group = lane_id >> 2, place = lane_id & 3;
  const Lane<D> lane(lane_id);
  const uint32_t row_tiles = shared_address(shared);                               // (stage, ROW_TILES)
  const uint32_t key_tiles = row_tiles + STAGES * ROW_TILES * TILE;                // (stage, y and z)
  const uint32_t state_tile = key_tiles + STAGES * 2 * TILE;

  const int head_pair = blockIdx.x / args.segments, segment = blockIdx.x % args.segments;
  const int batch = head_pair / p.key_heads, key_head = head_pair % p.key_heads, heads = p.query_heads / p.key_heads;
  const int64_t begin = segment * args.segment_length, end = min(p.length, begin + args.segment_length);
  const int iterations = static_cast<int>((end - begin + C - 1) / C) * heads;
  const bool causal = p.causal, unit = p.normalize_qk;

  const T *const y_head = head_of<const T>(GRAD ? p.value : p.key, batch, key_head);
  const T *const z_head = head_of<const T>(GRAD ? p.key : p.value, batch, key_head);
  const int64_t y_stride = GRAD ? p.value.token_stride : p.key.token_stride, z_stride = GRAD ? p.key.token_stride : p.value.token_stride;
  const linattn_tensor &x = GRAD ? args.grad_out : p.query;

  const auto prefetch = [&](int iteration) {
    if (iteration < iterations) {
      const int chunk = iteration / heads, head = iteration - chunk * heads, query_head = key_head * heads + head;
      const int64_t first = begin + static_cast<int64_t>(chunk) * C;
      const uint32_t rows = row_tiles + (iteration % STAGES) * ROW_TILES * TILE;
      copy_tile<T, D, C, Shape::THREADS>(rows, head_of<const T>(x, batch, query_head), x.token_stride, first, end, thread);
      if constexpr (GRAD) {
        copy_tile<T, D, C, Shape::THREADS>(rows + TILE, head_of<const T>(args.out, batch, query_head), args.out.token_stride, first, end, thread);
        copy_tile<T, D, C, Shape::THREADS>(rows + 2 * TILE, head_of<const T>(p.query, batch, query_head), p.query.token_stride, first, end, thread);
      }
      if (causal && head == 0) {
        const uint32_t keys = key_tiles + (chunk % STAGES) * 2 * TILE;
        copy_tile<T, D, C, Shape::THREADS>(keys, y_head, y_stride, first, end, thread);
        copy_tile<T, D, C, Shape::THREADS>(keys + TILE, z_head, z_stride, first, end, thread);
      }
    }
    copy_commit();
  };

  const int state_row = Shape::STATE_SPLIT > 1 ? warp % BLOCKS : warp, state_part = Shape::STATE_SPLIT > 1 ? warp / BLOCKS : 0;
  const int half = Shape::HALVES > 1 ? warp / Shape::STRIPES : 0;
  // Which block of columns a warp calls its p-th: its own part comes first, in results and state alike, so that registers have fixed indices.
  const int turn = Shape::HALVES > 1 ? half * OUT_PAIRS : Shape::STATE_SPLIT > 1 ? state_part * STATE_PAIRS : 0;
  const int line_pair = (state_row - turn + BLOCKS) % BLOCKS;

#pragma unroll
  for (int i = 0; i < STAGES - 1; ++i) prefetch(i);
  StateTile<T, STATE_PAIRS> state;
  const StatePlace place_of_state(state_row, state_part == 0, turn, STATE_PAIRS, lane_id);
  const float count = load_state<D>(state, place_of_state, args.states ? StateView<D>::of_segment(args.states, head_pair, args.segments, causal ? segment : 0)
                                                                       : StateView<D>::of_caller(p.initial_state, head_pair), GRAD);
  if constexpr (GRAD)
    for (int i = thread; i < Shape::WARPS * kMaxGroup * 2; i += Shape::THREADS) (&small.totals[0][0][0])[i] = 0.f;

  int chunk = 0, head = 0;
  for (int iteration = 0; iteration < iterations; ++iteration) {
    const int query_head = key_head * heads + head;
    const int64_t first = begin + static_cast<int64_t>(chunk) * C;
    const int64_t rows_of_head = (static_cast<int64_t>(batch) * p.query_heads + query_head) * p.length;
    // Later stripes see more keys; turning them every chunk evens the load of the four schedulers.
    const int place_in_half = warp % Shape::STRIPES;
    const int stripe = (chunk + half) & 1 ? Shape::STRIPES - 1 - place_in_half : place_in_half;
    const int local0 = 16 * stripe + group, local1 = local0 + 8;
    const uint32_t rows = row_tiles + (iteration % STAGES) * ROW_TILES * TILE;
    const uint32_t y_tile = key_tiles + (chunk % STAGES) * 2 * TILE, z_tile = y_tile + TILE, k_tile = GRAD ? z_tile : y_tile;
    const float a = p.coefficients[query_head], b = p.coefficients[p.query_heads + query_head], tau = p.coefficients[3 * p.query_heads + query_head];
    float mass0 = 1.f, mass1 = 1.f, extra0 = 0.f, extra1 = 0.f;
    if constexpr (GRAD) {
      if (first + local0 < end) mass0 = args.mass[rows_of_head + first + local0];
      if (first + local1 < end) mass1 = args.mass[rows_of_head + first + local1];
      if (args.grad_mass) {
        if (first + local0 < end) extra0 = args.grad_mass[rows_of_head + first + local0];
        if (first + local1 < end) extra1 = args.grad_mass[rows_of_head + first + local1];
      }
    }

    copy_wait<STAGES - 2>();
    __syncthreads();  // the tiles are here, and nobody reads the ones that the next copies overwrite
    prefetch(iteration + STAGES - 1);

    if (head == 0) {
      if (causal && half == 0) {
        float square0 = 1.f, square1 = 1.f;
        if (unit) {
          uint32_t k[BLOCKS][4];
#pragma unroll
          for (int block = 0; block < BLOCKS; ++block) load_rows<D>(k[block], lane, k_tile, stripe, block);
          row_products<T, BLOCKS>(square0, square1, k, k, lane_id);
          square0 = inverse_norm(square0), square1 = inverse_norm(square1);
        }
        if (place == 0) {
          small.key_scale[local0] = square0, small.key_scale[local1] = square1;
          store_split(key_high, key_low, local0, square0);
          store_split(key_high, key_low, local1, square1);
        }
      }
      if (causal || chunk == 0)
        publish_state<T, D>(state, place_of_state, shared + STAGES * (ROW_TILES + 2) * TILE, small.line, [&](int row, float sum) { store_split(column_high, column_low, row, sum); });
    }
    uint32_t xs[BLOCKS][4];
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) load_rows<D>(xs[block], lane, rows, stripe, block);

    // Per row: weight = slope (x . y) + shift, times r_n in the gradient.
    float slope0, slope1, shift0, shift1, query_scale0 = 1.f, query_scale1 = 1.f;
    if constexpr (!GRAD) {
      if (unit) {
        row_products<T, BLOCKS>(query_scale0, query_scale1, xs, xs, lane_id);
        query_scale0 = inverse_norm(query_scale0), query_scale1 = inverse_norm(query_scale1);
      }
      slope0 = b * tau * query_scale0, slope1 = b * tau * query_scale1;
      shift0 = shift1 = a;
    } else {
      uint32_t others[BLOCKS][4];
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block) load_rows<D>(others[block], lane, rows + TILE, stripe, block);
      row_products<T, BLOCKS>(shift0, shift1, xs, others, lane_id);
      slope0 = mass0 == 0.f ? 0.f : 1.f / mass0, slope1 = mass1 == 0.f ? 0.f : 1.f / mass1;
      shift0 = extra0 - shift0 * slope0, shift1 = extra1 - shift1 * slope1;
      if (unit) {
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block) load_rows<D>(others[block], lane, rows + 2 * TILE, stripe, block);
        row_products<T, BLOCKS>(query_scale0, query_scale1, others, others, lane_id);
        query_scale0 = inverse_norm(query_scale0), query_scale1 = inverse_norm(query_scale1);
      }
    }
    __syncthreads();  // the rounded state and the key scales are written

    float acc[OUT_PAIRS][2][4], margin[4] = {0, 0, 0, 0};
#pragma unroll
    for (int q = 0; q < OUT_PAIRS; ++q)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[q][0][i] = acc[q][1][i] = 0.f;
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) {
#pragma unroll
      for (int q = 0; q < OUT_PAIRS; ++q) {
        uint32_t s[4];
        load_columns_straight<D>(s, lane, state_tile, block, (q + turn) % BLOCKS);
        E::mma(acc[q][0], xs[block], s[0], s[1]);
        E::mma(acc[q][1], xs[block], s[2], s[3]);
      }
      const T *const part = group == 0 ? column_high : column_low;
      const uint32_t b0 = group < 2 ? *reinterpret_cast<const uint32_t *>(part + 16 * block + 2 * place) : 0u;
      const uint32_t b1 = group < 2 ? *reinterpret_cast<const uint32_t *>(part + 16 * block + 8 + 2 * place) : 0u;
      E::mma(margin, xs[block], b0, b1);
    }
    const float before = count + (causal ? static_cast<float>(chunk) * C : 0.f);
    float total0 = slope0 * __shfl_sync(0xffffffffu, margin[0] + margin[1], lane_id & ~3) + shift0 * before;
    float total1 = slope1 * __shfl_sync(0xffffffffu, margin[2] + margin[3], lane_id & ~3) + shift1 * before;
#pragma unroll
    for (int q = 0; q < OUT_PAIRS; ++q)
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const float2 line = *reinterpret_cast<const float2 *>(small.line + 16 * ((q + turn) % BLOCKS) + 8 * t + 2 * place);
        acc[q][t][0] = acc[q][t][0] * slope0 + shift0 * line.x;
        acc[q][t][1] = acc[q][t][1] * slope0 + shift0 * line.y;
        acc[q][t][2] = acc[q][t][2] * slope1 + shift1 * line.x;
        acc[q][t][3] = acc[q][t][3] * slope1 + shift1 * line.y;
      }

    if (causal) {
      float row_sum[4] = {0, 0, 0, 0};
#pragma unroll 1
      for (int j = 0; j < Shape::STRIPES; ++j) {
        const bool visible = j <= stripe;
        if (!visible && head != 0) break;
        uint32_t weights[4];
        if (visible) {
          float s[2][4];
#pragma unroll
          for (int i = 0; i < 4; ++i) s[0][i] = s[1][i] = 0.f;
#pragma unroll
          for (int block = 0; block < BLOCKS; ++block) {
            uint32_t y[4];
            load_columns<D>(y, lane, y_tile, j, block);
            E::mma(s[0], xs[block], y[0], y[1]);
            E::mma(s[1], xs[block], y[2], y[3]);
          }
#pragma unroll
          for (int t = 0; t < 2; ++t) {
            const int column = 8 * t + 2 * place;
            const float2 scale = *reinterpret_cast<const float2 *>(small.key_scale + 16 * j + column);
            if constexpr (!GRAD) {
              s[t][0] = s[t][0] * (slope0 * scale.x) + shift0;
              s[t][1] = s[t][1] * (slope0 * scale.y) + shift0;
              s[t][2] = s[t][2] * (slope1 * scale.x) + shift1;
              s[t][3] = s[t][3] * (slope1 * scale.y) + shift1;
            } else {
              s[t][0] = s[t][0] * slope0 + shift0;
              s[t][1] = s[t][1] * slope0 + shift0;
              s[t][2] = s[t][2] * slope1 + shift1;
              s[t][3] = s[t][3] * slope1 + shift1;
            }
            if (j == stripe) {
              if (column > group) s[t][0] = 0.f;
              if (column + 1 > group) s[t][1] = 0.f;
              if (column > group + 8) s[t][2] = 0.f;
              if (column + 1 > group + 8) s[t][3] = 0.f;
            }
            if constexpr (GRAD) {
              row_sum[0] += s[t][0] + s[t][1];
              row_sum[2] += s[t][2] + s[t][3];
              s[t][0] *= scale.x, s[t][1] *= scale.y, s[t][2] *= scale.x, s[t][3] *= scale.y;
            }
          }
          weights[0] = E::pack(s[0][0], s[0][1]);
          weights[1] = E::pack(s[0][2], s[0][3]);
          weights[2] = E::pack(s[1][0], s[1][1]);
          weights[3] = E::pack(s[1][2], s[1][3]);
          // The mass is the sum of the rounded weights, so that a constant v comes back as itself.
          if constexpr (!GRAD) E::mma(row_sum, weights, E::kOnes, E::kOnes);
        }
        uint32_t y[4], scaled[4], high0, high1, low0, low1;
        if (head == 0) {
          load_rows_transposed<D>(y, lane, y_tile, j, state_row);
          high0 = *reinterpret_cast<const uint32_t *>(key_high + 16 * j + 2 * place), high1 = *reinterpret_cast<const uint32_t *>(key_high + 16 * j + 8 + 2 * place);
          low0 = *reinterpret_cast<const uint32_t *>(key_low + 16 * j + 2 * place), low1 = *reinterpret_cast<const uint32_t *>(key_low + 16 * j + 8 + 2 * place);
          scaled[0] = scale_two<T>(y[0], high0, low0), scaled[1] = scale_two<T>(y[1], high0, low0);
          scaled[2] = scale_two<T>(y[2], high1, low1), scaled[3] = scale_two<T>(y[3], high1, low1);
        }
        const uint32_t scale_line0 = group == 0 ? high0 : group == 1 ? low0 : 0u, scale_line1 = group == 0 ? high1 : group == 1 ? low1 : 0u;
        const uint32_t ones = group == 0 ? E::kOnes : 0u;
        // forward: column = sum of unit keys, line = sum of v; gradient: column = sum of v, line = sum of unit keys.
        if (head == 0 && state_part == 0) E::mma(state.column, y, GRAD ? ones : scale_line0, GRAD ? ones : scale_line1);
        constexpr int kPairs = OUT_PAIRS > STATE_PAIRS ? OUT_PAIRS : STATE_PAIRS;
#pragma unroll
        for (int q = 0; q < kPairs; ++q) {
          if (q < OUT_PAIRS || head == 0) {
            uint32_t z[4];
            load_columns_straight<D>(z, lane, z_tile, j, (q + turn) % BLOCKS);
            if (q < OUT_PAIRS && visible) {
              E::mma(acc[q < OUT_PAIRS ? q : 0][0], weights, z[0], z[1]);
              E::mma(acc[q < OUT_PAIRS ? q : 0][1], weights, z[2], z[3]);
            }
            if (q < STATE_PAIRS && head == 0) {
              E::mma(state.sum[q < STATE_PAIRS ? q : 0][0], scaled, z[0], z[1]);
              E::mma(state.sum[q < STATE_PAIRS ? q : 0][1], scaled, z[2], z[3]);
              if (q == line_pair) {
                const uint32_t line[4] = {GRAD ? scale_line0 : ones, 0u, GRAD ? scale_line1 : ones, 0u};
                E::mma(state.line[0], line, z[0], z[1]);
                E::mma(state.line[1], line, z[2], z[3]);
              }
            }
          }
        }
      }
      if constexpr (GRAD) {
        row_sum[0] += __shfl_xor_sync(0xffffffffu, row_sum[0], 1);
        row_sum[2] += __shfl_xor_sync(0xffffffffu, row_sum[2], 1);
        row_sum[0] += __shfl_xor_sync(0xffffffffu, row_sum[0], 2);
        row_sum[2] += __shfl_xor_sync(0xffffffffu, row_sum[2], 2);
      }
      total0 += row_sum[0], total1 += row_sum[2];
    }

    unsigned char *const staging = shared + (iteration % STAGES) * ROW_TILES * TILE;
    float finish0, finish1;
    if constexpr (!GRAD) {
      if (place == 0 && half == 0) {
        if (first + local0 < end) args.mass_out[rows_of_head + first + local0] = total0;
        if (first + local1 < end) args.mass_out[rows_of_head + first + local1] = total1;
      }
      finish0 = total0 == 0.f ? 1.f : 1.f / total0, finish1 = total1 == 0.f ? 1.f : 1.f / total1;
    } else {
      uint32_t q_rows[OUT_PAIRS][4];
      float dot0 = 0.f, dot1 = 0.f;
#pragma unroll
      for (int q = 0; q < OUT_PAIRS; ++q) {
        load_rows<D>(q_rows[q], lane, rows + 2 * TILE, stripe, (q + turn) % BLOCKS);
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          dot0 += E::low(q_rows[q][2 * t]) * acc[q][t][0] + E::high(q_rows[q][2 * t]) * acc[q][t][1];
          dot1 += E::low(q_rows[q][2 * t + 1]) * acc[q][t][2] + E::high(q_rows[q][2 * t + 1]) * acc[q][t][3];
        }
      }
#pragma unroll
      for (int step = 1; step < 4; step *= 2) {
        dot0 += __shfl_xor_sync(0xffffffffu, dot0, step);
        dot1 += __shfl_xor_sync(0xffffffffu, dot1, step);
      }
      if constexpr (Shape::HALVES == 2) {
        if (place == 0) small.exchange[half][local0] = dot0, small.exchange[half][local1] = dot1;
        __syncthreads();
        dot0 = small.exchange[0][local0] + small.exchange[1][local0];
        dot1 = small.exchange[0][local1] + small.exchange[1][local1];
      }
      if (half == 0) {
        const bool real0 = first + local0 < end, real1 = first + local1 < end;
        if (place == 0) {
          if (real0) args.error[rows_of_head + first + local0] = shift0, args.query_scale[rows_of_head + first + local0] = query_scale0;
          if (real1) args.error[rows_of_head + first + local1] = shift1, args.query_scale[rows_of_head + first + local1] = query_scale1;
        }
        float pairs = (real0 ? total0 : 0.f) + (real1 ? total1 : 0.f);
        float products = (real0 ? dot0 * query_scale0 : 0.f) + (real1 ? dot1 * query_scale1 : 0.f);
#pragma unroll
        for (int step = 4; step < 32; step *= 2) {
          pairs += __shfl_xor_sync(0xffffffffu, pairs, step);
          products += __shfl_xor_sync(0xffffffffu, products, step);
        }
        if (lane_id == 0) small.totals[warp][head][0] += pairs, small.totals[warp][head][1] += products;
      }
      finish0 = b * tau * query_scale0, finish1 = b * tau * query_scale1;
      if (unit) {
        dot0 *= query_scale0 * query_scale0, dot1 *= query_scale1 * query_scale1;
#pragma unroll
        for (int q = 0; q < OUT_PAIRS; ++q)
#pragma unroll
          for (int t = 0; t < 2; ++t) {
            acc[q][t][0] -= E::low(q_rows[q][2 * t]) * dot0, acc[q][t][1] -= E::high(q_rows[q][2 * t]) * dot0;
            acc[q][t][2] -= E::low(q_rows[q][2 * t + 1]) * dot1, acc[q][t][3] -= E::high(q_rows[q][2 * t + 1]) * dot1;
          }
      }
    }
    __syncwarp();
#pragma unroll
    for (int q = 0; q < OUT_PAIRS; ++q)
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const int piece = 2 * ((q + turn) % BLOCKS) + t;
        *reinterpret_cast<uint32_t *>(staging + Tile<D>::at(local0, piece) + 4 * place) = E::pack(acc[q][t][0] * finish0, acc[q][t][1] * finish0);
        *reinterpret_cast<uint32_t *>(staging + Tile<D>::at(local1, piece) + 4 * place) = E::pack(acc[q][t][2] * finish1, acc[q][t][3] * finish1);
      }
    __syncwarp();
    store_stripe<T, D, 2 * OUT_PAIRS>(head_of<T>(args.result, batch, query_head), args.result.token_stride, staging, 16 * stripe,
                                      Shape::HALVES > 1 ? half * 2 * OUT_PAIRS : 0, first, end, lane_id);
    if (++head == heads) head = 0, ++chunk;
  }

  if constexpr (!GRAD) {
    if (args.final_state && segment == args.segments - 1)
      store_state<D>(state, place_of_state, StateView<D>::of_caller(args.final_state, head_pair), count + (causal ? static_cast<float>(end - begin) : 0.f), thread == 0);
  } else {
    __syncthreads();
    if (thread < heads * 2) {
      float total = 0.f;
      for (int w = 0; w < Shape::STRIPES; ++w) total += small.totals[w][thread / 2][thread % 2];
      args.partials[((static_cast<int64_t>(batch) * p.query_heads + key_head * heads + thread / 2) * args.segments + segment) * 2 + thread % 2] = total;
    }
  }
  copy_wait<0>();
}

}  // namespace linattn_mma
