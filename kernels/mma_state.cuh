// The running state between registers, shared memory and global memory, and the kernels that cut a sequence into segments:
// the sum of every segment, then a scan over the segments of a head.
#pragma once
#include "mma_tile.cuh"

#include <cuda_runtime.h>

namespace linattn_mma {

constexpr int kMaxGroup = 32;  // query heads to a key head

// Where the parts of a state lie: in the workspace (sum, column, line, count one after the other) or as the caller's (D + 1, D + 1) matrix.
template <int D> struct StateView {
  float *data;
  bool callers;
  static __device__ __forceinline__ StateView of_segment(const float *states, int64_t head, int segments, int segment) {
    return {const_cast<float *>(states) + (head * segments + segment) * kStateFloats<D>, false};
  }
  static __device__ __forceinline__ StateView of_caller(const float *state, int64_t head) {
    return {state ? const_cast<float *>(state) + head * (D + 1) * (D + 1) : nullptr, true};
  }
  __device__ __forceinline__ float &sum(int row, int column) const { return data[row * (callers ? D + 1 : D) + column]; }
  __device__ __forceinline__ float &column(int row) const { return data[callers ? row * (D + 1) + D : D * D + row]; }
  __device__ __forceinline__ float &line(int column) const { return data[callers ? D * (D + 1) + column : D * D + D + column]; }
  __device__ __forceinline__ float &count() const { return data[callers ? (D + 1) * (D + 1) - 1 : D * D + 2 * D]; }
};

// Which part of the state a lane holds: row block `row`, column blocks (p + turn) % BLOCKS for p < pairs, margins where it owns them.
struct StatePlace {
  int row, turn, pairs, group, place;
  bool owns_column;
  __device__ __forceinline__ StatePlace(int row_block, bool first_part, int turn_by, int pairs_held, int lane)
      : row(row_block), turn(turn_by), pairs(pairs_held), group(lane >> 2), place(lane & 3), owns_column(first_part) {}
};

// Transposed: the state of (value, key) is that of (key, value) with the margins' roles swapped. Returns the count.
template <int D, typename T, int PAIRS>
__device__ __forceinline__ float load_state(StateTile<T, PAIRS> &state, const StatePlace &at, const StateView<D> view, bool transposed) {
  constexpr int BLOCKS = D / 16;
  state.clear();
  if (!view.data) return 0.f;
#pragma unroll
  for (int p = 0; p < PAIRS; ++p) {
    if (p >= at.pairs) continue;
    const int block = (p + at.turn) % BLOCKS;
#pragma unroll
    for (int t = 0; t < 2; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = 16 * at.row + at.group + 8 * (i >> 1), column = 16 * block + 8 * t + 2 * at.place + (i & 1);
        state.sum[p][t][i] = transposed ? view.sum(column, row) : view.sum(row, column);
      }
      if (block == at.row && at.group == 0) {
        const int column = 16 * block + 8 * t + 2 * at.place;
        state.line[t][0] = transposed ? view.column(column) : view.line(column);
        state.line[t][1] = transposed ? view.column(column + 1) : view.line(column + 1);
      }
    }
  }
  if (at.owns_column && at.place == 0) {
    const int row = 16 * at.row + at.group;
    state.column[0] = transposed ? view.line(row) : view.column(row);
    state.column[2] = transposed ? view.line(row + 8) : view.column(row + 8);
  }
  return view.count();
}

template <int D, typename T, int PAIRS>
__device__ __forceinline__ void store_state(const StateTile<T, PAIRS> &state, const StatePlace &at, const StateView<D> view, float count, bool writes_count) {
  constexpr int BLOCKS = D / 16;
#pragma unroll
  for (int p = 0; p < PAIRS; ++p) {
    if (p >= at.pairs) continue;
    const int block = (p + at.turn) % BLOCKS;
#pragma unroll
    for (int t = 0; t < 2; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        view.sum(16 * at.row + at.group + 8 * (i >> 1), 16 * block + 8 * t + 2 * at.place + (i & 1)) = state.sum[p][t][i];
      if (block == at.row) {
        const float first = state.line[t][0] + __shfl_xor_sync(0xffffffffu, state.line[t][0], 4);
        const float second = state.line[t][1] + __shfl_xor_sync(0xffffffffu, state.line[t][1], 4);
        if (at.group == 0) {
          view.line(16 * block + 8 * t + 2 * at.place) = first;
          view.line(16 * block + 8 * t + 2 * at.place + 1) = second;
        }
      }
    }
  }
  if (at.owns_column && at.place == 0) {
    view.column(16 * at.row + at.group) = state.column[0] + state.column[1];
    view.column(16 * at.row + at.group + 8) = state.column[2] + state.column[3];
  }
  if (writes_count) view.count() = count;
}

// The state rounded into a tile for the products of a chunk; its margins stay exact.
template <typename T, int D, int PAIRS, typename SetColumn>
__device__ __forceinline__ void publish_state(const StateTile<T, PAIRS> &state, const StatePlace &at, unsigned char *tile, float *line, const SetColumn &set_column) {
  constexpr int BLOCKS = D / 16;
  const int row = 16 * at.row + at.group;
#pragma unroll
  for (int p = 0; p < PAIRS; ++p) {
    if (p >= at.pairs) continue;
    const int block = (p + at.turn) % BLOCKS;
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      const int piece = 2 * block + t;
      *reinterpret_cast<uint32_t *>(tile + Tile<D>::at(row, piece) + 4 * at.place) = Element<T>::pack(state.sum[p][t][0], state.sum[p][t][1]);
      *reinterpret_cast<uint32_t *>(tile + Tile<D>::at(row + 8, piece) + 4 * at.place) = Element<T>::pack(state.sum[p][t][2], state.sum[p][t][3]);
      if (block == at.row) {
        const float first = state.line[t][0] + __shfl_xor_sync(0xffffffffu, state.line[t][0], 4);
        const float second = state.line[t][1] + __shfl_xor_sync(0xffffffffu, state.line[t][1], 4);
        if (at.group == 0) *reinterpret_cast<float2 *>(line + 16 * block + 8 * t + 2 * at.place) = make_float2(first, second);
      }
    }
  }
  if (at.owns_column && at.place == 0) {
    set_column(row, state.column[0] + state.column[1]);
    set_column(row + 8, state.column[2] + state.column[3]);
  }
}

// Sixteen tokens into the state: sum += y diag(scale) z^T, column += y column_weights, line += line_weights z; null weights are ones.
// The weights are given in two parts each, whose sum is exact enough.
template <typename T> struct SplitWeights {
  const T *high, *low;
  __device__ __forceinline__ void load(uint32_t &high0, uint32_t &high1, uint32_t &low0, uint32_t &low1, int first, int place) const {
    high0 = *reinterpret_cast<const uint32_t *>(high + first + 2 * place), high1 = *reinterpret_cast<const uint32_t *>(high + first + 8 + 2 * place);
    low0 = *reinterpret_cast<const uint32_t *>(low + first + 2 * place), low1 = *reinterpret_cast<const uint32_t *>(low + first + 8 + 2 * place);
  }
  // As one operand of a product: the high parts in row (or column) 0, the low parts in 1.
  __device__ __forceinline__ void load_vector(uint32_t &first_half, uint32_t &second_half, int first, int group, int place) const {
    const T *const part = group == 0 ? high : low;
    first_half = second_half = 0u;
    if (!high) {
      if (group == 0) first_half = second_half = Element<T>::kOnes;
    } else if (group < 2) {
      first_half = *reinterpret_cast<const uint32_t *>(part + first + 2 * place);
      second_half = *reinterpret_cast<const uint32_t *>(part + first + 8 + 2 * place);
    }
  }
};

template <typename T, int D, int PAIRS>
__device__ __forceinline__ void update_state(StateTile<T, PAIRS> &state, const StatePlace &at, const Lane<D> &lane, uint32_t y_tile, uint32_t z_tile, int block,
                                             const SplitWeights<T> scale, const SplitWeights<T> column_weights, const SplitWeights<T> line_weights) {
  constexpr int BLOCKS = D / 16;
  uint32_t y[4], high0, high1, low0, low1;
  load_rows_transposed<D>(y, lane, y_tile, block, at.row);
  scale.load(high0, high1, low0, low1, 16 * block, at.place);
  const uint32_t scaled[4] = {scale_two<T>(y[0], high0, low0), scale_two<T>(y[1], high0, low0), scale_two<T>(y[2], high1, low1), scale_two<T>(y[3], high1, low1)};
  if (at.owns_column) {
    uint32_t b0, b1;
    column_weights.load_vector(b0, b1, 16 * block, at.group, at.place);
    Element<T>::mma(state.column, y, b0, b1);
  }
#pragma unroll
  for (int p = 0; p < PAIRS; ++p) {
    if (p >= at.pairs) continue;
    uint32_t z[4];
    load_columns_straight<D>(z, lane, z_tile, block, (p + at.turn) % BLOCKS);
    Element<T>::mma(state.sum[p][0], scaled, z[0], z[1]);
    Element<T>::mma(state.sum[p][1], scaled, z[2], z[3]);
    if ((p + at.turn) % BLOCKS == at.row) {
      uint32_t line[4] = {0u, 0u, 0u, 0u};
      line_weights.load_vector(line[0], line[2], 16 * block, at.group, at.place);
      Element<T>::mma(state.line[0], line, z[0], z[1]);
      Element<T>::mma(state.line[1], line, z[2], z[3]);
    }
  }
}

// A warp's 16 rows of results, from the tile where it staged them to global memory in 16-byte pieces.
template <typename T, int D, int PIECES>
__device__ __forceinline__ void store_stripe(T *head, int64_t token_stride, const unsigned char *staging, int row0, int piece0, int64_t first, int64_t end, int lane) {
#pragma unroll
  for (int i = 0; i < 16 * PIECES / 32; ++i) {
    const int index = lane + 32 * i, row = row0 + index / PIECES, piece = piece0 + index % PIECES;
    if (first + row < end)
      *reinterpret_cast<uint4 *>(head + (first + row) * token_stride + piece * 8) = *reinterpret_cast<const uint4 *>(staging + Tile<D>::at(row, piece));
  }
}

struct SegmentArguments {
  linattn_problem problem;
  linattn_tensor grad_out;                     // of queries only, as the three below
  const float *mass, *error, *query_scale;
  float *states;
  int32_t segments;
  int64_t segment_length;
};

// Per query token, what the column kernel and its states weigh by: see there.
struct QueryWeights {
  float mixed, level, slope;  // b tau / (|q| g), a / g, b tau e / |q|
};
__device__ __forceinline__ QueryWeights query_weights(float a, float b_tau, float mass, float error, float query_scale) {
  const float inverse = mass == 0.f ? 0.f : 1.f / mass;
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
    alignas(16) uint16_t high[3][C], low[3][C];
    float counts[WARPS];
  };
  static constexpr int SHARED = STAGES * 2 * TILE + static_cast<int>(sizeof(Small));
};

// The state of each segment alone: of keys and values (QUERIES false), or of queries and their gradients, summed over the group's heads.
template <typename T, int D, bool QUERIES>
__global__ void __launch_bounds__(SegmentShape<D>::THREADS) segments_kernel(const __grid_constant__ SegmentArguments args) {
  using Shape = SegmentShape<D>;
  constexpr int C = Shape::C, BLOCKS = Shape::BLOCKS, STAGES = Shape::STAGES, TILE = Shape::TILE;
  extern __shared__ __align__(128) unsigned char shared[];
  typename Shape::Small &small = *reinterpret_cast<typename Shape::Small *>(shared + STAGES * 2 * TILE);
  const auto weights = [&](int i) { return SplitWeights<T>{reinterpret_cast<const T *>(small.high[i]), reinterpret_cast<const T *>(small.low[i])}; };
  const auto set_weight = [&](int i, int token, float value) { store_split(reinterpret_cast<T *>(small.high[i]), reinterpret_cast<T *>(small.low[i]), token, value); };

  const linattn_problem &p = args.problem;
  const int thread = threadIdx.x, lane_id = thread & 31, warp = thread >> 5;
  const Lane<D> lane(lane_id);
  const uint32_t tiles = shared_address(shared);
  const int head_pair = blockIdx.x / args.segments, segment = blockIdx.x % args.segments;
  const int batch = head_pair / p.key_heads, key_head = head_pair % p.key_heads, heads = QUERIES ? p.query_heads / p.key_heads : 1;
  const int64_t begin = segment * args.segment_length, end = min(p.length, begin + args.segment_length);
  const int iterations = static_cast<int>((end - begin + C - 1) / C) * heads;
  const linattn_tensor &y = QUERIES ? p.query : p.key, &z = QUERIES ? args.grad_out : p.value;
  const bool unit = p.normalize_qk;

  const auto prefetch = [&](int iteration) {
    if (iteration < iterations) {
      const int chunk = iteration / heads, head = key_head * heads + iteration % heads;
      const uint32_t tile = tiles + (iteration % STAGES) * 2 * TILE;
      const int64_t first = begin + static_cast<int64_t>(chunk) * C;
      copy_tile<T, D, C, Shape::THREADS>(tile, head_of<const T>(y, batch, head), y.token_stride, first, end, thread);
      copy_tile<T, D, C, Shape::THREADS>(tile + TILE, head_of<const T>(z, batch, head), z.token_stride, first, end, thread);
    }
    copy_commit();
  };
#pragma unroll
  for (int i = 0; i < STAGES - 1; ++i) prefetch(i);

  StateTile<T, Shape::PAIRS> state;
  state.clear();
  const int part = Shape::SPLIT > 1 ? warp / BLOCKS : 0;
  const StatePlace at(Shape::SPLIT > 1 ? warp % BLOCKS : warp, part == 0, part * Shape::PAIRS, Shape::PAIRS, lane_id);
  float count = 0.f;
  for (int iteration = 0; iteration < iterations; ++iteration) {
    const int chunk = iteration / heads, head = key_head * heads + iteration % heads;
    const int64_t first = begin + static_cast<int64_t>(chunk) * C;
    const uint32_t y_tile = tiles + (iteration % STAGES) * 2 * TILE;
    QueryWeights query{0.f, 0.f, 0.f};
    if (QUERIES && thread < C && first + thread < end) {
      const int64_t token = (static_cast<int64_t>(batch) * p.query_heads + head) * p.length + first + thread;
      const float a = p.coefficients[head], error = args.error[token];
      query = query_weights(a, p.coefficients[p.query_heads + head] * p.coefficients[3 * p.query_heads + head], args.mass[token], error, args.query_scale[token]);
      count += a * error;
    }
    copy_wait<STAGES - 2>();
    __syncthreads();
    prefetch(iteration + STAGES - 1);
    if constexpr (QUERIES) {
      if (thread < C) set_weight(0, thread, query.mixed), set_weight(1, thread, query.level), set_weight(2, thread, query.slope);
    } else if (warp < Shape::STRIPES) {
      float scale0 = 1.f, scale1 = 1.f;
      if (unit) {
        uint32_t rows[BLOCKS][4];
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block) load_rows<D>(rows[block], lane, y_tile, warp, block);
        row_products<T, BLOCKS>(scale0, scale1, rows, rows, lane_id);
        scale0 = inverse_norm(scale0), scale1 = inverse_norm(scale1);
      }
      if ((lane_id & 3) == 0) set_weight(0, 16 * warp + (lane_id >> 2), scale0), set_weight(0, 16 * warp + (lane_id >> 2) + 8, scale1);
    }
    __syncthreads();
#pragma unroll
    for (int block = 0; block < Shape::STRIPES; ++block)
      update_state<T, D>(state, at, lane, y_tile, y_tile + TILE, block, weights(0), QUERIES ? weights(2) : weights(0), QUERIES ? weights(1) : SplitWeights<T>{nullptr, nullptr});
  }
  copy_wait<0>();
  if constexpr (QUERIES) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) count += __shfl_xor_sync(0xffffffffu, count, step);
    if (lane_id == 0) small.counts[warp] = count;
    __syncthreads();
    count = 0.f;
    for (int w = 0; w < Shape::WARPS; ++w) count += small.counts[w];
  } else {
    count = static_cast<float>(end - begin);
  }
  store_state<D>(state, at, StateView<D>::of_segment(args.states, head_pair, args.segments, segment), count, thread == 0);
}

enum class Scan { kPrefix, kSuffix, kTotal };

// Turns the segments' own states into what each one starts from (the sum of those before, or after it), or the first into the sum of all.
// `initial` and `total` are the caller's states, or null.
template <int D>
__global__ void scan_kernel(float *states, int segments, Scan scan, const float *initial, float *total) {
  const int index = blockIdx.x * blockDim.x + threadIdx.x;
  if (index > D * D + 2 * D) return;
  const int64_t head = blockIdx.y;
  const int row = index / D, column = index % D;
  const int64_t callers = head * (D + 1) * (D + 1) + (index < D * D            ? row * (D + 1) + column
                                                      : index < D * D + D      ? (index - D * D) * (D + 1) + D
                                                                               : D * (D + 1) + (index - D * D - D));
  float *const at = states + head * segments * kStateFloats<D> + index;
  float sum = initial ? initial[callers] : 0.f;
  for (int i = 0; i < segments; ++i) {
    float &cell = at[static_cast<int64_t>(scan == Scan::kSuffix ? segments - 1 - i : i) * kStateFloats<D>];
    const float own = cell;
    if (scan != Scan::kTotal) cell = sum;
    sum += own;
  }
  if (scan == Scan::kTotal) *at = sum;
  if (total) total[callers] = sum;
}

}  // namespace linattn_mma
