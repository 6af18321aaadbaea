// Tiles of tokens in shared memory, the fragments that mma.m16n8k16 takes from them, and the asynchronous copies that fill them.
// In a fragment, lane = 4 * group + place: a lane holds rows `group` and `group + 8`, columns 2 * place and 2 * place + 1.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include "linattn.h"

namespace linattn_mma {

constexpr float kSmallestSquare = 1e-24f;  // |x| <= 1e-12 has no direction

template <typename T> struct Element;

template <> struct Element<__nv_bfloat16> {
  using Two = __nv_bfloat162;
  static constexpr uint32_t kOnes = 0x3F803F80u;
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    uint32_t both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
  }
  static __device__ __forceinline__ float low(uint32_t both) { return __uint_as_float(both << 16); }
  static __device__ __forceinline__ float high(uint32_t both) { return __uint_as_float(both & 0xffff0000u); }
  static __device__ __forceinline__ void mma(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

template <> struct Element<__half> {
  using Two = __half2;
  static constexpr uint32_t kOnes = 0x3C003C00u;
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    uint32_t both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
  }
  static __device__ __forceinline__ float low(uint32_t both) { return __half2float(__ushort_as_half(both & 0xffffu)); }
  static __device__ __forceinline__ float high(uint32_t both) { return __half2float(__ushort_as_half(both >> 16)); }
  static __device__ __forceinline__ void mma(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

// x * (high + low) of two elements: the second term carries what rounding took from the factor.
template <typename T> __device__ __forceinline__ uint32_t scale_two(uint32_t x, uint32_t high, uint32_t low) {
  using Two = typename Element<T>::Two;
  const Two value = *reinterpret_cast<Two *>(&x), h = *reinterpret_cast<Two *>(&high), l = *reinterpret_cast<Two *>(&low);
  const Two product = __hfma2(value, h, __hmul2(value, l));
  return *reinterpret_cast<const uint32_t *>(&product);
}

template <typename T> __device__ __forceinline__ void store_split(T *high, T *low, int index, float value) {
  const T rounded = static_cast<T>(value);
  high[index] = rounded;
  low[index] = static_cast<T>(value - static_cast<float>(rounded));
}

__device__ __forceinline__ uint32_t shared_address(const void *pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

__device__ __forceinline__ void copy_async(uint32_t shared, const void *global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

// Rows of D elements, in 16-byte pieces whose place is permuted by row so that eight rows of one column block meet no bank twice.
template <int D> struct Tile {
  static constexpr int kRowBytes = 2 * D, kPieces = D / 8;
  static constexpr int kShift = D == 32 || D == 96 ? 1 : D == 80 ? 2 : 0;
  static constexpr int kMask = D == 32 || D == 96 ? 3 : D == 80 ? 1 : 7;
  static __device__ __forceinline__ uint32_t at(int row, int piece) {
    return row * kRowBytes + ((piece ^ ((row >> kShift) & kMask)) << 4);
  }
};

// A lane's part in the address of a 16 x 16 block: every kind of fragment is read by the same addresses.
template <int D> struct Lane {
  uint32_t row_offset, piece;
  __device__ __forceinline__ explicit Lane(int lane) {
    const int row = lane & 15;
    row_offset = row * Tile<D>::kRowBytes;
    piece = ((lane >> 4) ^ ((row >> Tile<D>::kShift) & Tile<D>::kMask)) << 4;
  }
  // Block at row 16 * row_block, column 16 * column_block.
  __device__ __forceinline__ uint32_t at(uint32_t tile, int row_block, int column_block) const {
    return tile + row_block * 16 * Tile<D>::kRowBytes + row_offset + ((column_block << 5) ^ piece);
  }
};

// A (16 x 16, row major) from a row-major tile.
template <int D> __device__ __forceinline__ void load_rows(uint32_t (&a)[4], const Lane<D> &lane, uint32_t tile, int row_block, int column_block) {
  ldmatrix(a, lane.at(tile, row_block, column_block));
}
// A = the block transposed.
template <int D> __device__ __forceinline__ void load_rows_transposed(uint32_t (&a)[4], const Lane<D> &lane, uint32_t tile, int row_block, int column_block) {
  uint32_t r[4];
  ldmatrix_transposed(r, lane.at(tile, row_block, column_block));
  a[0] = r[0]; a[1] = r[2]; a[2] = r[1]; a[3] = r[3];
}
// B = the block transposed (contraction along the tile's columns): b[0..1] for its first 8 rows, b[2..3] for the others.
template <int D> __device__ __forceinline__ void load_columns(uint32_t (&b)[4], const Lane<D> &lane, uint32_t tile, int row_block, int column_block) {
  uint32_t r[4];
  ldmatrix(r, lane.at(tile, row_block, column_block));
  b[0] = r[0]; b[1] = r[2]; b[2] = r[1]; b[3] = r[3];
}
// B = the block itself (contraction along the tile's rows): b[0..1] for its first 8 columns, b[2..3] for the others.
template <int D> __device__ __forceinline__ void load_columns_straight(uint32_t (&b)[4], const Lane<D> &lane, uint32_t tile, int row_block, int column_block) {
  ldmatrix_transposed(b, lane.at(tile, row_block, column_block));
}

// Row-wise products x_i . y_i of 16 rows, from the diagonal of X Y^T; every lane gets those of rows `group` and `group + 8`.
template <typename T, int BLOCKS>
__device__ __forceinline__ void row_products(float &first, float &second, const uint32_t (&x)[BLOCKS][4], const uint32_t (&y)[BLOCKS][4], int lane) {
  float top[4] = {0, 0, 0, 0}, bottom[4] = {0, 0, 0, 0};
#pragma unroll
  for (int block = 0; block < BLOCKS; ++block) {
    Element<T>::mma(top, x[block], y[block][0], y[block][2]);
    Element<T>::mma(bottom, x[block], y[block][1], y[block][3]);
  }
  const int group = lane >> 2, source = 4 * group + (group >> 1);
  first = __shfl_sync(0xffffffffu, group & 1 ? top[1] : top[0], source);
  second = __shfl_sync(0xffffffffu, group & 1 ? bottom[3] : bottom[2], source);
}

__device__ __forceinline__ float inverse_norm(float square) { return square > kSmallestSquare ? rsqrtf(square) : 0.f; }

// Where head (b, h) of a tensor begins.
template <typename T> __device__ __forceinline__ T *head_of(const linattn_tensor &tensor, int64_t batch, int64_t head) {
  return static_cast<T *>(tensor.data) + batch * tensor.batch_stride + head * tensor.head_stride;
}

// Starts the copy of tokens [first, first + C) into a tile; tokens from `length` on read as zero.
template <typename T, int D, int C, int THREADS>
__device__ __forceinline__ void copy_tile(uint32_t tile, const T *head, int64_t token_stride, int64_t first, int64_t length, int thread) {
  constexpr int kPieces = D / 8, kStep = THREADS / kPieces;
  static_assert(THREADS % kPieces == 0, "");
  const int piece = thread % kPieces;
  const T *source = head + (first + thread / kPieces) * token_stride + piece * 8;
#pragma unroll
  for (int row = thread / kPieces, i = 0; i < (C + kStep - 1) / kStep; ++i, row += kStep) {
    if (C % kStep == 0 || row < C) {
      const bool valid = first + row < length;
      copy_async(tile + Tile<D>::at(row, piece), valid ? source : head, valid);
    }
    source += kStep * token_stride;
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

}  // namespace linattn_mma
