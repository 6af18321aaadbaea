// What the paths ask before they take a problem: of the card, and of where a tensor's rows begin.
#pragma once
#include <cuda_runtime.h>

#include "linattn.h"

namespace linattn {

// An attribute of the current device; `otherwise` where there is none.
inline int card(cudaDeviceAttr attribute, int otherwise = 0) {
  int device = 0, value = 0;
  return cudaGetDevice(&device) == cudaSuccess && cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess ? value : otherwise;
}

// The most shared memory that a block may ask for, bytes.
inline int shared_memory() { return card(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

// Whether every row begins on a 16-byte boundary, as the asynchronous copies ask; `elements` of the tensor take 16 bytes.
inline bool aligned(const linattn_tensor &tensor, int64_t elements = 8) {
  return reinterpret_cast<uintptr_t>(tensor.data) % 16 == 0 && tensor.batch_stride % elements == 0 && tensor.head_stride % elements == 0 && tensor.token_stride % elements == 0;
}

}  // namespace linattn
