// The backward direction in n: dk and dv, one block a (batch, key head, segment), chunk after chunk from the last token to the first.
// With the rows' mass g_i, e_i and 1 / |q_i| from the row kernel, and r_n = 1 / |k_n|, summed over the group's query heads:
//   dv_n  = sum_i (level_i + mixed_i r_n (k_n . q_i)) W_i               level = a / g, mixed = b tau / (|q| g)
//   dk^_n = sum_i (mixed_i (v_n . W_i) + slope_i) q_i                    slope = b tau e / |q|
// Half of the warps take dv, half dk; both need the state R = sum_i mixed_i q_i W_i^T of the later chunks, and its margins.
#pragma once
#include "mma_state.cuh"

namespace linattn_mma {

struct ColumnArguments {
  linattn_problem problem;
  linattn_tensor grad_out, grad_key, grad_value;
  const float *mass, *error, *query_scale;
  const float *states;             // of the segments after each, or null: grad_state or nothing
  const float *grad_state;
  float *grad_initial_state;       // one segment only, or null
  int32_t segments;
  int64_t segment_length;
};

template <int D> struct ColumnShape {
  static constexpr int C = D == 32 || D == 128 ? 64 : D;
  static constexpr int STRIPES = C / 16, BLOCKS = D / 16;
  static constexpr int WARPS = 2 * STRIPES, THREADS = 32 * WARPS;
  static constexpr int SPLIT = WARPS / BLOCKS < BLOCKS ? WARPS / BLOCKS : BLOCKS;  // warps to a row block of the state
  static constexpr int PAIRS = (BLOCKS + SPLIT - 1) / SPLIT;
  static constexpr int STAGES = 2, TILE = C * D * 2, STATE_TILE = D * D * 2;
  static constexpr int MIN_BLOCKS = D == 32 ? 3 : D == 64 ? 2 : 1;
  struct Small {
    float mixed[C], level[C], slope[C], column[D], line[D];
    alignas(16) uint16_t high[3][C], low[3][C];
    float counts[WARPS];
  };
  static constexpr int SHARED = STAGES * 4 * TILE + STATE_TILE + static_cast<int>(sizeof(Small));
};

template <typename T, int D>
__global__ void __launch_bounds__(ColumnShape<D>::THREADS, ColumnShape<D>::MIN_BLOCKS) columns_kernel(const __grid_constant__ ColumnArguments args) {
  using Shape = ColumnShape<D>;
  using E = Element<T>;
  constexpr int C = Shape::C, BLOCKS = Shape::BLOCKS, STAGES = Shape::STAGES, TILE = Shape::TILE, STRIPES = Shape::STRIPES;
  extern __shared__ __align__(128) unsigned char shared[];
  unsigned char *const state_bytes = shared + STAGES * 4 * TILE;
  typename Shape::Small &small = *reinterpret_cast<typename Shape::Small *>(state_bytes + Shape::STATE_TILE);
  const auto weights_of = [&](int i) { return SplitWeights<T>{reinterpret_cast<const T *>(small.high[i]), reinterpret_cast<const T *>(small.low[i])}; };
  const auto set_weight = [&](int i, int token, float value) { store_split(reinterpret_cast<T *>(small.high[i]), reinterpret_cast<T *>(small.low[i]), token, value); };

  const linattn_problem &p = args.problem;
  const int thread = threadIdx.x, lane_id = thread & 31, warp = thread >> 5, group = lane_id >> 2, place = lane_id & 3;
  const Lane<D> lane(lane_id);
  const uint32_t key_tiles = shared_address(shared);                    // (stage, k and v)
  const uint32_t query_tiles = key_tiles + STAGES * 2 * TILE;           // (stage, q and W)
  const uint32_t state_tile = query_tiles + STAGES * 2 * TILE;

  const int head_pair = blockIdx.x / args.segments, segment = blockIdx.x % args.segments;
  const int batch = head_pair / p.key_heads, key_head = head_pair % p.key_heads, heads = p.query_heads / p.key_heads;
  const int64_t begin = segment * args.segment_length, end = min(p.length, begin + args.segment_length);
  const int chunks = static_cast<int>((end - begin + C - 1) / C), iterations = p.causal ? chunks * heads : chunks;
  const bool causal = p.causal, unit = p.normalize_qk;

  const T *const key = head_of<const T>(p.key, batch, key_head), *const value = head_of<const T>(p.value, batch, key_head);
  const auto prefetch = [&](int iteration) {
    if (iteration < iterations) {
      const int step = causal ? iteration / heads : iteration, head = causal ? iteration - step * heads : 0, query_head = key_head * heads + head;
      const int64_t first = begin + static_cast<int64_t>(chunks - 1 - step) * C;
      if (head == 0) {
        const uint32_t keys = key_tiles + (step % STAGES) * 2 * TILE;
        copy_tile<T, D, C, Shape::THREADS>(keys, key, p.key.token_stride, first, end, thread);
        copy_tile<T, D, C, Shape::THREADS>(keys + TILE, value, p.value.token_stride, first, end, thread);
      }
      if (causal) {
        const uint32_t queries = query_tiles + (iteration % STAGES) * 2 * TILE;
        copy_tile<T, D, C, Shape::THREADS>(queries, head_of<const T>(p.query, batch, query_head), p.query.token_stride, first, end, thread);
        copy_tile<T, D, C, Shape::THREADS>(queries + TILE, head_of<const T>(args.grad_out, batch, query_head), args.grad_out.token_stride, first, end, thread);
      }
    }
    copy_commit();
  };
  float count = 0.f;
  // The three numbers of a query token, fetched one iteration ahead by the thread that will derive its weights.
  float mass = 1.f, error = 0.f, query_scale = 0.f;
  const auto fetch_scalars = [&](int iteration) {
    mass = 1.f, error = 0.f, query_scale = 0.f;
    if (!causal || thread >= C || iteration >= iterations) return;
    const int step = iteration / heads, head = key_head * heads + iteration - step * heads;
    const int64_t token = begin + static_cast<int64_t>(chunks - 1 - step) * C + thread;
    if (token >= end) {
      mass = 0.f;
      return;
    }
    const int64_t index = (static_cast<int64_t>(batch) * p.query_heads + head) * p.length + token;
    mass = args.mass[index], error = args.error[index], query_scale = args.query_scale[index];
  };

#pragma unroll
  for (int i = 0; i < STAGES - 1; ++i) prefetch(i);
  fetch_scalars(0);
  const int state_row = warp % BLOCKS, state_part = warp / BLOCKS;
  const bool holds_state = state_part < Shape::SPLIT;
  const StatePlace at(state_row, state_part == 0, state_part * Shape::PAIRS, min(Shape::PAIRS, BLOCKS - state_part * Shape::PAIRS), lane_id);
  StateTile<T, Shape::PAIRS> state;
  state.clear();
  const StateView<D> source = args.states ? StateView<D>::of_segment(args.states, head_pair, args.segments, causal ? segment : 0)
                                          : StateView<D>::of_caller(args.grad_state, head_pair);
  if (holds_state) load_state<D>(state, at, source, false);

  const int role = warp / STRIPES;  // 0: dv, from k; 1: dk, from v
  const int place_in_role = warp % STRIPES;
  uint32_t own[BLOCKS][4];
  float acc[BLOCKS][2][4], key_scale0 = 1.f, key_scale1 = 1.f;
  int step = 0, head = 0;
  for (int iteration = 0; iteration < iterations; ++iteration) {
    const int64_t first = begin + static_cast<int64_t>(chunks - 1 - step) * C;
    const int stripe = (step + role) & 1 ? STRIPES - 1 - place_in_role : place_in_role;
    const int local0 = 16 * stripe + group, local1 = local0 + 8;
    const uint32_t k_tile = key_tiles + (step % STAGES) * 2 * TILE, v_tile = k_tile + TILE;
    const uint32_t q_tile = query_tiles + (iteration % STAGES) * 2 * TILE, w_tile = q_tile + TILE;

    copy_wait<STAGES - 2>();
    __syncthreads();
    prefetch(iteration + STAGES - 1);
    if (causal && thread < C) {
      const int query_head = key_head * heads + head;
      const float a = p.coefficients[query_head], b_tau = p.coefficients[p.query_heads + query_head] * p.coefficients[3 * p.query_heads + query_head];
      const QueryWeights weights = query_weights(a, b_tau, mass, error, query_scale);
      small.mixed[thread] = weights.mixed, small.level[thread] = weights.level, small.slope[thread] = weights.slope;
      set_weight(0, thread, weights.mixed), set_weight(1, thread, weights.level), set_weight(2, thread, weights.slope);
      count += a * error;
    }
    fetch_scalars(iteration + 1);
    if (head == 0) {
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block) load_rows<D>(own[block], lane, role == 0 ? k_tile : v_tile, stripe, block);
      if (unit) {
        uint32_t k[BLOCKS][4];
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block) load_rows<D>(k[block], lane, k_tile, stripe, block);
        row_products<T, BLOCKS>(key_scale0, key_scale1, k, k, lane_id);
        key_scale0 = inverse_norm(key_scale0), key_scale1 = inverse_norm(key_scale1);
      }
      if ((causal || step == 0) && holds_state) publish_state<T, D>(state, at, state_bytes, small.line, [&](int row, float sum) { small.column[row] = sum; });
    }
    __syncthreads();

    const float scale0 = role == 0 ? key_scale0 : 1.f, scale1 = role == 0 ? key_scale1 : 1.f;
    if (head == 0) {
#pragma unroll
      for (int q = 0; q < BLOCKS; ++q)
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[q][0][i] = acc[q][1][i] = 0.f;
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block)
#pragma unroll
        for (int q = 0; q < BLOCKS; ++q) {
          uint32_t s[4];
          if (role == 0) load_columns_straight<D>(s, lane, state_tile, block, q);
          else load_columns<D>(s, lane, state_tile, q, block);
          E::mma(acc[q][0], own[block], s[0], s[1]);
          E::mma(acc[q][1], own[block], s[2], s[3]);
        }
      const float *const margin = role == 0 ? small.line : small.column;
#pragma unroll
      for (int q = 0; q < BLOCKS; ++q)
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          const float2 add = *reinterpret_cast<const float2 *>(margin + 16 * q + 8 * t + 2 * place);
          acc[q][t][0] = acc[q][t][0] * scale0 + add.x, acc[q][t][1] = acc[q][t][1] * scale0 + add.y;
          acc[q][t][2] = acc[q][t][2] * scale1 + add.x, acc[q][t][3] = acc[q][t][3] * scale1 + add.y;
        }
    }

    if (causal) {
      const uint32_t pair_tile = role == 0 ? q_tile : w_tile, sum_tile = role == 0 ? w_tile : q_tile;
      const float *const shifts = role == 0 ? small.level : small.slope;
#pragma unroll 1
      for (int j = stripe; j < STRIPES; ++j) {
        float s[2][4];
#pragma unroll
        for (int i = 0; i < 4; ++i) s[0][i] = s[1][i] = 0.f;
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block) {
          uint32_t other[4];
          load_columns<D>(other, lane, pair_tile, j, block);
          E::mma(s[0], own[block], other[0], other[1]);
          E::mma(s[1], own[block], other[2], other[3]);
        }
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          const int column = 8 * t + 2 * place;
          const float2 mixed = *reinterpret_cast<const float2 *>(small.mixed + 16 * j + column), shift = *reinterpret_cast<const float2 *>(shifts + 16 * j + column);
          s[t][0] = s[t][0] * (scale0 * mixed.x) + shift.x, s[t][1] = s[t][1] * (scale0 * mixed.y) + shift.y;
          s[t][2] = s[t][2] * (scale1 * mixed.x) + shift.x, s[t][3] = s[t][3] * (scale1 * mixed.y) + shift.y;
          if (j == stripe) {
            if (column < group) s[t][0] = 0.f;
            if (column + 1 < group) s[t][1] = 0.f;
            if (column < group + 8) s[t][2] = 0.f;
            if (column + 1 < group + 8) s[t][3] = 0.f;
          }
        }
        const uint32_t weights[4] = {E::pack(s[0][0], s[0][1]), E::pack(s[0][2], s[0][3]), E::pack(s[1][0], s[1][1]), E::pack(s[1][2], s[1][3])};
#pragma unroll
        for (int q = 0; q < BLOCKS; ++q) {
          uint32_t z[4];
          load_columns_straight<D>(z, lane, sum_tile, j, q);
          E::mma(acc[q][0], weights, z[0], z[1]);
          E::mma(acc[q][1], weights, z[2], z[3]);
        }
      }
      if (holds_state) {
#pragma unroll 1
        for (int block = 0; block < STRIPES; ++block)
          update_state<T, D>(state, at, lane, q_tile, w_tile, block, weights_of(0), weights_of(2), weights_of(1));
      }
    }

    const bool last_head = !causal || head == heads - 1;
    if (last_head) {
      // dv is staged over v and dk over k: both were taken into registers before the second barrier, k again just below.
      unsigned char *const staging = shared + (step % STAGES) * 2 * TILE + (role == 0 ? TILE : 0);
      if (role == 1) {
        float dot0 = 0.f, dot1 = 0.f;
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block) {
          uint32_t k[4];
          load_rows<D>(k, lane, k_tile, stripe, block);
#pragma unroll
          for (int t = 0; t < 2; ++t) {
            dot0 += E::low(k[2 * t]) * acc[block][t][0] + E::high(k[2 * t]) * acc[block][t][1];
            dot1 += E::low(k[2 * t + 1]) * acc[block][t][2] + E::high(k[2 * t + 1]) * acc[block][t][3];
          }
        }
#pragma unroll
        for (int shift = 1; shift < 4; shift *= 2) {
          dot0 += __shfl_xor_sync(0xffffffffu, dot0, shift);
          dot1 += __shfl_xor_sync(0xffffffffu, dot1, shift);
        }
        dot0 = unit ? dot0 * key_scale0 * key_scale0 : 0.f, dot1 = unit ? dot1 * key_scale1 * key_scale1 : 0.f;
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block) {
          uint32_t k[4];
          load_rows<D>(k, lane, k_tile, stripe, block);
#pragma unroll
          for (int t = 0; t < 2; ++t) {
            acc[block][t][0] = (acc[block][t][0] - E::low(k[2 * t]) * dot0) * key_scale0, acc[block][t][1] = (acc[block][t][1] - E::high(k[2 * t]) * dot0) * key_scale0;
            acc[block][t][2] = (acc[block][t][2] - E::low(k[2 * t + 1]) * dot1) * key_scale1, acc[block][t][3] = (acc[block][t][3] - E::high(k[2 * t + 1]) * dot1) * key_scale1;
          }
        }
      }
      __syncwarp();
#pragma unroll
      for (int q = 0; q < BLOCKS; ++q)
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          *reinterpret_cast<uint32_t *>(staging + Tile<D>::at(local0, 2 * q + t) + 4 * place) = E::pack(acc[q][t][0], acc[q][t][1]);
          *reinterpret_cast<uint32_t *>(staging + Tile<D>::at(local1, 2 * q + t) + 4 * place) = E::pack(acc[q][t][2], acc[q][t][3]);
        }
      __syncwarp();
      const linattn_tensor &result = role == 0 ? args.grad_value : args.grad_key;
      store_stripe<T, D, 2 * BLOCKS>(head_of<T>(result, batch, key_head), result.token_stride, staging, 16 * stripe, 0, first, end, lane_id);
    }
    if (last_head) head = 0, ++step;
    else ++head;
  }
  copy_wait<0>();

  if (args.grad_initial_state) {
#pragma unroll
    for (int shift = 1; shift < 32; shift *= 2) count += __shfl_xor_sync(0xffffffffu, count, shift);
    if (lane_id == 0) small.counts[warp] = count;
    __syncthreads();
    count = source.data ? source.count() : 0.f;
    for (int w = 0; w < Shape::WARPS; ++w) count += small.counts[w];
    if (holds_state) store_state<D>(state, at, StateView<D>::of_caller(args.grad_initial_state, head_pair), count, thread == 0);
  }
}

}  // namespace linattn_mma
