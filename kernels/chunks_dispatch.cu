// architectures: sm_80
// Which problems the chunks take, and the instance that each head dim and dtype goes to.
#include <cuda_bf16.h>

#include <algorithm>

#include "card.h"
#include "chunks_plan.h"
#include "paths.h"

namespace linattn_chunks {
namespace {

int64_t rounded(int64_t floats) { return (floats + 63) / 64 * 64; }

constexpr int kRows = 128, kColumns = 64;  // of a block, and of a tile that it walks over

bool all_aligned(const linattn_problem &problem, std::initializer_list<const linattn_tensor *> tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [&](const linattn_tensor *tensor) { return linattn::aligned(*tensor, problem.dtype == LINATTN_FLOAT32 ? 4 : 8); });
}

// The rows, two tensors' tiles of columns and as much again for those on their way; what RowShape adds up.
bool fits_shared_memory(const linattn_problem &problem) {
  return (kRows + 4 * kColumns) * problem.head_dim * (problem.dtype == LINATTN_FLOAT32 ? 4 : 2) + 4096 <= linattn::shared_memory();
}

}  // namespace

// Longer chunks cost more pairs, shorter ones more states.
Plan make_plan(const linattn_problem &problem) {
  const int64_t chunk = problem.head_dim <= 64 ? 128 : problem.head_dim <= 128 ? 256 : 512;
  return {chunk, static_cast<int32_t>((problem.length + chunk - 1) / chunk), static_cast<int32_t>((problem.length + kRows - 1) / kRows)};
}

Workspace::Workspace(const linattn_problem &problem, const Plan &plan) {
  const int64_t d = problem.head_dim, queries = static_cast<int64_t>(problem.batch) * problem.query_heads;
  states = 0;
  forward_floats = error = rounded(static_cast<int64_t>(problem.batch) * problem.key_heads * plan.chunks * (d * d + 2 * d + 4));
  partials = error + rounded(queries * problem.length);
  backward_floats = partials + rounded(queries * plan.row_tiles * 2);
}

#define LINATTN_CHUNKS_BY_DIM(call)                                                   \
  if (problem.dtype == LINATTN_BFLOAT16) switch (problem.head_dim) {                  \
      case 192: return call(__nv_bfloat16, 192);                                      \
      case 256: return call(__nv_bfloat16, 256);                                      \
      default: return cudaErrorInvalidValue;                                          \
    }                                                                                 \
  switch (problem.head_dim) {                                                         \
    case 32: return call(float, 32);                                                  \
    case 64: return call(float, 64);                                                  \
    case 80: return call(float, 80);                                                  \
    case 96: return call(float, 96);                                                  \
    case 128: return call(float, 128);                                                \
    default: return cudaErrorInvalidValue;                                            \
  }

}  // namespace linattn_chunks

namespace linattn {

using namespace linattn_chunks;

bool chunks_take(const linattn_problem &problem) {
  const int d = problem.head_dim;
  const bool narrow = problem.dtype == LINATTN_FLOAT32 && (d == 32 || d == 64 || d == 80 || d == 96 || d == 128);
  const bool wide = problem.dtype == LINATTN_BFLOAT16 && (d == 192 || d == 256);
  const bool plain = problem.degree == 1 && !problem.log_decay && !problem.key_segments && !problem.dropout_p && problem.state_heads == problem.key_heads;
  const int64_t heads = static_cast<int64_t>(problem.batch) * problem.query_heads;
  return (narrow || wide) && d == problem.value_dim && plain && heads < 65536 && heads * ((problem.length + 63) / 64) < (int64_t{1} << 31) && all_aligned(problem, {&problem.query, &problem.key, &problem.value}) &&
         fits_shared_memory(problem);
}

int64_t chunks_forward_workspace(const linattn_problem &problem) { return 4 * Workspace(problem, make_plan(problem)).forward_floats; }
int64_t chunks_backward_workspace(const linattn_problem &problem) { return 4 * Workspace(problem, make_plan(problem)).backward_floats; }

cudaError_t chunks_forward(const linattn_problem &problem, const linattn_forward_result &result) {
  if (!all_aligned(problem, {&result.out})) return cudaErrorMisalignedAddress;
  const Plan plan = make_plan(problem);
#define LINATTN_CALL(T, D) (forward<T, D>(problem, result, plan))
  LINATTN_CHUNKS_BY_DIM(LINATTN_CALL)
#undef LINATTN_CALL
}

cudaError_t chunks_backward(const linattn_problem &problem, const linattn_backward_data &data) {
  if (!all_aligned(problem, {&data.out, &data.grad_out, &data.grad_query, &data.grad_key, &data.grad_value})) return cudaErrorMisalignedAddress;
  const Plan plan = make_plan(problem);
#define LINATTN_CALL(T, D) (backward<T, D>(problem, data, plan))
  LINATTN_CHUNKS_BY_DIM(LINATTN_CALL)
#undef LINATTN_CALL
}

}  // namespace linattn
