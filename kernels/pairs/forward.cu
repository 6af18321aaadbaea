// Which problems take the form of pairs, and the steps around its kernels.
#include <algorithm>

#include "pairs/forward.cuh"
#include "plan.h"
#include "tile/gates.cuh"

namespace linattn_pairs {
namespace {

constexpr int kThreads = kForwardThreads;
constexpr int kShortest = 32;               // tokens: below, a launch costs more than its work
constexpr int64_t kCachedBytes = 16 << 20;  // keys and values that neighbouring blocks share through the cache

template <typename T> __global__ void key_scale_kernel(const __grid_constant__ Arguments args, float *result) {
  const int64_t number = static_cast<int64_t>(blockIdx.x) * (kThreads / 4) + threadIdx.x / 4;
  const float scale = key_scale_of<T>(args.problem, number / args.padded, number % args.padded);  // the padded length is a multiple of a block's share
  if (threadIdx.x % 4 == 0) result[number] = scale;
}

int64_t padded_length(const linattn_problem &problem) { return (problem.length + kKeys - 1) / kKeys * kKeys; }

int64_t scale_bytes(const linattn_problem &problem) { return (4 * static_cast<int64_t>(problem.batch) * problem.key_heads * padded_length(problem) + 255) / 256 * 256; }

int64_t row_tiles_of(const linattn_problem &problem) { return (problem.length + kRows - 1) / kRows; }

template <typename T> cudaError_t launch(const Arguments &args, cudaStream_t stream) {
  const linattn_problem &p = args.problem;
  if (args.running) return running_output_launch(args, args.states, stream);
  if (!hopper_makes_scales(args)) {
    const int64_t numbers = static_cast<int64_t>(p.batch) * p.key_heads * args.padded;
    key_scale_kernel<T><<<static_cast<int>(numbers / (kThreads / 4)), kThreads, 0, stream>>>(args, args.key_scale);
    if (const cudaError_t failed = cudaPeekAtLastError()) return failed;
  }
  if (args.chunks > 1)
    if (const cudaError_t failed = state_launch(args, stream)) return failed;
  if (args.chunk < p.length)
    if (const cudaError_t failed = launch_state_output(args, args.states, stream)) return failed;
  if (args.warpgroups) return hopper_launch(args, stream);
  if (args.gated) return gated_forward_launch(args, stream);
  switch (p.head_dim) {
    case 32: return launch_forward<T, 32, 32, false>(args, stream);
    case 64: return launch_forward<T, 64, 64, false>(args, stream);
    case 80: return launch_forward<T, 80, 80, false>(args, stream);
    case 96: return launch_forward<T, 96, 96, false>(args, stream);
    case 128: return launch_forward<T, 128, 128, false>(args, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

// float16 holds the weights of unit vectors, not those of vectors of any length, and has no gates here. What the gated kernels take beside gates is
// keys narrower than values, as a learned projection makes them.
TileDims tiles_of(const linattn_problem &problem) {
  const int key = problem.head_dim, value = problem.value_dim;
  const bool brain = problem.dtype == LINATTN_BFLOAT16, half = problem.dtype == LINATTN_FLOAT16 && problem.normalize_qk;
  const int64_t heads = static_cast<int64_t>(problem.batch) * problem.query_heads;
  const bool fits = problem.length >= kShortest && heads < (1 << 20) && heads * row_tiles_of(problem) < (1 << 30) &&
                    heads * padded_length(problem) / (kThreads / 4) < (int64_t{1} << 31) && aligned(problem.query) && aligned(problem.key) && aligned(problem.value);
  if (problem.degree != 2 || problem.initial_state || problem.dropout_p || !fits) return {};
  if (key == value && !is_gated(problem) && (brain || half) && (key == 32 || key == 64 || key == 80 || key == 96 || key == 128)) return {key, value};
  if (key == value && brain && (key == 32 || key == 64 || key == 128)) return {key, value};
  if (key <= 32 && key % 8 == 0 && brain && (value == 64 || value == 128)) return {key <= 16 ? 16 : 32, value};
  return {};
}
bool needs_gated(const linattn_problem &problem) { return is_gated(problem) || problem.head_dim != problem.value_dim; }
bool pairs_cost_less(const linattn_problem &problem) {
  const int64_t key = std::max(tiles_of(problem).key, 32);
  return problem.length <= 8 * key * key;
}

}  // namespace linattn_pairs

namespace linattn {

using namespace linattn_pairs;

namespace {

int shared_bytes(int dim) {
  switch (dim) {
    case 32: return ForwardShape<__nv_bfloat16, 32, 32, false>::SHARED;
    case 64: return ForwardShape<__nv_bfloat16, 64, 64, false>::SHARED;
    case 80: return ForwardShape<__nv_bfloat16, 80, 80, false>::SHARED;
    case 96: return ForwardShape<__nv_bfloat16, 96, 96, false>::SHARED;
    default: return ForwardShape<__nv_bfloat16, 128, 128, false>::SHARED;
  }
}

}  // namespace

// The scales of keys, then the decay's sums, or the chunks' sums and states. A state asked for where none is formed is not to be had here.
bool pairs_plan_forward(const linattn_problem &problem, const linattn_forward_result &result, linattn_plan &plan) {
  const TileDims tiles = tiles_of(problem);
  if (!tiles.key || !aligned(result.out)) return false;
  plan.gated = needs_gated(problem);
  plan.warpgroups = hopper_takes(problem), plan.row_tiles = static_cast<int32_t>(row_tiles_of(problem));
  const bool plain = plan.warpgroups && !plan.gated, by_state = plain && state_takes(problem), running = !result.state && running_takes(problem, false);
  const bool by_mma = !plain && !running && !result.state && states_take(problem, false);
  plan.states = by_state || by_mma || running;
  if (!plan.states && (!pairs_cost_less(problem) || result.state)) return false;
  plan.segments = by_state ? static_cast<int32_t>(state_chunks(problem)) : 1, plan.segment_length = plan.chunk = by_state ? kChunk * problem.head_dim : problem.length;
  plan.shared_bytes = plan.warpgroups ? hopper_shared_bytes(problem) : plan.gated ? gated_forward_shared_bytes(tiles) : shared_bytes(problem.head_dim);
  plan.workspace_bytes =
      scale_bytes(problem) + decay_bytes(problem) + key_gates_bytes(problem) + (by_state ? states_bytes(problem) + sums_bytes(problem) + unit_key_bytes(problem) : 0);
  if (running) {
    const RunningMemory memory(problem, false);
    plan.chunk = kRunTokens, plan.shared_bytes = memory.shared_bytes, plan.workspace_bytes += memory.bytes;
  }
  if (by_mma) {
    const StateMemory memory(problem, false);
    plan.chunk = plan.segment_length = memory.chunk, plan.segments = memory.chunks, plan.shared_bytes = std::max(plan.shared_bytes, memory.shared_bytes);
    plan.workspace_bytes += memory.bytes;
  }
  return true;
}

cudaError_t pairs_forward(const linattn_problem &problem, const linattn_forward_result &result, const linattn_plan &plan) {
  const int64_t bytes = problem.length * (problem.head_dim + problem.value_dim) * 2, heads = static_cast<int64_t>(problem.batch) * problem.query_heads;
  const int64_t together = std::min(heads, std::max<int64_t>(1, kCachedBytes / bytes) * (problem.query_heads / problem.key_heads));
  unsigned char *const workspace = static_cast<unsigned char *>(problem.workspace), *const behind = workspace + scale_bytes(problem);
  const bool by_state = plan.states && plan.warpgroups && !plan.gated;
  Arguments args{};
  args.problem = problem, args.out = result.out, args.mass = result.mass, args.final_state = result.state;
  args.key_scale = reinterpret_cast<float *>(workspace), args.padded = padded_length(problem);
  args.row_tiles = plan.row_tiles, args.heads_together = static_cast<int32_t>(together), args.chunks = by_state ? plan.segments : 1;
  args.blocks_together = Divider(args.heads_together * args.row_tiles), args.by_heads_together = Divider(args.heads_together);
  args.by_query_heads = Divider(problem.query_heads), args.by_group = Divider(problem.query_heads / problem.key_heads);
  args.by_state = Divider(problem.query_heads / problem.state_heads);
  args.warpgroups = plan.warpgroups, args.gated = plan.gated, args.running = plan.states && plan.chunk == kRunTokens;
  args.chunk = by_state ? problem.length : plan.chunk, args.key_gates = reinterpret_cast<KeyGates *>(behind + decay_bytes(problem));
  args.states = behind + decay_bytes(problem) + key_gates_bytes(problem);
  if (by_state) {
    args.unit_keys = args.states + states_bytes(problem);
    args.sums = reinterpret_cast<float *>(args.unit_keys + unit_key_bytes(problem));
  }
  const cudaStream_t stream = static_cast<cudaStream_t>(problem.stream);
  if (problem.log_decay && !problem.log_decay_per_token && (args.running || (plan.warpgroups && !plan.states))) {
    args.gates.rate = problem.log_decay;
  } else if (problem.log_decay) {
    args.gates.decay = reinterpret_cast<double *>(behind);
    if (!hopper_sums_decay(args))
      if (const cudaError_t failed = launch_running_decay(problem, args.gates.decay)) return failed;
  }
  return problem.dtype == LINATTN_BFLOAT16 ? launch<__nv_bfloat16>(args, stream) : launch<__half>(args, stream);
}

}  // namespace linattn
