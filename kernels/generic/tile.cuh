// Products of tiles in shared memory on the tensor cores, and what brings rows there.
//
// Everything is tf32, whose 11-bit factors are as fine as float16's. For float32 inputs (PRECISE) each factor is split into two such parts and
// three of the four products are summed: 22 bits, float32's accuracy. Tensor cores round their running sums toward zero, so a precise product
// starts a new sum for each slice and adds it up on the ordinary cores.
#pragma once
#include "generic/job.cuh"
#include "tile/instructions.cuh"

namespace linattn {

// How a block's warps share a tile of `ROWS` rows by `WIDTH` columns: each has 16 rows, and its part of every slice of columns.
template <int WIDTH>
struct Shape {
  static constexpr int ROWS = rows_of(WIDTH);
  static constexpr int ROW_WARPS = ROWS / 16, COLUMN_WARPS = THREADS / 32 / ROW_WARPS;
  static constexpr int SLICE = WIDTH == 64 ? 64 : 32;  // columns staged at a time
  static constexpr int SLICES = WIDTH / SLICE;
  static constexpr int SLICE_PARTS = SLICE / COLUMN_WARPS / 8;  // 8-column parts of a slice that a warp has
  static constexpr int PARTS = SLICES * SLICE_PARTS;
  static constexpr int PAIR_PARTS = TILE / COLUMN_WARPS / 8;  // of the weights of TILE columns
  static constexpr int LANES = THREADS / ROWS;                // threads for each row, where threads share rows evenly
  // Floats from row to row in shared memory. 8 and 4 more than a multiple of 32 and 16 are what keeps fragments free of bank conflicts.
  static constexpr int PAIR_STRIDE = TILE + 8;
  static constexpr int RIGHT = TILE * (SLICE + 8);
};
__host__ __device__ constexpr int left_stride(int columns) { return (columns + 31) / 32 * 32 + 8; }

// A thread's place: lane = 4 group + place. It holds rows group and group + 8 of its warp's 16, columns 2 place and 2 place + 1 of each part.
struct Place {
  int warp_row, warp_column, group, place;
  __device__ explicit Place(int row_warps)
      : warp_row(threadIdx.x / 32 % row_warps), warp_column(threadIdx.x / 32 / row_warps), group(threadIdx.x % 32 / 4), place(threadIdx.x % 4) {}
  __device__ int row(int half) const { return warp_row * 16 + group + half * 8; }
};

template <int WIDTH>
__device__ inline int column_of(const Place &at, int part, int i) {
  using S = Shape<WIDTH>;
  return part / S::SLICE_PARTS * S::SLICE + at.warp_column * (S::SLICE_PARTS * 8) + part % S::SLICE_PARTS * 8 + at.place * 2 + i;
}
template <int WIDTH>
__device__ inline int pair_column_of(const Place &at, int part, int i) {
  return at.warp_column * (Shape<WIDTH>::PAIR_PARTS * 8) + part * 8 + at.place * 2 + i;
}

// As a factor is kept in shared memory: rounded here once, unless it is split later.
template <bool PRECISE>
__device__ inline float kept(float x) {
  return PRECISE ? x : round_to_tf32(x);
}

template <int COUNT>
__device__ inline void split(const float (&x)[COUNT], float (&high)[COUNT], float (&low)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    high[i] = __uint_as_float((__float_as_uint(x[i]) + 0x1000u) & 0xffffe000u);  // to the nearest
    low[i] = x[i] - high[i];
  }
}

// acc += a b over `depth` (a multiple of 8). a[row][k] where A_ROWS, else a[k][row]; b[column][k] where B_ROWS, else b[k][column]; both start
// at the warp's first row and column. Factor k = 2 place, 2 place + 1 takes the places that the instruction numbers place, place + 4.
template <bool PRECISE, bool A_ROWS, bool B_ROWS, int PARTS>
__device__ inline void multiply(float (&acc)[PARTS][4], const float *a, int a_stride, const float *b, int b_stride, int depth) {
  const int group = threadIdx.x % 32 / 4, place = threadIdx.x % 4;
  float fresh[PARTS][4] = {};
  float (&sum)[PARTS][4] = PRECISE ? fresh : acc;
#pragma unroll 2
  for (int k = 0; k < depth; k += 8) {
    float left[4];
    if (A_ROWS) {
      const float2 x = *reinterpret_cast<const float2 *>(a + group * a_stride + k + 2 * place);
      const float2 y = *reinterpret_cast<const float2 *>(a + (group + 8) * a_stride + k + 2 * place);
      left[0] = x.x, left[1] = y.x, left[2] = x.y, left[3] = y.y;
    } else {
      const float *at = a + (k + 2 * place) * a_stride + group;
      left[0] = at[0], left[1] = at[8], left[2] = at[a_stride], left[3] = at[a_stride + 8];
    }
    float left_high[4], left_low[4];
    if (PRECISE) split(left, left_high, left_low);
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      float right[2];
      if (B_ROWS) {
        const float2 x = *reinterpret_cast<const float2 *>(b + (part * 8 + group) * b_stride + k + 2 * place);
        right[0] = x.x, right[1] = x.y;
      } else {
        const float *at = b + (k + 2 * place) * b_stride + part * 8 + group;
        right[0] = at[0], right[1] = at[b_stride];
      }
      if (PRECISE) {
        float right_high[2], right_low[2];
        split(right, right_high, right_low);
        mma_tf32(sum[part], left_low, right_high);
        mma_tf32(sum[part], left_high, right_low);
        mma_tf32(sum[part], left_high, right_high);
      } else {
        mma_tf32(sum[part], left, right);
      }
    }
  }
  if (PRECISE) {
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[part][i] += fresh[part][i];
    }
  }
}

// The same for one slice of a tile's columns, out of the sums of all. Registers have no numbers at run time, so each slice has a product of its own
// in the code; slices are gone through by a loop that is not unrolled, which has what surrounds the product once.
template <int WIDTH, bool PRECISE, bool B_ROWS>
__device__ inline void multiply_slice(float (&acc)[Shape<WIDTH>::PARTS][4], int slice, const float *a, int a_stride, const float *b, int b_stride, int depth) {
  using S = Shape<WIDTH>;
#pragma unroll
  for (int i = 0; i < S::SLICES; ++i) {
    if (S::SLICES == 1 || i == slice) {
      auto &own = *reinterpret_cast<float (*)[S::SLICE_PARTS][4]>(&acc[i * S::SLICE_PARTS]);
      multiply<PRECISE, true, B_ROWS, S::SLICE_PARTS>(own, a, a_stride, b, b_stride, depth);
    }
  }
}

// 16 bytes of a row on their way: what they are once as floats, times `scale`.
template <bool PRECISE>
struct Chunk {
  static constexpr int EACH = PRECISE ? 4 : 8;  // elements
  uint32_t words[4];
  float scale;  // 0 where there is nothing, NaN in memory or not

  __device__ void fetch(const Rows &rows, int64_t n, int d, float factor) {
    scale = d < rows.width && rows.real(n) ? rows.factor(n) * factor : 0.0f;
    if (scale == 0.0f) return;
    const int64_t at = rows.start + n * rows.stride + d;
    if (rows.vector) {
      const uint4 raw = *reinterpret_cast<const uint4 *>(static_cast<const char *>(rows.data) + at * (PRECISE ? 4 : 2));
      words[0] = raw.x, words[1] = raw.y, words[2] = raw.z, words[3] = raw.w;
      return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (PRECISE) {
        words[i] = d + i < rows.width ? static_cast<const uint32_t *>(rows.data)[at + i] : 0u;
      } else {
        const uint16_t *from = static_cast<const uint16_t *>(rows.data) + at + 2 * i;
        const uint32_t low = d + 2 * i < rows.width ? from[0] : 0u, high = d + 2 * i + 1 < rows.width ? from[1] : 0u;
        words[i] = low | high << 16;
      }
    }
  }

  __device__ void put(float *shared, const Rows &rows, int64_t n, int d) const {
    float x[EACH];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (PRECISE) {
        x[i] = __uint_as_float(words[i]);
      } else if (rows.dtype == LINATTN_BFLOAT16) {
        x[EACH / 4 * i] = __uint_as_float(words[i] << 16);
        x[EACH / 4 * i + EACH / 8] = __uint_as_float(words[i] & 0xffff0000u);
      } else {
        const __half2 two = *reinterpret_cast<const __half2 *>(&words[i]);
        x[EACH / 4 * i] = __low2float(two);
        x[EACH / 4 * i + EACH / 8] = __high2float(two);
      }
    }
    if (rows.noised.p != nullptr && scale != 0.0f) {
#pragma unroll
      for (int i = 0; i < EACH; ++i) x[i] *= noise(rows.noised, rows.noise_row, n, d + i);
    }
#pragma unroll
    for (int i = 0; i < EACH; ++i) x[i] = scale == 0.0f ? 0.0f : kept<PRECISE>(x[i] * scale);
#pragma unroll
    for (int i = 0; i < EACH; i += 4) *reinterpret_cast<float4 *>(shared + i) = make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]);
  }
};

// `count` rows x columns [column, column + columns) into shared memory, zero where there is nothing. `columns` is a multiple of 8. Each row is
// multiplied by its own factor, by `factor`, and by weights[row] where given (in shared memory; a zero weight reads nothing).
template <bool PRECISE>
__device__ inline void stage(float *shared, int stride, const Rows &rows, int64_t first, int count, int column, int columns, float factor = 1.0f, const float *weights = nullptr) {
  constexpr int EACH = Chunk<PRECISE>::EACH;
  const int chunks = columns / EACH;
  for (int index = threadIdx.x; index < count * chunks; index += THREADS) {
    const int r = index / chunks, c = index % chunks * EACH;
    Chunk<PRECISE> chunk;
    const float weight = weights == nullptr ? factor : factor * weights[r];
    chunk.scale = 0.0f;
    if (weight != 0.0f) chunk.fetch(rows, first + r, column + c, weight);
    chunk.put(shared + r * stride + c, rows, first + r, column + c);
  }
}

// The same for TILE rows and COLUMNS columns in two halves, so that one slice is on its way while another is multiplied.
template <bool PRECISE, int COLUMNS>
struct Slice {
  static constexpr int EACH = Chunk<PRECISE>::EACH, ACROSS = COLUMNS / EACH, COUNT = TILE * ACROSS / THREADS;
  static_assert(TILE * ACROSS % THREADS == 0, "every thread has as many chunks");
  Chunk<PRECISE> chunks[COUNT];

  __device__ void fetch(const Rows &rows, int64_t first, int column) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const int index = threadIdx.x + i * THREADS;
      chunks[i].fetch(rows, first + index / ACROSS, column + index % ACROSS * EACH, 1.0f);
    }
  }
  __device__ void put(float *shared, int stride, const Rows &rows, int64_t first, int column) const {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const int index = threadIdx.x + i * THREADS, r = index / ACROSS, c = index % ACROSS * EACH;
      chunks[i].put(shared + r * stride + c, rows, first + r, column + c);
    }
  }
};

// The next tile at or behind `tile`, up to `last`, that shares a run of tokens with the rows (runs only grow along the sequence).
__device__ inline int64_t next_tile(int64_t tile, int64_t last, const int32_t *row_segments, const int32_t *column_segments, int64_t first_row, int64_t last_row, int64_t length) {
  if (row_segments == nullptr || column_segments == nullptr) return tile;
  const int lowest = abs(row_segments[first_row]), highest = abs(row_segments[last_row]);
  while (tile <= last && (abs(column_segments[smaller((tile + 1) * TILE, length) - 1]) < lowest || abs(column_segments[tile * TILE]) > highest)) ++tile;
  return tile;
}

// Sum over all columns of a tile, given each thread's share for its two rows; `scratch` holds COLUMN_WARPS x ROWS floats. Everyone gets it.
template <int WIDTH>
__device__ inline void row_totals(float (&x)[2], float *scratch, const Place &at) {
  using S = Shape<WIDTH>;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    x[half] += __shfl_xor_sync(0xffffffffu, x[half], 1);
    x[half] += __shfl_xor_sync(0xffffffffu, x[half], 2);
    if (at.place == 0) scratch[at.warp_column * S::ROWS + at.row(half)] = x[half];
  }
  __syncthreads();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    x[half] = 0.0f;
#pragma unroll
    for (int warp = 0; warp < S::COLUMN_WARPS; ++warp) x[half] += scratch[warp * S::ROWS + at.row(half)];
  }
  __syncthreads();
}

}  // namespace linattn
