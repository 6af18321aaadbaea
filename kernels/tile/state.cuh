// The running state between registers, shared memory and global memory, and the kernels that cut a sequence into segments:
// the sum of every segment, then a scan over the segments of a head.
#pragma once
#include "tile/gates.cuh"
#include "tile/range.cuh"
#include "tile/warpgroup.cuh"

#include <cuda_runtime.h>

namespace linattn_tile {

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
      for (int i = 0; i < 4; ++i) view.sum(16 * at.row + at.group + 8 * (i >> 1), 16 * block + 8 * t + 2 * at.place + (i & 1)) = state.sum[p][t][i];
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
__device__ __forceinline__ void publish_state(const StateTile<T, PAIRS> &state, const Place &at, const Blocks<D> &tile, float lift, float *line, int lane,
                                              const SetColumn &set_column) {
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
__device__ __forceinline__ void update_state(StateTile<T, PAIRS> &state, const Place &at, bool owns_line, uint32_t y_block, uint32_t z_block, const Blocks<D> &z_flipped,
                                             int row_block, const WeightReader<T> &scale, const WeightReader<T> &column_weights, const WeightReader<T> &line_weights) {
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
  float (&sum)[2 * PAIRS][4] = reinterpret_cast<float (&)[2 * PAIRS][4]>(state.sum);
#pragma unroll
  for (int block = 0; block < 4; ++block)
    update_margins<T, COLUMN_ONES, LINE_ONES>(state, scaled[block], at, owns_line, y_block + Tile<D>::rows_at(block), z_block + Tile<D>::rows_at(block), 16 * block, scale,
                                              column_weights, line_weights);
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
    if (row < count) *reinterpret_cast<uint4 *>(first_row + row * token_stride + piece * 8) = *reinterpret_cast<const uint4 *>(staging + Tile<D>::at(row, piece));
  }
}

}  // namespace linattn_tile
