// Factors of products as shared memory holds them: as they are, or float32 split into two float16 parts, 22 bits of it.
//
// Three of the four products of two split factors are summed, by the tensor cores at their 16-bit rate. Powers of two, which round nothing, bring
// the largest element of a row to 2^14, so that elements down to 2^-17 of it keep all 22 bits; what a product is worth then is a number beside the row.
// Tensor cores round their running sums toward zero: a sum over many tokens is therefore begun anew for every tile and added up on the ordinary cores.
#pragma once
#include "tile/range.cuh"
#include "tile/warpgroup.cuh"

namespace linattn_chunks {

using namespace linattn_tile;

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

// A power of two that brings `peak` to [2^exponent, 2^(exponent + 1)), however small it is: a gradient of a mean over many tokens is no less exact
// than any other. (Nothing, and what float32 itself hardly holds, is lifted as far as a power of two goes.)
__device__ __forceinline__ Lift lift_from(float peak, int exponent) {
  const int own = static_cast<int>(__float_as_uint(peak) >> 23), up = min(max(254 + exponent - own, 1), 253);  // exponents as float32 writes them
  return {__uint_as_float(up << 23), __uint_as_float((254 - up) << 23)};
}

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
template <int COUNT, int TILES> __device__ __forceinline__ float (&part_of(float (&sum)[TILES][4], int first))
    [COUNT][4] { return *reinterpret_cast<float (*)[COUNT][4]>(&sum[first]); }

// acc += (weights z) factor for a warpgroup, COUNT blocks of 16 tokens; split factors in a sum of their own first, WIDTH columns of it at a time.
template <typename T, int D, int COUNT, int WIDTH = D>
__device__ __forceinline__ void gather_by_group(float (&acc)[D / 8][4], uint32_t z, int plane, const float (&factor)[2], const Fragment<T> (&weights)[COUNT]) {
  if constexpr (kSplit<T>) {
#pragma unroll
    for (int begin = 0; begin < D; begin += WIDTH) {
      float fresh[WIDTH / 8][4];
      warpgroup_keep(fresh);
      warpgroup_begin();
#pragma unroll
      for (int k = 0; k < COUNT; ++k) group_multiply<T, D, WIDTH>(fresh, weights[k], z + Tile<D>::rows_at(k) + Tile<D>::columns_at(begin / 8), plane, k > 0);
      warpgroup_commit();
      warpgroup_wait<0>();
      warpgroup_keep(fresh);
#pragma unroll
      for (int n = 0; n < WIDTH / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[begin / 8 + n][i] = fmaf(fresh[n][i], factor[i / 2], acc[begin / 8 + n][i]);
    }
  } else {
    warpgroup_keep(acc);
    warpgroup_begin();
#pragma unroll
    for (int k = 0; k < COUNT; ++k)
      each_range<D>([&](auto range) {
        constexpr int kFirst = decltype(range)::kFirst, kCount = decltype(range)::kCount;
        group_multiply<T, D, kCount>(part_of<kCount / 8>(acc, kFirst / 8), weights[k], z + Tile<D>::rows_at(k) + Tile<D>::columns_at(kFirst / 8), plane, true);
      });
    warpgroup_commit();
    warpgroup_wait<0>();
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
__device__ __forceinline__ float inverse_or_zero(float x) { return x == 0.f ? 0.f : reciprocal(x); }

// Four neighbours of a row, times `up`, into both parts of a tile.
__device__ __forceinline__ void put_four(unsigned char *at, int plane, const float4 &x, float up) {
  uint2 high, low;
  split_two(high.x, low.x, x.x * up, x.y * up);
  split_two(high.y, low.y, x.z * up, x.w * up);
  *reinterpret_cast<uint2 *>(at) = high;
  *reinterpret_cast<uint2 *>(at + plane) = low;
}
// Where four neighbours lie in a tile of 16-bit elements.
template <int D> __device__ __forceinline__ uint32_t place_of(int row, int column) { return Tile<D>::at(row, column / 8) + column % 8 * 2; }

// A lane's part of one row, from global memory or, where elements are kept as they are, from a tile.
template <int D> struct Row {
  using Lanes = RowLanes<D>;
  float4 x[Lanes::FOURS];
  template <typename T> __device__ __forceinline__ void read(const T *row, const Lanes &lanes, bool real) {
#pragma unroll
    for (int i = 0; i < Lanes::FOURS; ++i) x[i] = real && lanes.has(i) ? four_of(row + lanes.column(i)) : make_float4(0.f, 0.f, 0.f, 0.f);
  }
  template <typename WarpRows> __device__ __forceinline__ void read_tile(const unsigned char *tile, const WarpRows &mine, int turn) {
#pragma unroll
    for (int i = 0; i < Lanes::FOURS; ++i)
      x[i] = mine.lanes.has(i) ? four_of(reinterpret_cast<const __nv_bfloat16 *>(tile + mine.place(turn, i))) : make_float4(0.f, 0.f, 0.f, 0.f);
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
  template <typename WarpRows> __device__ __forceinline__ void put(unsigned char *tile, int plane, const WarpRows &mine, int turn, float up) const {
#pragma unroll
    for (int i = 0; i < Lanes::FOURS; ++i)
      if (mine.lanes.has(i)) put_four(tile + mine.place(turn, i), plane, x[i], up);
  }
};

// The rows of a tile that one warp goes through: some at a time (BATCH turns), whose loads and sums over lanes wait for each other's sake together.
template <int D, int ROWS, int WARPS> struct WarpRows {
  using Lanes = RowLanes<D>;
  static constexpr int TURNS = (ROWS + WARPS * Lanes::ROWS - 1) / (WARPS * Lanes::ROWS), BATCH = TURNS < 8 ? TURNS : 8;
  static constexpr int APART = WARPS * Lanes::ROWS;  // rows from turn to turn
  static constexpr bool kEven = ROWS % APART == 0 && APART % 8 == 0;
  Lanes lanes;
  int warp;
  uint32_t first_place;
  __device__ __forceinline__ WarpRows(int warp, int lane_id) : lanes(lane_id), warp(warp), first_place(place_of<D>(row(0), lanes.column(0))) {}
  __device__ __forceinline__ bool has(int turn) const { return ROWS % APART == 0 || (turn * WARPS + warp) * Lanes::ROWS < ROWS; }
  // Where a lane's i-th four of a turn's row lies in a tile; where turns are eight rows apart, no more than a constant away from the first.
  __device__ __forceinline__ uint32_t place(int turn, int i) const {
    if constexpr (!kEven) return place_of<D>(row(turn), lanes.column(i));
    return first_place + Tile<D>::rows_at(turn * APART / 16) + turn * APART % 16 * Tile<D>::kRowBytes + Tile<D>::columns_at(i * Lanes::LANES / 2);
  }
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
