// The tensor-core path (mma.sync, sm_80 and later) of degree-1 attention: what the dispatcher needs to know of it.
#pragma once
#include "linattn.h"

// 16-byte rows: what the asynchronous copies of this path ask of every tensor.
inline bool mma_aligned(const linattn_tensor &tensor) {
  return reinterpret_cast<uintptr_t>(tensor.data) % 16 == 0 && tensor.batch_stride % 8 == 0 && tensor.head_stride % 8 == 0 &&
         tensor.token_stride % 8 == 0;
}

// Whether this path computes the problem. Results and gradients must be mma_aligned too: the dispatcher checks them, and takes a
// workspace that serves both paths.
bool mma_supports(const linattn_problem &problem);
int64_t mma_forward_workspace(const linattn_problem &problem);
int64_t mma_backward_workspace(const linattn_problem &problem);
int mma_forward(const linattn_problem &problem, const linattn_forward_result &result);   // 0 or a cudaError_t
int mma_backward(const linattn_problem &problem, const linattn_backward_data &data);
