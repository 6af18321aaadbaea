// The second degree's gradients, every pair of tokens formed twice: once by queries and once by keys. By mma.sync, or on Hopper by warpgroups.
#include <algorithm>

#include "pairs/backward_columns.cuh"
#include "pairs/backward_rows.cuh"
#include "plan.h"
#include "tile/gates.cuh"

namespace linattn_pairs {
namespace {

constexpr int kThreads = kGradientThreads;

// Of 16 bytes of each.
template <typename T> __device__ __forceinline__ float product_of_eight(const T *x, const T *y) {
  using E = Element<T>;
  const uint4 a = *reinterpret_cast<const uint4 *>(x), b = *reinterpret_cast<const uint4 *>(y);
  const auto two = [](uint32_t a, uint32_t b) { return E::low(a) * E::low(b) + E::high(a) * E::high(b); };
  return two(a.x, b.x) + two(a.y, b.y) + (two(a.z, b.z) + two(a.w, b.w));
}

// Four threads a token: 1 / |k|, or the numbers of a query; nothing of padding and behind the last token.
template <typename T, bool KEYS> __global__ void __launch_bounds__(kThreads) numbers_kernel(const __grid_constant__ Gradients args) {
  const linattn_problem &p = args.problem;
  const int64_t number = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 4, head = number / args.padded, token = number % args.padded;
  const int heads = KEYS ? p.key_heads : p.query_heads, part = threadIdx.x % 4;
  const int32_t *const runs = KEYS ? p.key_segments : p.query_segments;
  const bool real = token < p.length && (!runs || runs[head / heads * (KEYS ? p.key_segments_stride : p.query_segments_stride) + token] > 0);
  float square = 0.f, dot = 0.f;
  if (real) {
    const linattn_tensor &x = KEYS ? p.key : p.query;
    const T *const row = head_of<const T>(x, head / heads, head % heads) + token * x.token_stride;
    const T *const out = KEYS ? nullptr : head_of<const T>(args.out, head / heads, head % heads) + token * args.out.token_stride;
    const T *const grad = KEYS ? nullptr : head_of<const T>(args.grad_out, head / heads, head % heads) + token * args.grad_out.token_stride;
    for (int i = 8 * part; i < p.head_dim; i += 32) square += product_of_eight(row + i, row + i);
    for (int i = 8 * part; !KEYS && i < p.value_dim; i += 32) dot += product_of_eight(out + i, grad + i);
  }
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    square += __shfl_xor_sync(0xffffffffu, square, step);
    dot += __shfl_xor_sync(0xffffffffu, dot, step);
  }
  if (part != 0) return;
  const float scale = !real ? 0.f : p.normalize_qk ? inverse_norm(square) : 1.f;
  if constexpr (KEYS) {
    args.key_scale[number] = scale;
  } else {
    const float mass = real ? args.mass[head * p.length + token] : 0.f, inverse = mass == 0.f ? 0.f : 1.f / mass;
    float *const numbers = args.query_numbers + head * kNumbers * args.padded + token;
    numbers[0] = inverse;
    numbers[args.padded] = real ? (args.grad_mass ? args.grad_mass[head * p.length + token] : 0.f) - dot * inverse : 0.f;
    numbers[2 * args.padded] = scale;
  }
}

// One block a head; sums in an order that never changes.
__global__ void __launch_bounds__(32) coefficients_kernel(const __grid_constant__ Gradients args) {
  const linattn_problem &p = args.problem;
  const int head = blockIdx.x;
  double sums[3] = {0.0, 0.0, 0.0};
  for (int64_t part = threadIdx.x; part < static_cast<int64_t>(p.batch) * args.parts; part += 32) {
    const float *const x = args.partials + ((part / args.parts * p.query_heads + head) * args.parts + part % args.parts) * 3;
    for (int i = 0; i < 3; ++i) sums[i] += x[i];
  }
  for (int i = 0; i < 3; ++i)
    for (int step = 16; step > 0; step /= 2) sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], step);
  if (threadIdx.x != 0) return;
  const double b = p.coefficients[p.query_heads + head], c = p.coefficients[2 * p.query_heads + head], temperature = p.coefficients[3 * p.query_heads + head];
  args.grad_coefficients[head] = static_cast<float>(sums[0]);
  args.grad_coefficients[p.query_heads + head] = static_cast<float>(temperature * sums[1]);
  args.grad_coefficients[2 * p.query_heads + head] = static_cast<float>(temperature * temperature * sums[2]);
  args.grad_coefficients[3 * p.query_heads + head] = static_cast<float>(b * sums[1] + 2.0 * c * temperature * sums[2]);
}

int64_t padded_length(const linattn_problem &problem) { return (problem.length + kRows - 1) / kRows * kRows; }

void launch_numbers(const Gradients &args, cudaStream_t stream) {
  using T = __nv_bfloat16;
  const linattn_problem &p = args.problem;
  const int64_t queries = static_cast<int64_t>(p.batch) * p.query_heads * args.padded, keys = static_cast<int64_t>(p.batch) * p.key_heads * args.padded;
  numbers_kernel<T, true><<<static_cast<unsigned>(keys * 4 / kThreads), kThreads, 0, stream>>>(args);
  numbers_kernel<T, false><<<static_cast<unsigned>(queries * 4 / kThreads), kThreads, 0, stream>>>(args);
}

template <int D> cudaError_t launch_plain(const Gradients &args, cudaStream_t stream) {
  if (const cudaError_t failed = launch_rows<D, D, false>(args, stream)) return failed;
  return launch_columns<D, D, false>(args, stream);
}

cudaError_t launch_pairs(const Gradients &args, bool gated, bool warpgroups, cudaStream_t stream) {
  if (warpgroups) return group_gradients_launch(args, gated, stream);
  if (gated) return gated_backward_launch(args, stream);
  switch (args.problem.head_dim) {
    case 32: return launch_plain<32>(args, stream);
    case 64: return launch_plain<64>(args, stream);
    case 80: return launch_plain<80>(args, stream);
    case 96: return launch_plain<96>(args, stream);
    case 128: return launch_plain<128>(args, stream);
    default: return cudaErrorInvalidValue;
  }
}

int shared_bytes(int dim) {
  switch (dim) {
    case 32: return gradient_shared_bytes<32, 32, false>();
    case 64: return gradient_shared_bytes<64, 64, false>();
    case 80: return gradient_shared_bytes<80, 80, false>();
    case 96: return gradient_shared_bytes<96, 96, false>();
    default: return gradient_shared_bytes<128, 128, false>();
  }
}

int64_t round_up(int64_t bytes) { return (bytes + 255) / 256 * 256; }

}  // namespace
}  // namespace linattn_pairs

namespace linattn {

using namespace linattn_pairs;

namespace {

// Where the parts of the workspace lie, in bytes.
struct Workspace {
  int64_t query_numbers, partials, decay, row_sums, column_sums, parts, state, bytes;
  Workspace(const linattn_problem &problem, bool by_state, bool running) {
    const int64_t padded = padded_length(problem), batch = problem.batch, queries = batch * problem.query_heads * padded, states = batch * problem.state_heads;
    const int64_t sums = problem.log_decay ? 4 * problem.length : 0;
    query_numbers = round_up(4 * batch * problem.key_heads * padded);
    partials = query_numbers + round_up(4 * kNumbers * queries);
    decay = partials + round_up(12 * (queries / kFewestRows + (by_state ? batch * problem.query_heads * StateMemory(problem, true).tiles : 0)));
    row_sums = decay + decay_bytes(problem);
    column_sums = row_sums + round_up(batch * problem.query_heads * sums);
    parts = column_sums + round_up(states * sums);
    state = parts + (sums ? round_up(8 * states) : 0);
    bytes = state + (by_state ? StateMemory(problem, true).bytes : running ? RunningMemory(problem, true).bytes : 0);
  }
};

}  // namespace

// Not in float16, whose factors would have to be kept in range: P / g is about 1 / N. Nor a gradient of the state.
bool pairs_plan_backward(const linattn_problem &problem, const linattn_backward_data &data, linattn_plan &plan) {
  const bool whole_rows = aligned(data.out) && aligned(data.grad_out) && aligned(data.grad_query) && aligned(data.grad_key) && aligned(data.grad_value);
  const TileDims tiles = tiles_of(problem);
  if (problem.dtype != LINATTN_BFLOAT16 || !tiles.key || data.grad_state || !whole_rows) return false;
  const bool running = running_takes(problem, true), by_state = !running && states_take(problem, true);
  plan.states = running || by_state;
  if (!plan.states && !pairs_cost_less(problem)) return false;
  plan.gated = needs_gated(problem), plan.warpgroups = group_gradients_take(problem);
  const GroupPlan groups = plan.warpgroups ? group_gradients_plan(tiles, plan.gated) : GroupPlan{0, kRows};
  plan.row_tiles = static_cast<int32_t>(padded_length(problem) / groups.tokens);
  plan.chunk = plan.segment_length = problem.length, plan.segments = 1;
  plan.shared_bytes = plan.warpgroups ? groups.shared_bytes : plan.gated ? gated_backward_shared_bytes(tiles) : shared_bytes(problem.head_dim);
  if (running) plan.chunk = kRunTokens, plan.shared_bytes = RunningMemory(problem, true).shared_bytes;
  if (by_state) {
    const StateMemory memory(problem, true);
    plan.chunk = plan.segment_length = memory.chunk, plan.segments = memory.chunks, plan.shared_bytes = std::max(plan.shared_bytes, memory.shared_bytes);
  }
  plan.workspace_bytes = Workspace(problem, by_state, running).bytes;
  return true;
}

cudaError_t pairs_backward(const linattn_problem &problem, const linattn_backward_data &data, const linattn_plan &plan) {
  Gradients args{problem, data.out, data.grad_out, data.grad_query, data.grad_key, data.grad_value, data.mass, data.grad_mass, data.grad_coefficients};
  const bool running = plan.states && plan.chunk == kRunTokens, by_state = plan.states && !running;
  const Workspace at(problem, by_state, running);
  char *const workspace = static_cast<char *>(problem.workspace);
  const auto numbers = [&](int64_t offset) { return reinterpret_cast<float *>(workspace + offset); };
  args.padded = padded_length(problem), args.chunk = plan.chunk, args.row_tiles = args.parts = plan.row_tiles;
  if (running) args.parts = RunningMemory(problem, true).segments;
  if (by_state) args.parts += StateMemory(problem, true).tiles;
  args.key_scale = numbers(0), args.query_numbers = numbers(at.query_numbers), args.partials = numbers(at.partials);
  const bool slopes = problem.log_decay && data.grad_log_decay;  // whether the decay wants a gradient
  if (slopes) args.row_sums = numbers(at.row_sums), args.column_sums = numbers(at.column_sums);
  const cudaStream_t stream = static_cast<cudaStream_t>(problem.stream);
  if (running && problem.log_decay && !problem.log_decay_per_token) {
    args.gates.rate = problem.log_decay;
  } else if (problem.log_decay) {
    args.gates.decay = reinterpret_cast<double *>(workspace + at.decay);
    if (const cudaError_t failed = launch_running_decay(problem, args.gates.decay)) return failed;
  }
  if (!running) launch_numbers(args, stream);  // in one pass rows make them
  if (by_state)
    if (const cudaError_t failed = launch_state_gradients(args, workspace + at.state, stream)) return failed;
  if (const cudaError_t failed = running ? running_gradients_launch(args, workspace + at.state, stream) : launch_pairs(args, plan.gated, plan.warpgroups, stream)) return failed;
  if (slopes && by_state)
    if (const cudaError_t failed = launch_flow_correction(args, workspace + at.state, stream)) return failed;
  if (slopes) {
    const DecaySums sums{args.row_sums, args.column_sums, nullptr, nullptr, nullptr, reinterpret_cast<double *>(workspace + at.parts)};
    if (const cudaError_t failed = launch_decay_gradient(problem, sums, data.grad_log_decay)) return failed;
  }
  coefficients_kernel<<<static_cast<unsigned>(problem.query_heads), 32, 0, stream>>>(args);
  return cudaPeekAtLastError();
}

}  // namespace linattn
