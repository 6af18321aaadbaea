// The window's output and that of the attention beside it, mixed by the gate, a warp a query head; and the new tokens are counted.
#pragma once
#include "window/arguments.cuh"

namespace linattn_ring {

constexpr float SMALLEST_MEAN = 1e-6f;  // as ops/beside.py has it
constexpr int SLICES = MAX_DIM / 32;    // columns of a lane

// What the output of the attention beside the window is multiplied by.
__device__ inline float output_factor(const linattn_beside &beside, int64_t row, int head, float mean_square) {
  float factor = 1.f;
  if (beside.output_power) factor = expf(beside.output_log_scale[head] - 0.5f * beside.output_power[head] * logf(mean_square + SMALLEST_MEAN));
  return beside.output_gate ? factor * beside.output_gate[row] : factor;
}

__global__ void __launch_bounds__(THREADS) mix_kernel(const Arguments args) {
  const linattn_window &w = args.window;
  const linattn_beside &beside = args.beside;
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / 32;
  if (row >= static_cast<int64_t>(w.batch) * w.query_heads) return;
  const int batch = static_cast<int>(row / w.query_heads), head = static_cast<int>(row % w.query_heads);
  if (head == 0 && lane == 0 && !is_padding(w, batch)) ++w.seen[batch];
  const float *const near = args.scratch.near + row * w.value_dim;
  const int64_t to = offset_of(w.out, batch, head, 0);
  if (!args.scratch.left[batch]) {
    for (int i = lane; i < w.value_dim; i += 32) linattn::store(w.out.data, w.dtype, to + i, near[i]);
    return;
  }
  const bool gated = beside.log_input_gate != nullptr;
  const float *const far = args.scratch.far + row * (w.value_dim + gated);
  const float share = beside.gate[batch * beside.gate_stride + head], mass = gated ? far[w.value_dim] : 1.f, inverse = 1.f / (mass == 0.f ? 1.f : mass);
  float x[SLICES], square = 0.f;
#pragma unroll
  for (int t = 0; t < SLICES; ++t) {
    const int i = lane + 32 * t;
    x[t] = i < w.value_dim ? inverse * far[i] : 0.f, square += x[t] * x[t];
  }
  const float factor = output_factor(beside, row, head, warp_sum(square) / static_cast<float>(w.value_dim));
#pragma unroll
  for (int t = 0; t < SLICES; ++t)
    if (const int i = lane + 32 * t; i < w.value_dim) linattn::store(w.out.data, w.dtype, to + i, share * near[i] + (1.f - share) * factor * x[t]);
}

// What is left to do where nothing lies beside the window.
__global__ void __launch_bounds__(THREADS) count_kernel(const Arguments args) {
  const int batch = blockIdx.x * THREADS + threadIdx.x;
  if (batch < args.window.batch && !is_padding(args.window, batch)) ++args.window.seen[batch];
}

}  // namespace linattn_ring
