// architectures: sm_80
// Which problems the tensor-core path takes, how it cuts them up, and the instance that each head dim and dtype goes to.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "card.h"
#include "stream/cut.h"
#include "plan.h"

namespace linattn_stream {
namespace {

int64_t rounded(int64_t floats) { return (floats + 63) / 64 * 64; }

int64_t state_floats(const linattn_problem &problem) { return static_cast<int64_t>(problem.head_dim) * problem.head_dim + 2 * problem.head_dim + 4; }

int64_t states_of(const linattn_problem &problem) { return static_cast<int64_t>(problem.batch) * problem.state_heads; }

// Of the states ahead of all segments, where they are small beside the tensors that backward needs anyway: of a segment they take 4 D^2 bytes, and
// its queries, keys, values and outputs 8 D a token.
int64_t kept_bytes(const linattn_problem &problem, const Plan &plan) {
  const bool small = plan.segment_length >= 4 * problem.head_dim;
  return plan.states && small ? 4 * states_of(problem) * plan.segments * state_floats(problem) : 0;
}

int chunk_of(int head_dim) { return head_dim == 32 || head_dim == 128 ? 64 : head_dim; }

bool takes(const linattn_problem &problem) {
  const int d = problem.head_dim;
  const bool dtype = problem.dtype == LINATTN_BFLOAT16 || (problem.dtype == LINATTN_FLOAT16 && problem.normalize_qk);  // unit vectors fit float16's range
  return problem.degree == 1 && dtype && d == problem.value_dim && (d == 32 || d == 64 || d == 80 || d == 96 || d == 128) && problem.length > 0 && problem.batch > 0 &&
         problem.key_heads > 0 && problem.query_heads / problem.key_heads <= 32 && static_cast<int64_t>(problem.batch) * problem.state_heads < 65536 &&
         linattn::aligned(problem.query) && linattn::aligned(problem.key) && linattn::aligned(problem.value);
}

// How many blocks of rows are at work on a multiprocessor at once.
int row_blocks(int head_dim) { return head_dim == 32 ? 4 : head_dim == 64 ? 2 : 1; }

struct Pieces {
  int64_t count, chunks;  // chunks of each, the last may have fewer
};

// As many pieces as wanted, of the same chunks each and four at least.
Pieces cut_evenly(int64_t chunks, int64_t wanted) {
  const int64_t count = std::max<int64_t>(1, std::min(wanted, chunks / 4)), each = (chunks + count - 1) / count;
  return {(chunks + each - 1) / each, each};
}

Plan cut(const linattn_problem &problem) {
  const int d = problem.head_dim, chunk = chunk_of(d);
  const int64_t heads = states_of(problem), chunks = (problem.length + chunk - 1) / chunk, processors = linattn::card(cudaDevAttrMultiProcessorCount, 108);
  const int64_t slots = processors * row_blocks(d);
  // Cutting costs a second reading of k and v: worth it only where heads alone leave much of the card idle.
  const Pieces tiles = cut_evenly(chunks, heads * 10 >= slots * 6 ? 1 : slots / heads);
  Plan plan{};
  plan.states = tiles.count > 1 || !problem.causal;
  plan.gated = problem.log_decay || problem.key_segments || problem.dropout_p;
  // Segments of a tile: where sums of whole ones would not keep up with memory.
  const bool parted = plan.states && (plan.gated || d > 64);
  const Pieces parts = cut_evenly(tiles.chunks, parted ? processors * segment_blocks(d) / (heads * tiles.count) : 1);
  plan.chunk = chunk, plan.row_tiles = static_cast<int32_t>(tiles.count), plan.segments = static_cast<int32_t>(tiles.count * parts.count);
  plan.segment_length = parts.chunks * chunk;
  return plan;
}

}  // namespace

bool rows_are_wide(const linattn_problem &problem, const Plan &plan) {
  const int64_t heads = states_of(problem), processors = linattn::card(cudaDevAttrMultiProcessorCount, 108);
  const bool fits = problem.dtype == LINATTN_BFLOAT16 && problem.head_dim == 64 && linattn::shared_memory() >= 227 << 10;
  return fits && plan.states && problem.causal && problem.query_heads == problem.state_heads && heads <= processors && 3 * heads > 2 * processors;
}

ForwardWorkspace::ForwardWorkspace(const linattn_problem &problem, const Plan &plan) {
  const int64_t segments = plan.states ? states_of(problem) * plan.segments : 0;
  states = 0;
  keeps = states + rounded(segments * state_floats(problem));
  decay = keeps + (plan.gated ? rounded(segments) : 0);
  floats = decay + (problem.log_decay && problem.log_decay_per_token ? rounded(states_of(problem) * problem.length) : 0);
}

BackwardWorkspace::BackwardWorkspace(const linattn_problem &problem, const Plan &plan) : ForwardWorkspace(problem, plan) {
  const int64_t heads = states_of(problem), rows = static_cast<int64_t>(problem.batch) * problem.query_heads * problem.length;
  const auto take = [&](int64_t count) {
    const int64_t at = floats;
    floats += rounded(count);
    return at;
  };
  error = take(rows);
  query_scale = take(rows);
  partials = take(static_cast<int64_t>(problem.batch) * problem.query_heads * plan.row_tiles * 2);
  const bool decays = problem.log_decay, shares = problem.state_heads != problem.key_heads;
  row_sums = take(decays ? rows : 0);
  column_sums = take(decays ? heads * problem.length : 0);
  final_state = take(decays ? heads * state_floats(problem) : 0);
  ends = take(decays ? heads : 0);
  parts = take(decays ? 2 * heads : 0);
  const int64_t values = heads * problem.length * problem.head_dim / 2;  // of two bytes
  key_parts = take(shares ? values : 0);
  value_parts = take(shares ? values : 0);
}

#define LINATTN_STREAM_BY_DIM(T, call)                                            \
  switch (problem.head_dim) {                                                     \
    case 32: return call(T, 32);                                                  \
    case 64: return call(T, 64);                                                  \
    case 80: return call(T, 80);                                                  \
    case 96: return call(T, 96);                                                  \
    case 128: return call(T, 128);                                                \
    default: return cudaErrorInvalidValue; /* never reached: `takes` has asked */ \
  }

}  // namespace linattn_stream

namespace linattn {

using namespace linattn_stream;

namespace {

int forward_shared_bytes(const linattn_problem &problem, const linattn_plan &plan) {
#define LINATTN_CALL(T, D) (forward_shared<T, D>(problem, plan))
  LINATTN_STREAM_BY_DIM(__nv_bfloat16, LINATTN_CALL)
#undef LINATTN_CALL
}

int backward_shared_bytes(const linattn_problem &problem, const linattn_plan &plan) {
#define LINATTN_CALL(T, D) (backward_shared<T, D>(plan))
  LINATTN_STREAM_BY_DIM(__nv_bfloat16, LINATTN_CALL)
#undef LINATTN_CALL
}

}  // namespace

bool stream_plan_forward(const linattn_problem &problem, const linattn_forward_result &result, linattn_plan &plan) {
  if (!takes(problem) || !aligned(result.out)) return false;
  plan = cut(problem);
  plan.shared_bytes = forward_shared_bytes(problem, plan), plan.workspace_bytes = 4 * ForwardWorkspace(problem, plan).floats;
  plan.kept_bytes = kept_bytes(problem, plan);
  return true;
}

bool stream_plan_backward(const linattn_problem &problem, const linattn_backward_data &data, linattn_plan &plan) {
  if (!takes(problem)) return false;
  for (const linattn_tensor *tensor : {&data.out, &data.grad_out, &data.grad_query, &data.grad_key, &data.grad_value})
    if (!aligned(*tensor)) return false;
  plan = cut(problem);
  plan.shared_bytes = backward_shared_bytes(problem, plan), plan.workspace_bytes = 4 * BackwardWorkspace(problem, plan).floats;
  if (data.segment_states && data.kept_segment_length == plan.segment_length) plan.kept_bytes = kept_bytes(problem, plan);
  return true;
}

cudaError_t stream_forward(const linattn_problem &problem, const linattn_forward_result &result, const linattn_plan &plan) {
#define LINATTN_CALL(T, D) (forward<T, D>(problem, result, plan))
  if (problem.dtype == LINATTN_FLOAT16) LINATTN_STREAM_BY_DIM(__half, LINATTN_CALL)
  LINATTN_STREAM_BY_DIM(__nv_bfloat16, LINATTN_CALL)
#undef LINATTN_CALL
}

cudaError_t stream_backward(const linattn_problem &problem, const linattn_backward_data &data, const linattn_plan &plan) {
#define LINATTN_CALL(T, D) (backward<T, D>(problem, data, plan))
  if (problem.dtype == LINATTN_FLOAT16) LINATTN_STREAM_BY_DIM(__half, LINATTN_CALL)
  LINATTN_STREAM_BY_DIM(__nv_bfloat16, LINATTN_CALL)
#undef LINATTN_CALL
}

}  // namespace linattn
