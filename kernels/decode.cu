// architectures: sm_80 compute_80 sm_90
// One new token a sequence: which kernel a call takes, and its launch.
#include "step.cuh"

namespace linattn {
namespace {

constexpr int FEW = 4, MANY = 8;  // warps
constexpr int FEWEST_SPLITS = 3;  // of a state that are worth the kernel that adds up what their blocks found

template <int DEGREE, int HEADS, int SLICES, bool WHOLE, int WARPS>
__global__ void __launch_bounds__(32 * WARPS, Step<DEGREE, HEADS, SLICES, WHOLE, WARPS>::BLOCKS) step_kernel(const StepArguments args) {
  using Work = Step<DEGREE, HEADS, SLICES, WHOLE, WARPS>;
  extern __shared__ __align__(16) float shared[];
  __shared__ typename Work::Fixed fixed;
  Work step(args, fixed, shared);
  const bool takes_in = is_taken(args.problem, step.at.batch, 0);
#pragma unroll 1
  for (int base = 0; base < args.group; base += HEADS) {
#pragma unroll 1
    for (int number = 0; number < LOTS; ++number) step.send_for(number);
    if (!takes_in) {
      linattn_tile::copy_wait<0>();
      return step.write_padding();
    }
    step.begin_round(base);
    __syncthreads();
#pragma unroll 1
    for (int number = 0; step.rows_in(number) > 0; ++number) {
      linattn_tile::copy_wait<LOTS - 1>();
      if (DEGREE == 2) step.make_features(number, base == 0);
      __syncwarp();
      step.count(number);
      step.multiply(number);
      __syncwarp();
      step.send_for(number + LOTS);
    }
    step.finish();
    __syncthreads();
  }
}

template <int DEGREE, int HEADS, int SLICES, bool WHOLE, int WARPS> cudaError_t launch_step(const StepArguments &args, cudaStream_t stream) {
  using Work = Step<DEGREE, HEADS, SLICES, WHOLE, WARPS>;
  const auto kernel = step_kernel<DEGREE, HEADS, SLICES, WHOLE, WARPS>;
  const int bytes = Work::shared_bytes(args.rows_each);
  if (const cudaError_t failed = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)) return failed;
  kernel<<<blocks_of(args), Work::THREADS, bytes, stream>>>(args);
  return cudaPeekAtLastError();
}

// Where small states are many, what each of a block's warps must know first is most of the time.
bool by_few(const linattn_problem &p) { return static_cast<int64_t>(p.batch) * p.state_heads > 4 * card(cudaDevAttrMultiProcessorCount, 108); }

template <int HEADS, int SLICES, bool WHOLE> cudaError_t launch_degree(const StepArguments &args, cudaStream_t stream) {
  if (args.problem.degree == 2) return launch_step<2, HEADS, SLICES, WHOLE, MANY>(args, stream);
  if constexpr (SLICES <= 2)
    if (by_few(args.problem)) return launch_step<1, HEADS, SLICES, WHOLE, FEW>(args, stream);
  return launch_step<1, HEADS, SLICES, WHOLE, MANY>(args, stream);
}
template <int HEADS, int SLICES> cudaError_t launch_slices(const StepArguments &args, cudaStream_t stream) {
  return args.problem.value_dim == 32 * SLICES ? launch_degree<HEADS, SLICES, true>(args, stream) : launch_degree<HEADS, SLICES, false>(args, stream);
}
template <int HEADS> cudaError_t launch(const StepArguments &args, cudaStream_t stream) {
  const int dim = std::max(args.problem.head_dim, args.problem.value_dim);
  if (dim <= 32) return launch_slices<HEADS, 1>(args, stream);
  if (dim <= 64) return launch_slices<HEADS, 2>(args, stream);
  if (dim <= 128) return launch_slices<HEADS, 4>(args, stream);
  return launch_degree<HEADS, 8, false>(args, stream);
}

// Blocks that share a state: as few as keep all multiprocessors at work, of which each has three blocks at once; two take two thirds as long, but
// one alone half, since it does not ask for all that memory gives.
int splits_of_step(const linattn_problem &p) {
  const int most = feature_count(p) / FEWEST_ROWS, processors = card(cudaDevAttrMultiProcessorCount, 108);
  if (most < FEWEST_SPLITS) return 1;
  const auto time = [&](int splits) {
    const int64_t blocks = static_cast<int64_t>(p.batch) * p.state_heads * splits, rounds = blocks / (3 * processors), left = blocks % (3 * processors);
    const double last = left == 0 ? 0 : left <= processors ? 1 / 2. : left <= 2 * processors ? 2 / 3. : 1;
    return (rounds + last) / splits;
  };
  int best = 1;
  for (int splits = 2; splits <= most; ++splits)
    if (time(splits) < .95 * time(best)) best = splits;
  return best;
}

}  // namespace

bool decode_plan(const linattn_problem &problem, const linattn_forward_result &result, linattn_plan &plan) {
  if (problem.length != 1 || !problem.causal || !result.state || problem.dropout_p) return false;
  plan_splits(problem, splits_of_step(problem), plan);
  return true;
}

cudaError_t decode(const linattn_problem &problem, const linattn_forward_result &result, const linattn_plan &plan) {
  const cudaStream_t stream = static_cast<cudaStream_t>(problem.stream);
  const StepArguments args = step_arguments(problem, result, result.state, plan);
  const auto launch_heads = args.group == 1 ? launch<1> : args.group == 2 ? launch<2> : args.group <= 4 ? launch<4> : launch<HEADS_AT_ONCE>;
  if (const cudaError_t failed = launch_heads(args, stream)) return failed;
  return launch_join(args, stream);
}

}  // namespace linattn
