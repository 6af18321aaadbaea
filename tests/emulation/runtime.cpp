// What the launchers ask of the CUDA runtime: a card of compute capability 8.0, or 9.0 for Hopper's library, on which every launch succeeds at once.
// And Hopper's kernels, which the first has not.
#include <cuda_runtime.h>

#include <cstdlib>

#include "pairs/backward.cuh"

namespace {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr int kMajor = 9, kProcessors = 132;
#else
constexpr int kMajor = 8, kProcessors = 108;
#endif
int asked(const char *name, int otherwise) {
  const char *const words = std::getenv(name);
  return words ? std::atoi(words) : otherwise;
}
int shared_memory() { return asked("EMULATED_SHARED_KB", 227) << 10; }  // 227: more than such a card has, so that no head dim goes without
}  // namespace

extern "C" {
cudaError_t cudaGetDevice(int *device) { return *device = 0, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr what, int) {
  switch (what) {
    case cudaDevAttrComputeCapabilityMajor: return *value = kMajor, cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: return *value = 0, cudaSuccess;
    case cudaDevAttrMultiProcessorCount: return *value = asked("EMULATED_PROCESSORS", kProcessors), cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return *value = shared_memory(), cudaSuccess;
    default: return cudaErrorInvalidValue;
  }
}
cudaError_t cudaFuncSetAttribute(const void *, cudaFuncAttribute, int bytes) { return bytes <= shared_memory() ? cudaSuccess : cudaErrorInvalidValue; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
const char *cudaGetErrorString(cudaError_t) { return "an error of the emulation"; }
}

#if !defined(__CUDA_ARCH_FEAT_SM90_ALL)
namespace linattn_pairs {
bool hopper_takes(const linattn_problem &) { return false; }
int hopper_shared_bytes(const linattn_problem &) { return 0; }
int64_t key_gates_bytes(const linattn_problem &) { return 0; }
cudaError_t hopper_launch(const Arguments &, cudaStream_t) { return cudaErrorNotSupported; }
bool state_takes(const linattn_problem &) { return false; }
int64_t state_chunks(const linattn_problem &) { return 1; }
int64_t unit_key_bytes(const linattn_problem &) { return 0; }
int64_t sums_bytes(const linattn_problem &) { return 0; }
int64_t states_bytes(const linattn_problem &) { return 0; }
cudaError_t state_launch(const Arguments &, cudaStream_t) { return cudaErrorNotSupported; }
bool running_takes(const linattn_problem &, bool) { return false; }
RunningMemory::RunningMemory(const linattn_problem &, bool) : bytes(0), segments(1), shared_bytes(0) {}
cudaError_t running_output_launch(const Arguments &, void *, cudaStream_t) { return cudaErrorNotSupported; }
cudaError_t running_gradients_launch(const Gradients &, void *, cudaStream_t) { return cudaErrorNotSupported; }
bool group_gradients_take(const linattn_problem &) { return false; }
GroupPlan group_gradients_plan(TileDims, bool) { return {}; }
cudaError_t group_gradients_launch(const Gradients &, bool, cudaStream_t) { return cudaErrorNotSupported; }
}  // namespace linattn_pairs
#endif
