// How a problem is cut into chunks, and where the parts of its workspace lie.
#pragma once
#include <cuda_runtime.h>

#include "linattn.h"

namespace linattn_chunks {

using Plan = linattn_plan;

// Offsets in floats, each on a 256-byte boundary. Forward has the states alone.
struct Workspace {
  int64_t states, error, partials, forward_floats, backward_floats;
  Workspace(const linattn_problem &problem, const Plan &plan);
};

template <typename T, int D> cudaError_t forward(const linattn_problem &problem, const linattn_forward_result &result, const Plan &plan);
template <typename T, int D> cudaError_t backward(const linattn_problem &problem, const linattn_backward_data &data, const Plan &plan);

// Shared memory of the block that takes most, as its struct says.
template <typename T, int D> int shared_bytes();

}  // namespace linattn_chunks
