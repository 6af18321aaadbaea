// architectures: sm_80
// Which problems the chunks take, and the instance that each head dim and dtype goes to.
#include <cuda_bf16.h>

#include <algorithm>

#include "card.h"
#include "chunks/cut.h"
#include "plan.h"

namespace linattn_chunks {
namespace {

int64_t rounded(int64_t floats) { return (floats + 63) / 64 * 64; }

constexpr int kRows = 128;  // of a block

bool all_aligned(const linattn_problem &problem, std::initializer_list<const linattn_tensor *> tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [&](const linattn_tensor *tensor) { return linattn::aligned(*tensor, problem.dtype == LINATTN_FLOAT32 ? 4 : 8); });
}

bool takes(const linattn_problem &problem) {
  const int d = problem.head_dim;
  const bool narrow = problem.dtype == LINATTN_FLOAT32 && (d == 32 || d == 64 || d == 80 || d == 96 || d == 128);
  const bool wide = problem.dtype == LINATTN_BFLOAT16 && (d == 192 || d == 256);
  const bool plain = problem.degree == 1 && !problem.log_decay && !problem.key_segments && !problem.dropout_p && problem.state_heads == problem.key_heads;
  const int64_t heads = static_cast<int64_t>(problem.batch) * problem.query_heads;
  return (narrow || wide) && d == problem.value_dim && plain && heads < 65536 && heads * ((problem.length + 63) / 64) < (int64_t{1} << 31) &&
         all_aligned(problem, {&problem.query, &problem.key, &problem.value});
}

// Where blocks walk along segments of each head: as few segments as fill the card evenly. Cutting costs a second reading of k and v, and of q and dO,
// three tenths of the time at (1, 32, 32768, 64) on an H200. A multiprocessor has two blocks up to head dim 64; a lone one is taken for six tenths of two.
Plan cut_for_walks(const linattn_problem &problem) {
  const int64_t heads = std::max<int64_t>(1, static_cast<int64_t>(problem.batch) * problem.key_heads), chunks = std::max<int64_t>(1, (problem.length + kRows - 1) / kRows);
  const int64_t processors = linattn::card(cudaDevAttrMultiProcessorCount, 108), slots = problem.head_dim <= 64 ? 2 * processors : processors;
  int64_t chunks_each = chunks;
  double least = 1e30;
  for (int64_t i = 1; i <= 9; ++i) {
    const int64_t segments = std::min(chunks, i <= 8 ? i : std::max<int64_t>(1, slots / heads)), each = (chunks + segments - 1) / segments,
                  blocks = heads * ((chunks + each - 1) / each), rest = blocks % slots;
    const double rounds = static_cast<double>(blocks / slots) + (rest == 0 ? 0 : slots > processors && rest <= processors ? 0.6 : 1);
    const double time = rounds * static_cast<double>(each) * (segments > 1 ? 1.3 : 1);
    if (time < 0.97 * least) least = time, chunks_each = each;
  }
  Plan plan{};
  plan.chunk = kRows, plan.segment_length = chunks_each * kRows;
  plan.segments = plan.row_tiles = static_cast<int32_t>((chunks + chunks_each - 1) / chunks_each);
  plan.states = plan.segments > 1 || !problem.causal || problem.initial_state;
  return plan;
}

// Longer chunks cost more pairs, shorter ones more states.
Plan cut(const linattn_problem &problem) {
  if (problem.dtype == LINATTN_FLOAT32 && (problem.head_dim <= 64 || problem.head_dim == 128)) return cut_for_walks(problem);
  Plan plan{};
  plan.chunk = plan.segment_length = problem.head_dim <= 64 ? 128 : problem.head_dim <= 128 ? 256 : 512;
  plan.segments = static_cast<int32_t>((problem.length + plan.chunk - 1) / plan.chunk), plan.row_tiles = static_cast<int32_t>((problem.length + kRows - 1) / kRows);
  plan.states = plan.segments > 1 || !problem.causal || problem.initial_state;
  return plan;
}

}  // namespace

Workspace::Workspace(const linattn_problem &problem, const Plan &plan) {
  const int64_t d = problem.head_dim, queries = static_cast<int64_t>(problem.batch) * problem.query_heads;
  states = 0;
  forward_floats = error = rounded(static_cast<int64_t>(problem.batch) * problem.key_heads * plan.segments * (d * d + 2 * d + 4));
  partials = error + rounded(queries * problem.length);
  backward_floats = partials + rounded(queries * plan.row_tiles * 2);
}

#define LINATTN_CHUNKS_BY_DIM(call)                                  \
  if (problem.dtype == LINATTN_BFLOAT16) switch (problem.head_dim) { \
      case 192: return call(__nv_bfloat16, 192);                     \
      case 256: return call(__nv_bfloat16, 256);                     \
      default: return cudaErrorInvalidValue;                         \
    }                                                                \
  switch (problem.head_dim) {                                        \
    case 32: return call(float, 32);                                 \
    case 64: return call(float, 64);                                 \
    case 80: return call(float, 80);                                 \
    case 96: return call(float, 96);                                 \
    case 128: return call(float, 128);                               \
    default: return cudaErrorInvalidValue;                           \
  }

}  // namespace linattn_chunks

namespace linattn {

using namespace linattn_chunks;

namespace {

int shared_bytes_of(const linattn_problem &problem) {
#define LINATTN_CALL(T, D) (shared_bytes<T, D>())
  LINATTN_CHUNKS_BY_DIM(LINATTN_CALL)
#undef LINATTN_CALL
}

}  // namespace

bool chunks_plan_forward(const linattn_problem &problem, const linattn_forward_result &result, linattn_plan &plan) {
  if (!takes(problem) || !all_aligned(problem, {&result.out})) return false;
  plan = cut(problem);
  plan.shared_bytes = shared_bytes_of(problem), plan.workspace_bytes = 4 * Workspace(problem, plan).forward_floats;
  return true;
}

bool chunks_plan_backward(const linattn_problem &problem, const linattn_backward_data &data, linattn_plan &plan) {
  if (!takes(problem) || !all_aligned(problem, {&data.out, &data.grad_out, &data.grad_query, &data.grad_key, &data.grad_value})) return false;
  plan = cut(problem);
  plan.shared_bytes = shared_bytes_of(problem), plan.workspace_bytes = 4 * Workspace(problem, plan).backward_floats;
  return true;
}

cudaError_t chunks_forward(const linattn_problem &problem, const linattn_forward_result &result, const linattn_plan &plan) {
#define LINATTN_CALL(T, D) (forward<T, D>(problem, result, plan))
  LINATTN_CHUNKS_BY_DIM(LINATTN_CALL)
#undef LINATTN_CALL
}

cudaError_t chunks_backward(const linattn_problem &problem, const linattn_backward_data &data, const linattn_plan &plan) {
#define LINATTN_CALL(T, D) (backward<T, D>(problem, data, plan))
  LINATTN_CHUNKS_BY_DIM(LINATTN_CALL)
#undef LINATTN_CALL
}

}  // namespace linattn
