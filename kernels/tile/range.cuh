// Keeping the factors of float16 products within float16's range, 2^-24 to 65504, which bfloat16, as wide as float32, has no need of.
//
// What a chunk multiplies is brought near one before it is rounded, by powers of two, which round nothing: keys and queries in their tiles, the
// state, the coefficients, the rows of dO. Backward in n, dO is divided by g in its tile besides. Products and sums are float32.
#pragma once
#include "tile/tile.cuh"

namespace linattn_tile {

constexpr int kStatePeak = 12;  // the state's largest element, and that of a chunk of dO / g, come to lie in [2^12, 2^13)
constexpr int kRowPeak = -5;    // that of a row of dO in [2^-5, 2^-4), so that its products with values fit
constexpr float kSlopeWorth = 0x1p14f;  // products of dO / g with values are rounded in units of this

// A power of two and its inverse.
struct Lift {
  float up, down;
};

// What brings `peak` >= 0 to [2^exponent, 2^(exponent + 1)); nothing is left as it is.
__device__ __forceinline__ Lift lift_to(int exponent, float peak) {
  const int own = static_cast<int>(__float_as_uint(peak) >> 23), up = own < 60 ? 127 : 254 + exponent - own;  // exponents as float32 writes them
  return {__uint_as_float(up << 23), __uint_as_float((254 - up) << 23)};
}
__device__ __forceinline__ Lift coefficient_lift(float a, float b_tau) { return lift_to(0, fmaxf(fabsf(a), fabsf(b_tau))); }
// Of a chunk's sums over dO / g: the coefficients are lifted too.
__device__ __forceinline__ Lift chunk_lift(const float (&coefficients)[2], const Lift &gradient) {
  const Lift own = coefficient_lift(coefficients[0], coefficients[1]);
  return {gradient.up * own.up, gradient.down * own.down};
}

__device__ __forceinline__ float warp_peak(float x) { return __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(x))); }

template <int WARPS> __device__ __forceinline__ float peak_of_warps(const float *peaks) {
  float peak = peaks[0];
#pragma unroll
  for (int w = 1; w < WARPS; ++w) peak = fmaxf(peak, peaks[w]);
  return peak;
}

// The largest element of a warp's part of the state; with its column margin where `column`.
template <typename T, int PAIRS> __device__ __forceinline__ float state_peak(const StateTile<T, PAIRS> &state, int pairs, bool column) {
  float peak = column ? fmaxf(fabsf(state.column[0] + state.column[1]), fabsf(state.column[2] + state.column[3])) : 0.f;
#pragma unroll
  for (int p = 0; p < PAIRS; ++p)
    if (p < pairs)
#pragma unroll
      for (int i = 0; i < 4; ++i) peak = fmaxf(peak, fmaxf(fabsf(state.sum[p][0][i]), fabsf(state.sum[p][1][i])));
  return warp_peak(peak);
}

// The largest elements of rows `group` and `group + 8`, by their fragments.
template <typename T, int BLOCKS> __device__ __forceinline__ void row_peaks(float &first, float &second, const uint32_t (&x)[BLOCKS][4]) {
  first = second = 0.f;
#pragma unroll
  for (int block = 0; block < BLOCKS; ++block)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float &peak = i % 2 ? second : first;
      peak = fmaxf(peak, fmaxf(fabsf(Element<T>::low(x[block][i])), fabsf(Element<T>::high(x[block][i]))));
    }
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    first = fmaxf(first, __shfl_xor_sync(0xffffffffu, first, step));
    second = fmaxf(second, __shfl_xor_sync(0xffffffffu, second, step));
  }
}

template <typename T, int PAIRS> __device__ __forceinline__ void scale_state(StateTile<T, PAIRS> &state, float factor) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    state.column[i] *= factor, state.line[0][i] *= factor, state.line[1][i] *= factor;
#pragma unroll
    for (int p = 0; p < PAIRS; ++p) state.sum[p][0][i] *= factor, state.sum[p][1][i] *= factor;
  }
}

template <typename T> __device__ __forceinline__ uint4 scale_piece(const uint4 piece, float factor) {
  const auto two = [&](uint32_t x) { return Element<T>::pack(Element<T>::low(x) * factor, Element<T>::high(x) * factor); };
  return make_uint4(two(piece.x), two(piece.y), two(piece.z), two(piece.w));
}

// The rows of a tile come to lengths in [1, 2), but for those that have no direction. `downs`, or null, gets what undoes it.
template <typename T, int D, int C, int THREADS> __device__ __forceinline__ void lift_rows(unsigned char *tile, float *downs, int thread) {
  constexpr int kLanes = D == 80 ? 2 : 4, kPieces = D / 8 / kLanes;  // lanes to a row
  static_assert(C * kLanes % 32 == 0 && kPieces * kLanes * 8 == D, "whole warps, whole rows");
  const auto square = [](uint32_t x) { return Element<T>::low(x) * Element<T>::low(x) + Element<T>::high(x) * Element<T>::high(x); };
  for (int i = thread; i < C * kLanes; i += THREADS) {
    const int row = i / kLanes;
    uint4 pieces[kPieces];
    float sum = 0.f;
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      pieces[p] = *reinterpret_cast<const uint4 *>(tile + Tile<D>::at(row, i % kLanes + p * kLanes));
      sum += (square(pieces[p].x) + square(pieces[p].y)) + (square(pieces[p].z) + square(pieces[p].w));
    }
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    const int half = sum > kSmallestSquare ? (static_cast<int>(__float_as_uint(sum) >> 23) - 127) >> 1 : 0;  // the length's exponent
    const float up = __uint_as_float((127 - half) << 23);
#pragma unroll
    for (int p = 0; p < kPieces; ++p) *reinterpret_cast<uint4 *>(tile + Tile<D>::at(row, i % kLanes + p * kLanes)) = scale_piece<T>(pieces[p], up);
    if (downs && i % kLanes == 0) downs[row] = __uint_as_float((127 + half) << 23);
  }
}

// A chunk of dO becomes dO / g times a power of two: first its peak, that of e too, from every thread's part; then, behind a barrier, the tile.
template <typename T, int D, int C, int THREADS> struct DividedByMass {
  unsigned char *tile;
  const float *mass, *error;

  __device__ __forceinline__ float inverse(int row) const { return mass[row] == 0.f ? 0.f : reciprocal(mass[row]); }
  __device__ __forceinline__ void measure(float *peaks, int thread) const {
    float peak = 0.f;
    const auto larger = [](uint32_t x) { return fmaxf(fabsf(Element<T>::low(x)), fabsf(Element<T>::high(x))); };
    for (int i = thread; i < C * (D / 8); i += THREADS) {
      const uint4 x = *reinterpret_cast<const uint4 *>(tile + Tile<D>::at(i / (D / 8), i % (D / 8)));
      peak = fmaxf(peak, fmaxf(fmaxf(larger(x.x), larger(x.y)), fmaxf(larger(x.z), larger(x.w))) * fabsf(inverse(i / (D / 8))));
    }
    if (thread < C) peak = fmaxf(peak, fabsf(error[thread]));
    peaks[thread / 32] = warp_peak(peak);
  }
  __device__ __forceinline__ void divide(const Lift &lift, int thread) const {
    for (int i = thread; i < C * (D / 8); i += THREADS) {
      uint4 &x = *reinterpret_cast<uint4 *>(tile + Tile<D>::at(i / (D / 8), i % (D / 8)));
      x = scale_piece<T>(x, inverse(i / (D / 8)) * lift.up);
    }
  }
};

// How the state of dO / g is lifted: as the chunk was that came in last. Its column margin is in units of kSlopeWorth besides.
struct StateLift {
  Lift lift{1.f, 1.f};

  template <typename State> __device__ __forceinline__ void change(State &state, const Lift &to) {
    if (to.up != lift.up) scale_state(state, lift.down * to.up);
    lift = to;
  }
  template <typename State> __device__ __forceinline__ void enter(State &state) {
#pragma unroll
    for (int i = 0; i < 4; ++i) state.column[i] /= kSlopeWorth;
  }
  template <typename State> __device__ __forceinline__ void leave(State &state) {
    change(state, {1.f, 1.f});
#pragma unroll
    for (int i = 0; i < 4; ++i) state.column[i] *= kSlopeWorth;
  }
};

}  // namespace linattn_tile
