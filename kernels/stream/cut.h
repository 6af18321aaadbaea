// How a problem is cut into blocks, and where the parts of its workspace lie.
#pragma once
#include <cuda_runtime.h>

#include "linattn.h"

namespace linattn_stream {

// A head's sequence is cut into `row_tiles` tiles, which are a block's rows or columns each, and where states are made ahead every tile into segments, which
// are a block's sum each.
using Plan = linattn_plan;

// How many blocks that sum a segment are at work on a multiprocessor at once.
constexpr int segment_blocks(int head_dim) { return head_dim == 32 ? 8 : head_dim == 64 ? 4 : 2; }

inline int segments_each(const Plan &plan) { return plan.segments / plan.row_tiles; }
inline int64_t tile_length(const linattn_problem &problem, const Plan &plan) {
  const int64_t chunks = (problem.length + plan.chunk - 1) / plan.chunk;
  return (chunks + plan.row_tiles - 1) / plan.row_tiles * plan.chunk;
}

// Whether a block works on the rows of a whole head, several chunks at once: where heads are about as many as multiprocessors, and so many are faster
// than tiles of them whose states a kernel sums before.
bool rows_are_wide(const linattn_problem &problem, const Plan &plan);

// Offsets in floats, each on a 256-byte boundary.
struct ForwardWorkspace {
  int64_t states, keeps, decay, floats;
  ForwardWorkspace(const linattn_problem &problem, const Plan &plan);
};
struct BackwardWorkspace : ForwardWorkspace {
  int64_t error, query_scale, partials;
  int64_t row_sums, column_sums, final_state, ends, parts;  // with a decay
  int64_t key_parts, value_parts;                           // where several states share a key head
  BackwardWorkspace(const linattn_problem &problem, const Plan &plan);
};

template <typename T, int D> cudaError_t forward(const linattn_problem &problem, const linattn_forward_result &result, const Plan &plan);
template <typename T, int D> cudaError_t backward(const linattn_problem &problem, const linattn_backward_data &data, const Plan &plan);

// Shared memory of the block that takes most, as its struct says.
template <typename T, int D> int forward_shared(const linattn_problem &problem, const Plan &plan);
template <typename T, int D> int backward_shared(const Plan &plan);

}  // namespace linattn_stream
