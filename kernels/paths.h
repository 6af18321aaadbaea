// What api.cu chooses between. A path is a pair of launchers, what they ask of the workspace and whether they take a problem at all.
#pragma once
#include <cuda_runtime.h>

#include "linattn.h"

namespace linattn {

// kernels/generic_*.cu: products in tf32, three of them for float32; takes every problem.
int64_t generic_forward_workspace(const linattn_problem &problem);
int64_t generic_backward_workspace(const linattn_problem &problem);
cudaError_t generic_forward(const linattn_problem &problem, const linattn_forward_result &result);
cudaError_t generic_backward(const linattn_problem &problem, const linattn_backward_data &data);

// kernels/mma_*.cu: the tensor cores. `mma_takes_*` decides by the problem alone (never by its pointers' contents or the result asked for),
// so that the workspace, the launcher and linattn_path agree; forward and backward may decide differently.
bool mma_takes_forward(const linattn_problem &problem);
bool mma_takes_backward(const linattn_problem &problem);
int64_t mma_forward_workspace(const linattn_problem &problem);
int64_t mma_backward_workspace(const linattn_problem &problem);
cudaError_t mma_forward(const linattn_problem &problem, const linattn_forward_result &result);
cudaError_t mma_backward(const linattn_problem &problem, const linattn_backward_data &data);

// kernels/pairs_*.cu: the second degree on the tensor cores, pairs formed. Decides as mma_takes_* do.
bool pairs_takes_forward(const linattn_problem &problem);
bool pairs_takes_backward(const linattn_problem &problem);
int64_t pairs_forward_workspace(const linattn_problem &problem);
int64_t pairs_backward_workspace(const linattn_problem &problem);
cudaError_t pairs_forward(const linattn_problem &problem, const linattn_forward_result &result);
cudaError_t pairs_backward(const linattn_problem &problem, const linattn_backward_data &data);

// kernels/chunks_*.cu: float32 and wide heads on the tensor cores. Decides as mma_takes_* do, forward and backward alike.
bool chunks_take(const linattn_problem &problem);
int64_t chunks_forward_workspace(const linattn_problem &problem);
int64_t chunks_backward_workspace(const linattn_problem &problem);
cudaError_t chunks_forward(const linattn_problem &problem, const linattn_forward_result &result);
cudaError_t chunks_backward(const linattn_problem &problem, const linattn_backward_data &data);

// kernels/decode.cu: one new token a sequence, its state read and written in place; takes every problem of length 1.
int64_t step_workspace(const linattn_problem &problem);
cudaError_t step(const linattn_problem &problem, const linattn_forward_result &result);

}  // namespace linattn
