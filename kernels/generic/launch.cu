// architectures: sm_80 compute_80 sm_90
// The generic path from the host's side: how a problem is cut, what memory it needs, which steps run.
#include <algorithm>

#include "card.h"
#include "generic/job.cuh"
#include "plan.h"

namespace linattn {
namespace {

int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

// Tokens in a chunk. Longer ones cost more pairs, shorter ones more states: these keep all states together at about one tensor's size.
int64_t chunk_length(const linattn_problem &p, bool direct_only) {
  const int64_t length = round_up(p.length, TILE);
  if (direct_only) return length;
  const int64_t dim = p.head_dim > p.value_dim ? p.head_dim : p.value_dim;
  int64_t chunk = p.degree == 1 ? 2 * dim : dim * p.head_dim / 4;
  if (p.degree == 2 && chunk < 512) chunk = 512;
  if (!p.causal && chunk < 512) chunk = 512;  // no pairs are formed there: only the number of blocks counts
  chunk = round_up(chunk, TILE);
  return chunk < length ? chunk : length;
}

// Whether rows may be read 16 bytes at a time.
bool by_sixteen_bytes(const linattn_tensor &rows, int dim) { return dim % 8 == 0 && aligned(rows); }

// Hands out the workspace; with no memory behind it, only counts.
class Arena {
 public:
  explicit Arena(void *base) : base_(static_cast<char *>(base)) {}
  template <class T>
  T *take(int64_t count) {
    T *result = reinterpret_cast<T *>(base_ + used_);
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 256);
    return result;
  }
  int64_t used() const { return used_; }

 private:
  char *base_;
  int64_t used_ = 0;
};

// The whole of a call's cutting: the plan tells of it, and the launcher, which has the workspace, does it again.
Job cut(const linattn_problem &p, bool backward, Arena &arena) {
  Job job = {};
  job.p = p;
  job.group = p.query_heads / p.key_heads;
  job.state_group = p.query_heads / p.state_heads;
  job.features = p.head_dim + 1 + (p.degree == 2 ? p.head_dim * (p.head_dim + 1) / 2 : 0);
  job.vector = by_sixteen_bytes(p.query, p.head_dim) && by_sixteen_bytes(p.key, p.head_dim) && by_sixteen_bytes(p.value, p.value_dim);
  // forming all pairs beats the second-degree state up to about D^2 tokens
  const bool direct_only = p.degree == 2 && p.length <= (p.head_dim < 32 ? 1024 : static_cast<int64_t>(p.head_dim) * p.head_dim);
  job.direct = p.causal || direct_only;
  job.chunk = chunk_length(p, direct_only);
  job.tiles = (p.length + TILE - 1) / TILE;
  job.chunks = (p.length + job.chunk - 1) / job.chunk;
  job.has_state = p.initial_state != nullptr || !job.direct || job.chunks > 1;
  job.has_reverse = !job.direct || job.chunks > 1;

  const int64_t queries = static_cast<int64_t>(p.batch) * p.query_heads * p.length;
  const int64_t state_heads = static_cast<int64_t>(p.batch) * p.state_heads;
  const int64_t state = state_heads * job.features * (p.value_dim + 1);
  if (p.normalize_qk) {
    job.inverse_query = arena.take<float>(queries);
    job.inverse_key = arena.take<float>(static_cast<int64_t>(p.batch) * p.key_heads * p.length);
  }
  if (p.log_decay != nullptr) {
    job.decay = arena.take<float>(state_heads * p.length);
    job.decay_tiles = arena.take<double>(state_heads * (job.tiles + 1));
  }
  job.states = arena.take<float>(state * job.chunks);
  if (backward) {
    job.inverse_mass = arena.take<float>(queries);
    job.row_term = arena.take<float>(queries);
    const int rows = rows_of(p.head_dim > p.value_dim ? p.head_dim : p.value_dim);
    job.row_tiles = (p.length + rows - 1) / rows;
    job.coefficient_parts = arena.take<float>(static_cast<int64_t>(p.batch) * p.query_heads * job.row_tiles * 3);
    if (p.log_decay != nullptr) {
      job.row_sums = arena.take<float>(queries);
      job.column_sums = arena.take<float>(state_heads * p.length);
      job.decay_parts = arena.take<double>(state_heads);
      job.final_state = arena.take<float>(state);
    }
  }
  return job;
}

#define LINATTN_TRY(call)                     \
  do {                                        \
    const cudaError_t error_ = (call);        \
    if (error_ != cudaSuccess) return error_; \
  } while (0)

cudaError_t prepare(const Job &job, cudaStream_t stream) {
  if (job.inverse_query != nullptr) {
    LINATTN_TRY(launch_inverse_norms(job, false, stream));
    LINATTN_TRY(launch_inverse_norms(job, true, stream));
  }
  if (job.decay != nullptr) LINATTN_TRY(launch_decay_sums(job, stream));
  return cudaSuccess;
}

cudaError_t run_states(const Job &job, bool reverse, cudaStream_t stream) {
  LINATTN_TRY(launch_states(job, reverse, stream));
  return launch_scan(job, reverse, stream);
}

}  // namespace

namespace {

void fill(const linattn_problem &problem, bool backward, linattn_plan &plan) {
  Arena arena(nullptr);
  const Job job = cut(problem, backward, arena);
  plan.workspace_bytes = arena.used(), plan.chunk = plan.segment_length = job.chunk, plan.segments = static_cast<int32_t>(job.chunks);
  plan.row_tiles = static_cast<int32_t>(job.tiles), plan.states = job.has_state, plan.gated = problem.log_decay || problem.key_segments || problem.dropout_p;
  plan.shared_bytes = std::max({apply_shared_bytes(problem), states_shared_bytes(problem), backward ? slope_shared_bytes(problem) : 0});
}

}  // namespace

bool generic_plan_forward(const linattn_problem &problem, const linattn_forward_result &, linattn_plan &plan) { return fill(problem, false, plan), true; }
bool generic_plan_backward(const linattn_problem &problem, const linattn_backward_data &, linattn_plan &plan) { return fill(problem, true, plan), true; }

cudaError_t generic_forward(const linattn_problem &problem, const linattn_forward_result &result, const linattn_plan &) {
  const cudaStream_t stream = static_cast<cudaStream_t>(problem.stream);
  Arena arena(problem.workspace);
  Job job = cut(problem, false, arena);
  job.out = result.out;
  job.mass_out = result.mass;
  job.final_state = result.state;
  LINATTN_TRY(prepare(job, stream));
  if (job.has_state || job.final_state != nullptr) LINATTN_TRY(run_states(job, false, stream));
  return launch_apply(job, false, stream);
}

cudaError_t generic_backward(const linattn_problem &problem, const linattn_backward_data &data, const linattn_plan &) {
  const cudaStream_t stream = static_cast<cudaStream_t>(problem.stream);
  Arena arena(problem.workspace);
  Job job = cut(problem, true, arena);
  job.out = data.out;
  job.grad_out = data.grad_out;
  job.vector = job.vector && by_sixteen_bytes(data.grad_out, problem.value_dim);
  job.vector_out = job.vector && by_sixteen_bytes(data.out, problem.value_dim);
  job.grad_query = data.grad_query;
  job.grad_key = data.grad_key;
  job.grad_value = data.grad_value;
  job.mass = data.mass;
  job.grad_mass = data.grad_mass;
  job.grad_state = data.grad_state;
  job.grad_coefficients = data.grad_coefficients;
  job.grad_log_decay = data.grad_log_decay;
  job.grad_initial_state = data.grad_initial_state;
  job.has_reverse = job.has_reverse || job.grad_state != nullptr;
  if (job.grad_log_decay == nullptr) job.row_sums = job.column_sums = nullptr;
  const bool wants_final = job.grad_log_decay != nullptr && job.grad_state != nullptr;
  if (!wants_final) job.final_state = nullptr;

  LINATTN_TRY(prepare(job, stream));
  LINATTN_TRY(launch_row_terms(job, stream));
  if (job.has_state || wants_final) LINATTN_TRY(run_states(job, false, stream));
  LINATTN_TRY(launch_slope(job, false, stream));
  if (job.has_reverse || job.grad_initial_state != nullptr) LINATTN_TRY(run_states(job, true, stream));
  LINATTN_TRY(launch_slope(job, true, stream));
  LINATTN_TRY(launch_apply(job, true, stream));
  if (job.grad_coefficients != nullptr) LINATTN_TRY(launch_coefficient_gradients(job, stream));
  if (job.grad_log_decay != nullptr) LINATTN_TRY(launch_decay_gradients(job, stream));
  return cudaSuccess;
}

}  // namespace linattn
