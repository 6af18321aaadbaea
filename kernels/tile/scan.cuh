// A scan over the states of a head's segments.
#pragma once
#include "tile/state.cuh"

namespace linattn_tile {

enum class Scan { kPrefix, kSuffix, kTotal };

// Turns the segments' own states into what each one starts from (the sum of those before, or after it), or the first into the sum of all.
// `initial` and `total` are the caller's states, or null. States lie `apart`; nobody has made those of the `unneeded` last ones that a scan meets, unless
// the sum of all is asked for.
template <int D>
__global__ void scan_kernel(float *states, const float *keeps, int segments, Scan scan, const float *initial, float *total, int unneeded = 1, int apart = 1) {
  const int index = blockIdx.x * blockDim.x + threadIdx.x;
  if (index > D * D + 2 * D) return;
  const int64_t head = blockIdx.y;
  const int row = index / D, column = index % D;
  const int64_t callers = head * (D + 1) * (D + 1) + (index < D * D       ? row * (D + 1) + column
                                                      : index < D * D + D ? (index - D * D) * (D + 1) + D
                                                                          : D * (D + 1) + (index - D * D - D));
  float *const at = states + head * segments * apart * kStateFloats<D> + index;
  float sum = initial ? initial[callers] : 0.f;
  const int64_t step = (scan == Scan::kSuffix ? -kStateFloats<D> : kStateFloats<D>)*static_cast<int64_t>(apart);
  float *const start = scan == Scan::kSuffix ? at - step * (segments - 1) : at;
  const int known = scan == Scan::kTotal || total ? segments : segments - unneeded;
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

}  // namespace linattn_tile
