// A launch with the shared memory it asks for, and the last sum of every backward pass.
#pragma once
#include <cuda_runtime.h>
#include <stdint.h>

namespace linattn_tile {

template <typename Kernel, typename Arguments>
cudaError_t launch(Kernel kernel, int blocks, int threads, int shared, cudaStream_t stream, const Arguments &arguments) {
  // Asked for at every launch: it is cheap, and a process may use several devices.
  if (const cudaError_t failed = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared)) return failed;
  kernel<<<blocks, threads, shared, stream>>>(arguments);
  return cudaPeekAtLastError();
}

// The coefficients' gradients from every block's sums, in a fixed order: da = sum dA, db = tau sum dA q^.k^, dtau = b sum dA q^.k^.
static __global__ void coefficients_kernel(const float *partials, const float *coefficients, float *gradients, int batch, int heads, int segments) {
  const int head = blockIdx.x, lane = threadIdx.x;
  double pairs = 0, products = 0;
  for (int i = lane; i < batch * segments; i += 32) {
    const float *const at = partials + 2 * ((static_cast<int64_t>(i / segments) * heads + head) * segments + i % segments);
    pairs += at[0], products += at[1];
  }
  for (int step = 16; step > 0; step /= 2) {
    pairs += __shfl_down_sync(0xffffffffu, pairs, step);
    products += __shfl_down_sync(0xffffffffu, products, step);
  }
  if (lane == 0) {
    gradients[head] = static_cast<float>(pairs);
    gradients[heads + head] = static_cast<float>(products * coefficients[3 * heads + head]);
    gradients[2 * heads + head] = 0.f;
    gradients[3 * heads + head] = static_cast<float>(products * coefficients[heads + head]);
  }
}

#define LINATTN_TRY(call)                                 \
  do {                                                    \
    if (const cudaError_t failed = (call)) return failed; \
  } while (0)

}  // namespace linattn_tile
