// architectures: sm_80 compute_80 sm_90
// One new token of a window, beside linear attention or alone: which kernels run, and where their scratch memory lies.
#include "plan.h"
#include "window/leaving.cuh"
#include "window/mix.cuh"
#include "window/near.cuh"

namespace linattn_ring {
namespace {

// Blocks of `near` and, behind them, of `leaving`: two or more on a multiprocessor, and three where heads share no keys, which are many blocks.
template <typename T, int HEADS> __global__ void __launch_bounds__(THREADS, HEADS == 1 ? 3 : 2) window_kernel(const Arguments args) {
  extern __shared__ __align__(16) unsigned char shared[];  // two tiles of near
  __shared__ union {
    typename Near<T, HEADS>::Shared near;
    typename Leaving<T>::Shared leaving;
  } fixed;
  const int half = gridDim.x / 2, block = static_cast<int>(blockIdx.x);
  const Heads heads = heads_of(args.window, block % half, HEADS);
  if (block < half) Near<T, HEADS>(args, fixed.near, shared, heads).run();
  else Leaving<T>(args, fixed.leaving, heads).run();
}

template <typename T, int HEADS> cudaError_t launch_near(const Arguments &args, cudaStream_t stream) {
  const linattn_window &w = args.window;
  const int rounds = (w.query_heads / w.key_heads + HEADS - 1) / HEADS;
  if (const cudaError_t failed = cudaFuncSetAttribute(window_kernel<T, HEADS>, cudaFuncAttributeMaxDynamicSharedMemorySize, 2 * TILE)) return failed;
  window_kernel<T, HEADS><<<2 * w.batch * w.key_heads * rounds, THREADS, 2 * TILE, stream>>>(args);
  return cudaPeekAtLastError();
}
template <typename T> cudaError_t launch_near(const Arguments &args, cudaStream_t stream) {
  const int group = args.window.query_heads / args.window.key_heads;
  if (group == 1) return launch_near<T, 1>(args, stream);
  if (group == 2) return launch_near<T, 2>(args, stream);
  return group <= 4 ? launch_near<T, 4>(args, stream) : launch_near<T, HEADS_AT_ONCE>(args, stream);
}

int value_columns(const linattn_window &w, const linattn_beside &beside) { return w.value_dim + (beside.log_input_gate != nullptr); }

// Lays out scratch memory from `begin` on; returns where it ends.
uintptr_t lay_out(uintptr_t begin, const linattn_window &w, const linattn_beside &beside, Scratch &scratch) {
  const int64_t queries = static_cast<int64_t>(w.batch) * w.query_heads, keys = static_cast<int64_t>(w.batch) * w.key_heads, columns = value_columns(w, beside);
  const auto take = [&](int64_t count) {
    float *const at = reinterpret_cast<float *>(begin);
    begin += 4 * count;
    return at;
  };
  scratch.near = take(queries * w.value_dim), scratch.far = take(queries * columns), scratch.query = take(queries * beside.features);
  scratch.key = take(keys * beside.features), scratch.value = take(keys * columns), scratch.log_decay = take(keys);
  scratch.left = reinterpret_cast<int32_t *>(take(w.batch));
  return begin;
}

// The step of the attention beside the window: of float32 vectors in scratch memory.
linattn_problem problem_of(const linattn_window &w, const linattn_beside &beside, const Scratch &scratch) {
  const auto tensor = [](float *data, int64_t heads, int64_t width) { return linattn_tensor{data, heads * width, width, width}; };
  linattn_problem p{};
  p.batch = w.batch, p.query_heads = w.query_heads, p.key_heads = w.key_heads, p.state_heads = beside.state_heads;
  p.head_dim = beside.features, p.value_dim = value_columns(w, beside), p.length = 1, p.dtype = LINATTN_FLOAT32;
  p.degree = beside.degree, p.causal = 1, p.normalize_qk = beside.normalize_qk;
  p.query = tensor(scratch.query, w.query_heads, p.head_dim), p.key = tensor(scratch.key, w.key_heads, p.head_dim), p.value = tensor(scratch.value, w.key_heads, p.value_dim);
  p.coefficients = beside.coefficients, p.log_decay = beside.log_decay_per_token ? scratch.log_decay : beside.log_decay, p.log_decay_per_token = beside.log_decay_per_token;
  p.query_segments = p.key_segments = scratch.left, p.query_segments_stride = p.key_segments_stride = 1;
  p.stream = w.stream;
  return p;
}
linattn_forward_result result_of(const linattn_problem &p, const linattn_beside &beside, const Scratch &scratch) {
  const int64_t width = p.value_dim;
  return {{scratch.far, p.query_heads * width, width, width}, nullptr, beside.state};
}

bool takes(const linattn_window &w, const linattn_beside *beside) {
  const bool sizes = w.batch > 0 && w.key_heads > 0 && w.query_heads % w.key_heads == 0 && w.window > 0 && w.sinks >= 0;
  const bool dims = w.head_dim >= 1 && w.head_dim <= MAX_DIM && w.value_dim >= 1 && w.value_dim <= MAX_DIM;
  if (!sizes || !dims || !beside) return sizes && dims;
  const bool heads = beside->state_heads == w.key_heads || (beside->state_heads == w.query_heads && !beside->log_decay_per_token);
  const bool features =
      beside->features >= 1 && beside->features <= MAX_DIM && (beside->query_matrix || beside->features == w.head_dim) && (!beside->is_map || beside->features % 2 == 0);
  return heads && features && value_columns(w, *beside) <= MAX_DIM && (beside->degree == 1 || beside->degree == 2);
}

cudaError_t step(const linattn_window &w, const linattn_beside *beside, const linattn_plan &plan) {
  const cudaStream_t stream = static_cast<cudaStream_t>(w.stream);
  Arguments args{w, beside ? *beside : linattn_beside{}, beside != nullptr, {}};
  const uintptr_t rest = beside ? lay_out(reinterpret_cast<uintptr_t>(w.workspace), w, *beside, args.scratch) : 0;
  const auto launch = w.dtype == LINATTN_FLOAT32 ? launch_near<float> : w.dtype == LINATTN_FLOAT16 ? launch_near<__half> : launch_near<__nv_bfloat16>;
  if (const cudaError_t failed = launch(args, stream)) return failed;
  if (!beside) {
    count_kernel<<<(w.batch + THREADS - 1) / THREADS, THREADS, 0, stream>>>(args);
    return cudaPeekAtLastError();
  }
  linattn_problem problem = problem_of(w, *beside, args.scratch);
  problem.workspace = reinterpret_cast<void *>(rest);
  if (const cudaError_t failed = linattn::decode(problem, result_of(problem, *beside, args.scratch), plan)) return failed;
  mix_kernel<<<(w.batch * w.query_heads + WARPS - 1) / WARPS, THREADS, 0, stream>>>(args);
  return cudaPeekAtLastError();
}

}  // namespace
}  // namespace linattn_ring

extern "C" {

void linattn_plan_window_step(const linattn_window *window, const linattn_beside *beside, linattn_plan *plan) {
  using namespace linattn_ring;
  *plan = {};
  if (!takes(*window, beside)) return;
  if (beside) {
    Scratch scratch{};
    const int64_t bytes = static_cast<int64_t>(lay_out(0, *window, *beside, scratch));
    const linattn_problem problem = problem_of(*window, *beside, scratch);
    if (!linattn::decode_plan(problem, result_of(problem, *beside, scratch), *plan)) return;
    plan->workspace_bytes += bytes;
  }
  plan->engine = LINATTN_DECODE;
}

int linattn_window_step(const linattn_window *window, const linattn_beside *beside, const linattn_plan *plan) {
  return plan->engine == LINATTN_DECODE ? linattn_ring::step(*window, beside, *plan) : cudaErrorInvalidValue;
}

}  // extern "C"
