// The running state between registers, shared memory and global memory, and the kernels that cut a sequence into segments:
// the sum of every segment, then a scan over the segments of a head.
#pragma once
#include "mma_gates.cuh"
#include "mma_range.cuh"
#include "mma_warpgroup.cuh"

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

// Which part of the state a warp holds: row block `row`, the column blocks block(p) of p < pairs, and the margins that it owns.
// Where two warps share a row of blocks (or share out a stripe's results), their columns alternate: `flip` tells them apart.
template <int D, bool ALTERNATING> struct StatePlace {
  static constexpr int BLOCKS = D / 16, kEven = (BLOCKS + 1) / 2 * 2;
  int row, flip, pairs, group, place;
  bool owns_column;
  int first;  // block(0) where columns do not alternate
  __device__ __forceinline__ StatePlace(int row_block, bool first_part, int flipped, int pairs_held, int lane, int first_block = 0)
      : row(row_block), flip(flipped), pairs(pairs_held), group(lane >> 2), place(lane & 3), owns_column(first_part), first(first_block) {}
  static constexpr __device__ __forceinline__ int order(int p) { return ALTERNATING ? 2 * p % kEven + 2 * p / kEven : p; }
  __device__ __forceinline__ int block(int p) const { return ALTERNATING ? order(p) ^ flip : p + first; }
  // Of the row's margin, each warp sums the block under its own number; -1: another warp of the row does.
  __device__ __forceinline__ int line_block() const {
#pragma unroll
    for (int p = 0; p < BLOCKS; ++p)
      if (p < pairs && block(p) == row) return row;
    return -1;
  }
};

// Transposed: the state of (value, key) is that of (key, value) with the margins' roles swapped. Returns the count.
template <int D, typename T, int PAIRS, typename Place>
__device__ __forceinline__ float load_state(StateTile<T, PAIRS> &state, const Place &at, const StateView<D> view, bool transposed) {
  state.clear();
  if (!view.data) return 0.f;
#pragma unroll
  for (int p = 0; p < PAIRS; ++p) {
    if (p >= at.pairs) continue;
    const int block = at.block(p);
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

template <int D, typename T, int PAIRS, typename Place>
__device__ __forceinline__ void store_state(const StateTile<T, PAIRS> &state, const Place &at, const StateView<D> view, float count, bool writes_count) {
#pragma unroll
  for (int p = 0; p < PAIRS; ++p) {
    if (p >= at.pairs) continue;
    const int block = at.block(p);
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

// The state times `lift` rounded into a tile for the products of a chunk; its margins stay exact.
template <typename T, int D, int PAIRS, typename Place, typename SetColumn>
__device__ __forceinline__ void publish_state(const StateTile<T, PAIRS> &state, const Place &at, const Blocks<D> &tile, float lift, float *line, int lane, const SetColumn &set_column) {
#pragma unroll
  for (int p = 0; p < PAIRS; ++p)
    if (p < at.pairs) store_block<T, D>(tile.at_column(0, at.block(p)) + Tile<D>::rows_at(at.row), state.sum[p][0], state.sum[p][1], lift, lift, lane);
  if (at.line_block() >= 0) {
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      const float first = state.line[t][0] + __shfl_xor_sync(0xffffffffu, state.line[t][0], 4);
      const float second = state.line[t][1] + __shfl_xor_sync(0xffffffffu, state.line[t][1], 4);
      if (at.group == 0) *reinterpret_cast<float2 *>(line + 16 * at.row + 8 * t + 2 * at.place) = make_float2(first, second);
    }
  }
  if (at.owns_column && at.place == 0) {
    const int row = 16 * at.row + at.group;
    set_column(row, state.column[0] + state.column[1]);
    set_column(row + 8, state.column[2] + state.column[3]);
  }
}

// A weight per token, in two parts whose sum is exact enough.
template <typename T> struct SplitWeights {
  const T *high, *low;
  __device__ __forceinline__ void set(int token, float value) const { store_split(const_cast<T *>(high), const_cast<T *>(low), token, value); }
};

// What a lane reads of 16 tokens' weights: as factors of a fragment along its tokens, or (vector) as an operand of its own, with the high
// parts in row (or column) 0, the low parts in 1 and zeros, which `zeros` must hold, in the others.
template <typename T> struct WeightReader {
  const T *high, *low, *vector;
  __device__ __forceinline__ WeightReader(const SplitWeights<T> &weights, const T *zeros, int lane) {
    const int group = lane >> 2, place = lane & 3;
    high = weights.high + 2 * place, low = weights.low + 2 * place;
    vector = (group == 0 ? weights.high : group == 1 ? weights.low : zeros) + 2 * place;
  }
  static __device__ __forceinline__ void two(uint32_t &first, uint32_t &second, const T *at, int token) {
    first = *reinterpret_cast<const uint32_t *>(at + token), second = *reinterpret_cast<const uint32_t *>(at + token + 8);
  }
  __device__ __forceinline__ void scale(uint32_t (&y)[4], int token) const {
    uint32_t high0, high1, low0, low1;
    two(high0, high1, high, token);
    two(low0, low1, low, token);
    y[0] = scale_two<T>(y[0], high0, low0), y[1] = scale_two<T>(y[1], high0, low0);
    y[2] = scale_two<T>(y[2], high1, low1), y[3] = scale_two<T>(y[3], high1, low1);
  }
};

// Sixteen tokens into the margins: column += y column_weights (of this warp's 16 rows), line += line_weights z (of its 16 columns).
// `y_block` (across) and `z_block` (down) are the addresses of those. `scaled` becomes y with its tokens scaled: sum += y diag(scale) z^T.
template <typename T, bool COLUMN_ONES, bool LINE_ONES, int PAIRS, typename Place>
__device__ __forceinline__ void update_margins(StateTile<T, PAIRS> &state, uint32_t (&scaled)[4], const Place &at, bool owns_line, uint32_t y_block, uint32_t z_block, int token,
                                               const WeightReader<T> &scale, const WeightReader<T> &column_weights, const WeightReader<T> &line_weights) {
  const uint32_t ones = at.group == 0 ? Element<T>::kOnes : 0u;
  ldmatrix_transposed(scaled, y_block);
  if (at.owns_column) {
    uint32_t b0 = ones, b1 = ones;
    if constexpr (!COLUMN_ONES) WeightReader<T>::two(b0, b1, column_weights.vector, token);
    Element<T>::mma(state.column, scaled, b0, b1);
  }
  if (owns_line) {
    uint32_t line[4] = {ones, 0u, ones, 0u}, z[4];
    if constexpr (!LINE_ONES) WeightReader<T>::two(line[0], line[2], line_weights.vector, token);
    ldmatrix_transposed(z, z_block);
    Element<T>::mma(state.line[0], line, z[0], z[1]);
    Element<T>::mma(state.line[1], line, z[2], z[3]);
  }
  scale.scale(scaled, token);
}

template <typename T, int D, bool COLUMN_ONES, bool LINE_ONES, int PAIRS, typename Place>
__device__ __forceinline__ void update_state(StateTile<T, PAIRS> &state, const Place &at, bool owns_line, uint32_t y_block, uint32_t z_block, const Blocks<D> &z_flipped, int row_block,
                                             const WeightReader<T> &scale, const WeightReader<T> &column_weights, const WeightReader<T> &line_weights) {
  uint32_t scaled[4];
  const uint32_t offset = Tile<D>::rows_at(row_block);
  update_margins<T, COLUMN_ONES, LINE_ONES>(state, scaled, at, owns_line, y_block + offset, z_block + offset, 16 * row_block, scale, column_weights, line_weights);
#pragma unroll
  for (int p = 0; p < PAIRS; ++p)
    if (p < at.pairs) {
      uint32_t z[4];
      ldmatrix_transposed(z, z_flipped.at(row_block, at.order(p)));
      Element<T>::mma(state.sum[p][0], scaled, z[0], z[1]);
      Element<T>::mma(state.sum[p][1], scaled, z[2], z[3]);
    }
}

// A whole chunk of 64 tokens into the state, by warpgroups: COLUMNS columns from `z_tile` on, 16 rows a warp.
template <typename T, int D, int COLUMNS, bool COLUMN_ONES, bool LINE_ONES, int PAIRS, typename Place>
__device__ __forceinline__ void update_state_by_groups(StateTile<T, PAIRS> &state, const Place &at, bool owns_line, uint32_t y_block, uint32_t z_block, uint32_t z_tile,
                                                       const WeightReader<T> &scale, const WeightReader<T> &column_weights, const WeightReader<T> &line_weights) {
  uint32_t scaled[4][4];
  float(&sum)[2 * PAIRS][4] = reinterpret_cast<float(&)[2 * PAIRS][4]>(state.sum);
#pragma unroll
  for (int block = 0; block < 4; ++block)
    update_margins<T, COLUMN_ONES, LINE_ONES>(state, scaled[block], at, owns_line, y_block + Tile<D>::rows_at(block), z_block + Tile<D>::rows_at(block), 16 * block, scale, column_weights, line_weights);
  warpgroup_keep(sum);
  warpgroup_begin();
#pragma unroll
  for (int block = 0; block < 4; ++block)
    WarpgroupProduct<T, COLUMNS, true>::run(sum, scaled[block], warpgroup_operand<D>(z_tile + Tile<D>::rows_at(block), Tile<D>::kPanelBytes), true);
  warpgroup_commit();
  warpgroup_wait<0>();
  warpgroup_keep(sum);
}

// A warp's 16 rows of results, from the tile where it staged them to global memory in 16-byte pieces: pieces piece(0..PIECES) of rows row0...
template <typename T, int D, int PIECES, typename Piece>
__device__ __forceinline__ void store_stripe(T *first_row, int64_t token_stride, const unsigned char *staging, int row0, int count, int lane, const Piece &piece_of) {
  constexpr int kCopies = 16 * PIECES / 32, kRows = 32 / PIECES;  // rows at a time, where pieces divide a warp
  if (32 % PIECES == 0 && row0 + 16 <= count) {
    const int row = row0 + lane / PIECES, piece = piece_of(lane % PIECES);
    T *to = first_row + row * token_stride + piece * 8;
    const int64_t step = kRows * token_stride;
#pragma unroll
    for (int i = 0; i < kCopies; ++i, to += step) *reinterpret_cast<uint4 *>(to) = *reinterpret_cast<const uint4 *>(staging + Tile<D>::at(row + i * kRows, piece));
    return;
  }
#pragma unroll
  for (int i = 0; i < kCopies; ++i) {
    const int index = lane + 32 * i, row = row0 + index / PIECES, piece = piece_of(index % PIECES);
    if (row < count)
      *reinterpret_cast<uint4 *>(first_row + row * token_stride + piece * 8) = *reinterpret_cast<const uint4 *>(staging + Tile<D>::at(row, piece));
  }
}

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
        const QueryWeights query = query_weights<T>(a, small.coefficients[head][1], numbers[0], error, numbers[2 * C] * (Element<T>::kNarrow ? small.query_down[thread] : 1.f), lift);
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

enum class Scan { kPrefix, kSuffix, kTotal };

// Turns the segments' own states into what each one starts from (the sum of those before, or after it), or the first into the sum of all.
// `initial` and `total` are the caller's states, or null.
template <int D>
__global__ void scan_kernel(float *states, const float *keeps, int segments, Scan scan, const float *initial, float *total) {
  const int index = blockIdx.x * blockDim.x + threadIdx.x;
  if (index > D * D + 2 * D) return;
  const int64_t head = blockIdx.y;
  const int row = index / D, column = index % D;
  const int64_t callers = head * (D + 1) * (D + 1) + (index < D * D            ? row * (D + 1) + column
                                                      : index < D * D + D      ? (index - D * D) * (D + 1) + D
                                                                               : D * (D + 1) + (index - D * D - D));
  float *const at = states + head * segments * kStateFloats<D> + index;
  float sum = initial ? initial[callers] : 0.f;
  const int64_t step = scan == Scan::kSuffix ? -kStateFloats<D> : kStateFloats<D>;
  float *const start = scan == Scan::kSuffix ? at + static_cast<int64_t>(segments - 1) * kStateFloats<D> : at;
  const int known = scan == Scan::kTotal || total ? segments : segments - 1;  // nobody needs the last one's own state for the scan
  constexpr int kAhead = 8;
  for (int first = 0; first < segments; first += kAhead) {
    float own[kAhead], keep[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      own[i] = first + i < known ? start[(first + i) * step] : 0.f;
      keep[i] = keeps && first + i < known ? keeps[head * segments + (scan == Scan::kSuffix ? segments - 1 - first - i : first + i)] : 1.f;
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (scan != Scan::kTotal && first + i < segments) start[(first + i) * step] = sum;
      sum = fmaf(keep[i], sum, own[i]);
    }
  }
  if (scan == Scan::kTotal) *at = sum;
  if (total) total[callers] = sum;
}

}  // namespace linattn_mma
