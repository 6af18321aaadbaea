// How a problem is cut into chunks, and where the parts of its workspace lie.
#pragma once
#include <cuda_runtime.h>

#include "linattn.h"

namespace linattn_chunks {

struct Plan {
  int64_t chunk;              // tokens, a multiple of the rows that a block has
  int32_t chunks, row_tiles;  // of a head; row_tiles: blocks of rows
};

Plan make_plan(const linattn_problem &problem);

// Offsets in floats, each on a 256-byte boundary. Forward has the states alone.
struct Workspace {
  int64_t states, error, partials, forward_floats, backward_floats;
  Workspace(const linattn_problem &problem, const Plan &plan);
};

template <typename T, int D> cudaError_t forward(const linattn_problem &problem, const linattn_forward_result &result, const Plan &plan);
template <typename T, int D> cudaError_t backward(const linattn_problem &problem, const linattn_backward_data &data, const Plan &plan);

}  // namespace linattn_chunks
