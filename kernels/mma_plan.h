// How a problem is cut into blocks, and where the parts of its workspace lie.
#pragma once
#include <cuda_runtime.h>

#include "linattn.h"

namespace linattn_mma {

struct Plan {
  int32_t segments;        // of each head's sequence, one block each
  int64_t segment_length;  // tokens, a multiple of the chunk
  bool needs_states;       // whether the segments' states must be known before they are worked on
};

Plan make_plan(const linattn_problem &problem);

// Offsets in floats, each on a 256-byte boundary.
struct BackwardWorkspace {
  int64_t states, error, query_scale, partials, floats;
  BackwardWorkspace(const linattn_problem &problem, const Plan &plan);
};

template <typename T, int D> cudaError_t forward(const linattn_problem &problem, const linattn_forward_result &result, const Plan &plan);
template <typename T, int D> cudaError_t backward(const linattn_problem &problem, const linattn_backward_data &data, const Plan &plan);

}  // namespace linattn_mma
