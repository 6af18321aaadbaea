// Tiles of tokens in shared memory, the fragments that mma.m16n8k16 takes from them, and the asynchronous copies that fill them.
#pragma once
#include "tile/instructions.cuh"
#include "linattn.h"

namespace linattn_tile {

constexpr float kSmallestSquare = 1e-24f;  // |x| <= 1e-12 has no direction

template <typename T> struct Element;

template <> struct Element<__nv_bfloat16> {
  using Two = __nv_bfloat162;
  static constexpr bool kNarrow = false;
  static constexpr uint32_t kOnes = 0x3F803F80u;
  static __device__ __forceinline__ uint32_t pack(float low, float high) { return pack_bf16(low, high); }
  static __device__ __forceinline__ float low(uint32_t both) { return __uint_as_float(both << 16); }
  static __device__ __forceinline__ float high(uint32_t both) { return __uint_as_float(both & 0xffff0000u); }
  static __device__ __forceinline__ void mma(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { mma_bf16(sum, a, b0, b1); }
};

template <> struct Element<__half> {
  using Two = __half2;
  static constexpr bool kNarrow = true;  // a narrower range than float32's: see range.cuh
  static constexpr uint32_t kOnes = 0x3C003C00u;
  static __device__ __forceinline__ uint32_t pack(float low, float high) { return pack_fp16(low, high); }
  static __device__ __forceinline__ float low(uint32_t both) { return __half2float(__ushort_as_half(both & 0xffffu)); }
  static __device__ __forceinline__ float high(uint32_t both) { return __half2float(__ushort_as_half(both >> 16)); }
  static __device__ __forceinline__ void mma(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { mma_fp16(sum, a, b0, b1); }
};

template <typename T> __device__ __forceinline__ uint32_t scale_two(uint32_t x, uint32_t high, uint32_t low) { return scale_pair<typename Element<T>::Two>(x, high, low); }

template <typename T> __device__ __forceinline__ void store_split(T *high, T *low, int index, float value) {
  const T rounded = static_cast<T>(value);
  high[index] = rounded;
  low[index] = static_cast<T>(value - static_cast<float>(rounded));
}

__device__ __forceinline__ void copy_word_async(uint32_t shared, const int32_t *global, bool valid) { copy_number_async(shared, reinterpret_cast<const float *>(global), valid); }

// Rows of D elements, in 16-byte pieces whose place is permuted by row so that eight rows of one column block meet no bank twice.
// D = 128, 192 and 256 lie in panels of 64 rows and 64 columns, each permuted as D = 64 is: wgmma reads both.
template <int D> struct Tile {
  static constexpr bool kPanels = D >= 128 && D % 64 == 0;
  static constexpr int kRowBytes = kPanels ? 128 : 2 * D;
  static constexpr int kBlockBytes = 16 * kRowBytes;  // from 16 rows to the next
  static constexpr int kPanelBytes = 64 * 128;        // from a panel to the one at its right
  static constexpr int kShift = D == 32 || D == 96 ? 1 : D == 16 || D == 80 ? 2 : 0;
  static constexpr int kMask = D == 32 || D == 96 ? 3 : D == 16 || D == 80 ? 1 : 7;
  static constexpr __device__ __forceinline__ uint32_t rows_at(int row_block) {
    return kPanels ? row_block / 4 * (D / 64) * kPanelBytes + row_block % 4 * kBlockBytes : row_block * kBlockBytes;
  }
  static constexpr __device__ __forceinline__ uint32_t columns_at(int pieces) { return kPanels ? pieces / 8 * kPanelBytes + pieces % 8 * 16 : pieces * 16; }
  static __device__ __forceinline__ uint32_t at(int row, int piece) {
    if constexpr (kPanels) return rows_at(row / 16) + row % 16 * kRowBytes + piece / 8 * kPanelBytes + ((piece % 8 ^ row % 8) << 4);
    return row * kRowBytes + ((piece ^ ((row >> kShift) & kMask)) << 4);
  }
};

// A lane's part in the address of a 16 x 16 block. ldmatrix hands out the block's four 8 x 8 corners in the order of the lanes' addresses:
// down first for A and for B along the tile's rows, across first for A transposed and for B along its columns, so that no register moves.
template <int D> __device__ __forceinline__ uint32_t lane_down(int lane) { return Tile<D>::at(lane & 15, lane >> 4); }
template <int D> __device__ __forceinline__ uint32_t lane_across(int lane) { return Tile<D>::at((lane & 7) + (lane >> 4) * 8, lane >> 3 & 1); }

// The 16 x 16 blocks of a tile. The permutation is an exclusive or in the low bits of the block's column, so a few addresses serve
// all blocks with constant offsets. `flip` (0 or 1) exchanges neighbouring columns of blocks.
template <int D> struct Blocks {
  static constexpr int kVariants = (Tile<D>::kMask >> 1) + 1;
  uint32_t address[kVariants];
  __device__ __forceinline__ Blocks(uint32_t tile, uint32_t lane, int flip = 0) {
    if constexpr (kVariants == 1) {
      address[0] = tile + lane + 32 * flip;
    } else {
#pragma unroll
      for (int v = 0; v < kVariants; ++v) address[v] = (tile + lane) ^ ((v ^ flip) << 5);
    }
  }
  __device__ __forceinline__ uint32_t at(int row_block, int column_block) const {
    return address[column_block % kVariants] + Tile<D>::rows_at(row_block) + Tile<D>::columns_at(column_block / kVariants * kVariants * 2);
  }
  // For blocks whose place only the running kernel knows.
  __device__ __forceinline__ uint32_t at_column(int row_block, int column_block) const {
    return (address[0] ^ ((column_block % kVariants) << 5)) + Tile<D>::rows_at(row_block) + Tile<D>::columns_at(column_block / kVariants * kVariants * 2);
  }
};

// Two accumulators side by side, rounded and written as one block.
template <typename T, int D> __device__ __forceinline__ void store_block(const uint32_t address, const float (&left)[4], const float (&right)[4], float scale0, float scale1,
                                                                         int lane) {
  const uint32_t r[4] = {Element<T>::pack(left[0] * scale0, left[1] * scale0), Element<T>::pack(left[2] * scale1, left[3] * scale1),
                         Element<T>::pack(right[0] * scale0, right[1] * scale0), Element<T>::pack(right[2] * scale1, right[3] * scale1)};
  stmatrix(address, r, lane);
}

// Of the products of 16 rows with their first eight and with the others: those of rows `group` and `group + 8` with themselves.
__device__ __forceinline__ void diagonals(float &first, float &second, const float (&top)[4], const float (&bottom)[4], int lane) {
  const int group = lane >> 2, source = 4 * group + (group >> 1);
  first = __shfl_sync(0xffffffffu, group & 1 ? top[1] : top[0], source);
  second = __shfl_sync(0xffffffffu, group & 1 ? bottom[3] : bottom[2], source);
}

// Row-wise products x_i . y_i of 16 rows, x by its fragments (A), y by its blocks' addresses (across), from the diagonal of X Y^T.
// Every lane gets those of rows `group` and `group + 8`.
template <typename T, int D, int BLOCKS>
__device__ __forceinline__ void row_products(float &first, float &second, const uint32_t (&x)[BLOCKS][4], const Blocks<D> &y, uint32_t offset, int lane) {
  float top[4] = {0, 0, 0, 0}, bottom[4] = {0, 0, 0, 0};
#pragma unroll
  for (int block = 0; block < BLOCKS; ++block) {
    uint32_t b[4];
    ldmatrix(b, y.at(0, block) + offset);
    Element<T>::mma(top, x[block], b[0], b[1]);
    Element<T>::mma(bottom, x[block], b[2], b[3]);
  }
  diagonals(first, second, top, bottom, lane);
}

// Row-wise squares of 16 rows by their fragments alone: of A, the first corner over the third is the first eight rows as B takes them along its
// columns, the second over the fourth the others.
template <typename T, int BLOCKS> __device__ __forceinline__ void row_squares(float &first, float &second, const uint32_t (&x)[BLOCKS][4], int lane) {
  float top[4] = {0, 0, 0, 0}, bottom[4] = {0, 0, 0, 0};
#pragma unroll
  for (int block = 0; block < BLOCKS; ++block) {
    Element<T>::mma(top, x[block], x[block][0], x[block][2]);
    Element<T>::mma(bottom, x[block], x[block][1], x[block][3]);
  }
  diagonals(first, second, top, bottom, lane);
}

__device__ __forceinline__ float inverse_norm(float square) { return square > kSmallestSquare ? reciprocal_root(square) : 0.f; }

// The warp's number, in a form that the compiler knows to be the same in all lanes.
__device__ __forceinline__ int warp_number() { return __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0); }

// Where head (b, h) of a tensor begins.
template <typename T> __device__ __forceinline__ T *head_of(const linattn_tensor &tensor, int64_t batch, int64_t head) {
  return static_cast<T *>(tensor.data) + batch * tensor.batch_stride + head * tensor.head_stride;
}

// A thread's part in copying C tokens of a head, from `first` on, into a tile: one 16-byte piece of every kStep-th row. No address is kept from
// tile to tile: what is the same for all threads is cheaper made again than held in a register of each; at D = 128, whose sums leave no
// register over, so is a thread's own part.
template <typename T, int D, int C, int THREADS> struct TileCopy {
  static constexpr int kPieces = D / 8, kStep = THREADS / kPieces;
  static_assert(THREADS % kPieces == 0, "");
  // Tokens from `count` on read as zero.
  static __device__ __forceinline__ void start(uint32_t tile, const linattn_tensor &tensor, int64_t batch, int64_t head, int64_t first, int count, int number) {
    const int thread = D == 128 ? remade(number) : number;
    const T *const tokens = head_of<const T>(tensor, batch, head) + first * tensor.token_stride;
    start_at(tile, tokens + thread / kPieces * tensor.token_stride + thread % kPieces * 8, tokens, tensor.token_stride, count, thread);
  }
  // The first piece that a thread copies.
  static __device__ __forceinline__ const T *source_of(const linattn_tensor &tensor, int64_t batch, int64_t head, int64_t first, int thread) {
    return head_of<const T>(tensor, batch, head) + (first + thread / kPieces) * tensor.token_stride + thread % kPieces * 8;
  }
  // From `source` on, which is the thread's own; `tokens` may be read by all.
  static __device__ __forceinline__ void start_at(uint32_t tile, const T *source, const T *tokens, int64_t stride, int count, int thread) {
    const int first_row = thread / kPieces, piece = thread % kPieces;
    const uint32_t place = tile + Tile<D>::at(first_row, piece);
    if (count == C && C % kStep == 0 && kStep % 16 == 0) {
      const int64_t step = kStep * stride;
#pragma unroll
      for (int i = 0; i < C / kStep; ++i, source += step) copy_async(place + i * kStep / 16 * Tile<D>::kBlockBytes, source, true);
      return;
    }
#pragma unroll
    for (int i = 0; i < (C + kStep - 1) / kStep; ++i) {
      const int row = first_row + i * kStep;
      if (C % kStep == 0 || row < C) {
        const bool valid = row < count;
        copy_async(tile + Tile<D>::at(row, piece), valid ? source : tokens, valid);
      }
      source += kStep * stride;
    }
  }
};

// ROWS rows of a tensor into a tile; those from `count` on read as zero, and so do pieces of 16 bytes from `pieces` on.
template <int D, int ROWS, int THREADS, typename T>
__device__ __forceinline__ void copy_tile(uint32_t tile, const T *rows, int64_t stride, int count, int thread, int pieces = D / 8) {
  constexpr int kPieces = D / 8, kAll = ROWS * kPieces;
#pragma unroll
  for (int i = 0; i < (kAll + THREADS - 1) / THREADS; ++i) {
    const int index = thread + i * THREADS, row = index / kPieces, piece = index % kPieces;
    if (kAll % THREADS != 0 && index >= kAll) break;
    const bool valid = row < count && piece < pieces;
    copy_async(tile + Tile<D>::at(row, piece), rows + (valid ? row * stride : 0) + piece * 8, valid);
  }
}

// The running sum of (key)(value)^T and its two margins, in float32 registers: a warp owns 16 rows and PAIRS blocks of 16 columns.
// Margins: `column` = sum of keys by some weight (one per row), `line` = sum of values by some weight (one per column).
template <typename T, int PAIRS> struct StateTile {
  float sum[PAIRS][2][4], column[4], line[2][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      column[i] = line[0][i] = line[1][i] = 0.f;
#pragma unroll
      for (int p = 0; p < PAIRS; ++p) sum[p][0][i] = sum[p][1][i] = 0.f;
    }
  }
};

// The state of a segment as the workspace holds it: sum (D, D), column (D), line (D), count, padded to 16 bytes.
template <int D> constexpr int kStateFloats = D * D + 2 * D + 4;

}  // namespace linattn_tile
