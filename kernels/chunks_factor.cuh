// Factors of products as shared memory holds them: as they are, or float32 split into two float16 parts, 22 bits of it.
//
// Three of the four products of two split factors are summed, by the tensor cores at their 16-bit rate. Powers of two, which round nothing, bring
// the largest element of a row to 2^14, so that elements down to 2^-17 of it keep all 22 bits; what a product is worth then is a number beside the row.
// Tensor cores round their running sums toward zero: a sum over many tokens is therefore begun anew for every tile and added up on the ordinary cores.
#pragma once
#include "mma_range.cuh"
#include "mma_warpgroup.cuh"

namespace linattn_chunks {

using namespace linattn_mma;

template <typename T> struct Factor {
  using Part = T;
  static constexpr int PARTS = 1;
};
template <> struct Factor<float> {
  using Part = __half;
  static constexpr int PARTS = 2;
};
template <typename T> constexpr bool kSplit = Factor<T>::PARTS == 2;

constexpr int kPeak = 14;  // exponent of a row's largest element

// A 16 x 16 block of a tile whose parts lie one behind the other, `plane` bytes apart.
template <typename T> struct Fragment {
  uint32_t part[Factor<T>::PARTS][4];
  __device__ __forceinline__ void load(uint32_t address, int plane) {
#pragma unroll
    for (int i = 0; i < Factor<T>::PARTS; ++i) ldmatrix(part[i], address + i * plane);
  }
  __device__ __forceinline__ void load_transposed(uint32_t address, int plane) {
#pragma unroll
    for (int i = 0; i < Factor<T>::PARTS; ++i) ldmatrix_transposed(part[i], address + i * plane);
  }
};

// sum += a b for the left (0) or right (1) eight columns of b.
template <typename T> __device__ __forceinline__ void multiply(float (&sum)[4], const Fragment<T> &a, const Fragment<T> &b, int side) {
  using E = Element<typename Factor<T>::Part>;
  if constexpr (kSplit<T>) {
    E::mma(sum, a.part[1], b.part[0][2 * side], b.part[0][2 * side + 1]);
    E::mma(sum, a.part[0], b.part[1][2 * side], b.part[1][2 * side + 1]);
  }
  E::mma(sum, a.part[0], b.part[0][2 * side], b.part[0][2 * side + 1]);
}

// sum += a b for a warpgroup's 64 rows, N columns: a from a tile or from registers, b from a tile.
template <typename T, int D, int N, bool ALONG_ROWS>
__device__ __forceinline__ void group_multiply(float (&sum)[N / 8][4], uint32_t a, int a_plane, uint32_t b, int b_plane, bool accumulate) {
  using Product = WarpgroupProduct<typename Factor<T>::Part, N, ALONG_ROWS>;
  constexpr uint32_t kPanel = ALONG_ROWS ? Tile<D>::kPanelBytes : 0;
  if constexpr (kSplit<T>) {
    Product::run(sum, warpgroup_operand<D>(a + a_plane), warpgroup_operand<D>(b, kPanel), accumulate);
    Product::run(sum, warpgroup_operand<D>(a), warpgroup_operand<D>(b + b_plane, kPanel), true);
  }
  Product::run(sum, warpgroup_operand<D>(a), warpgroup_operand<D>(b, kPanel), accumulate || kSplit<T>);
}
template <typename T, int D, int N> __device__ __forceinline__ void group_multiply(float (&sum)[N / 8][4], const Fragment<T> &a, uint32_t b, int b_plane, bool accumulate) {
  using Product = WarpgroupProduct<typename Factor<T>::Part, N, true>;
  if constexpr (kSplit<T>) {
    Product::run(sum, a.part[1], warpgroup_operand<D>(b, Tile<D>::kPanelBytes), accumulate);
    Product::run(sum, a.part[0], warpgroup_operand<D>(b + b_plane, Tile<D>::kPanelBytes), true);
  }
  Product::run(sum, a.part[0], warpgroup_operand<D>(b, Tile<D>::kPanelBytes), accumulate || kSplit<T>);
}

// A tile's D columns as the products of warpgroups take them: 128 at most at a time, COUNT from FIRST on.
template <int FIRST, int COUNT> struct Range {
  static constexpr int kFirst = FIRST, kCount = COUNT;
};
template <int D, typename Work> __device__ __forceinline__ void each_range(const Work &work) {
  work(Range<0, D <= 128 ? D : 128>{});
  if constexpr (D > 128) work(Range<128, D - 128>{});
}
template <int COUNT, int TILES> __device__ __forceinline__ float (&part_of(float (&sum)[TILES][4], int first))[COUNT][4] { return *reinterpret_cast<float(*)[COUNT][4]>(&sum[first]); }

// acc += (weights z) factor for a warpgroup, COUNT blocks of 16 tokens; split factors in a sum of their own first.
template <typename T, int D, int COUNT>
__device__ __forceinline__ void gather_by_group(float (&acc)[D / 8][4], uint32_t z, int plane, const float (&factor)[2], const Fragment<T> (&weights)[COUNT]) {
  float fresh[kSplit<T> ? D / 8 : 1][4];
  if constexpr (kSplit<T>) warpgroup_keep(fresh);
  else warpgroup_keep(acc);
  warpgroup_begin();
#pragma unroll
  for (int k = 0; k < COUNT; ++k)
    each_range<D>([&](auto range) {
      constexpr int kFirst = decltype(range)::kFirst, kCount = decltype(range)::kCount;
      const uint32_t tile = z + Tile<D>::rows_at(k) + Tile<D>::columns_at(kFirst / 8);
      if constexpr (kSplit<T>) group_multiply<T, D, kCount>(part_of<kCount / 8>(fresh, kFirst / 8), weights[k], tile, plane, k > 0);
      else group_multiply<T, D, kCount>(part_of<kCount / 8>(acc, kFirst / 8), weights[k], tile, plane, true);
    });
  warpgroup_commit();
  warpgroup_wait<0>();
  if constexpr (kSplit<T>) {
    warpgroup_keep(fresh);
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[n][i] = fmaf(fresh[n][i], factor[i / 2], acc[n][i]);
  } else {
    warpgroup_keep(acc);
  }
}

// Two neighbours into their parts.
__device__ __forceinline__ void split_two(uint32_t &high, uint32_t &low, float x, float y) {
  using E = Element<__half>;
  high = E::pack(x, y);
  low = E::pack(x - E::low(high), y - E::high(high));
}

// How a warp goes through rows of D elements: each lane has FOURS groups of four neighbours of one of ROWS rows.
template <int D> struct RowLanes {
  static constexpr int LANES = D <= 32 ? 8 : D <= 64 ? 16 : 32, ROWS = 32 / LANES, FOURS = (D / 4 + LANES - 1) / LANES;
  int row, lane;
  __device__ __forceinline__ explicit RowLanes(int lane_id) : row(lane_id / LANES), lane(lane_id % LANES) {}
  __device__ __forceinline__ int column(int i) const { return 4 * (lane + i * LANES); }
  static constexpr __device__ __forceinline__ bool all() { return D % (4 * LANES) == 0; }
  __device__ __forceinline__ bool has(int i) const { return all() || column(i) < D; }
};

__device__ __forceinline__ float4 four_of(const float *x) { return *reinterpret_cast<const float4 *>(x); }
__device__ __forceinline__ float4 four_of(const __nv_bfloat16 *x) {
  using E = Element<__nv_bfloat16>;
  const uint2 two = *reinterpret_cast<const uint2 *>(x);
  return make_float4(E::low(two.x), E::high(two.x), E::low(two.y), E::high(two.y));
}
__device__ __forceinline__ float dot(const float4 &x, const float4 &y) { return fmaf(x.x, y.x, fmaf(x.y, y.y, fmaf(x.z, y.z, x.w * y.w))); }
__device__ __forceinline__ float peak_of(const float4 &x) { return fmaxf(fmaxf(fabsf(x.x), fabsf(x.y)), fmaxf(fabsf(x.z), fabsf(x.w))); }

// |x| <= 1e-12 has no direction. Float32 to the last place: one step of Newton's after the fast root.
__device__ __forceinline__ float inverse_length(float square) {
  const float root = reciprocal_root(square);
  return square > kSmallestSquare ? root * fmaf(-0.5f * square * root, root, 1.5f) : 0.f;
}
__device__ __forceinline__ float inverse_or_zero(float x) { return x == 0.f ? 0.f : 1.f / x; }

// Four neighbours of a row, times `up`, into both parts of a tile.
template <int D> __device__ __forceinline__ void put_four(unsigned char *tile, int plane, int row, int column, const float4 &x, float up) {
  uint2 high, low;
  split_two(high.x, low.x, x.x * up, x.y * up);
  split_two(high.y, low.y, x.z * up, x.w * up);
  unsigned char *const at = tile + Tile<D>::at(row, column / 8) + column % 8 * 2;
  *reinterpret_cast<uint2 *>(at) = high;
  *reinterpret_cast<uint2 *>(at + plane) = low;
}
// A lane's part of one row, from global memory or, where elements are kept as they are, from a tile.
template <int D> struct Row {
  using Lanes = RowLanes<D>;
  float4 x[Lanes::FOURS];
  template <typename T> __device__ __forceinline__ void read(const T *row, const Lanes &lanes, bool real) {
#pragma unroll
    for (int i = 0; i < Lanes::FOURS; ++i) x[i] = real && lanes.has(i) ? four_of(row + lanes.column(i)) : make_float4(0.f, 0.f, 0.f, 0.f);
  }
  __device__ __forceinline__ void read_tile(const unsigned char *tile, int row, const Lanes &lanes) {
#pragma unroll
    for (int i = 0; i < Lanes::FOURS; ++i) {
      const int column = lanes.column(i);
      x[i] = lanes.has(i) ? four_of(reinterpret_cast<const __nv_bfloat16 *>(tile + Tile<D>::at(row, column / 8) + column % 8 * 2)) : make_float4(0.f, 0.f, 0.f, 0.f);
    }
  }
  __device__ __forceinline__ float dot(const Row &y) const {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < Lanes::FOURS; ++i) sum += linattn_chunks::dot(x[i], y.x[i]);
    return sum;
  }
  __device__ __forceinline__ float peak() const {
    float most = 0.f;
#pragma unroll
    for (int i = 0; i < Lanes::FOURS; ++i) most = fmaxf(most, peak_of(x[i]));
    return most;
  }
  __device__ __forceinline__ void put(unsigned char *tile, int plane, int row, const Lanes &lanes, float up) const {
#pragma unroll
    for (int i = 0; i < Lanes::FOURS; ++i)
      if (lanes.has(i)) put_four<D>(tile, plane, row, lanes.column(i), x[i], up);
  }
};

// The rows of a tile that one warp goes through: some at a time (BATCH turns), whose loads and sums over lanes wait for each other's sake together.
template <int D, int ROWS, int WARPS> struct WarpRows {
  using Lanes = RowLanes<D>;
  static constexpr int TURNS = (ROWS + WARPS * Lanes::ROWS - 1) / (WARPS * Lanes::ROWS), MOST = 8 / Lanes::FOURS, BATCH = TURNS < MOST ? TURNS : MOST;
  Lanes lanes;
  int warp;
  __device__ __forceinline__ WarpRows(int warp, int lane_id) : lanes(lane_id), warp(warp) {}
  static constexpr __device__ __forceinline__ bool even() { return ROWS % (WARPS * Lanes::ROWS) == 0; }
  __device__ __forceinline__ bool has(int turn) const { return even() || (turn * WARPS + warp) * Lanes::ROWS < ROWS; }
  __device__ __forceinline__ int row(int turn) const { return (turn * WARPS + warp) * Lanes::ROWS + lanes.row; }
  // work(first turn) for every batch, in which each(work) is for every turn: its number in the batch and its row.
  template <typename Work> __device__ __forceinline__ void batches(const Work &work) const {
#pragma unroll
    for (int first = 0; first < TURNS; first += BATCH) work(first);
  }
  template <typename Work> __device__ __forceinline__ void each(int first, const Work &work) const {
#pragma unroll
    for (int i = 0; i < BATCH; ++i)
      if (first + i < TURNS && has(first + i)) work(i, row(first + i));
  }
  static __device__ __forceinline__ void sums(float (&x)[BATCH]) {
#pragma unroll
    for (int step = 1; step < Lanes::LANES; step *= 2)
#pragma unroll
      for (int i = 0; i < BATCH; ++i) x[i] += __shfl_xor_sync(0xffffffffu, x[i], step);
  }
  static __device__ __forceinline__ void peaks(float (&x)[BATCH]) {
#pragma unroll
    for (int step = 1; step < Lanes::LANES; step *= 2)
#pragma unroll
      for (int i = 0; i < BATCH; ++i) x[i] = fmaxf(x[i], __shfl_xor_sync(0xffffffffu, x[i], step));
  }
};

}  // namespace linattn_chunks
