// architectures: sm_80 compute_80 sm_90
// A few new tokens a sequence: which kernel a call takes, and its launch.
#include "tokens.cuh"

#include "tokens/kernels.h"

namespace linattn {
namespace {

constexpr int FEW = 4, MANY = 8;  // warps

template <int SLICES, linattn_dtype DTYPE, int WARPS> __global__ void __launch_bounds__(32 * WARPS, Tokens<SLICES, DTYPE, WARPS>::BLOCKS)
    tokens_kernel(const TokensArguments args) {
  using Work = Tokens<SLICES, DTYPE, WARPS>;
  extern __shared__ __align__(16) float shared[];
  __shared__ typename Work::Fixed fixed;
  Work work(args, fixed, shared);
#pragma unroll 1
  for (int base = 0; base < args.group; base += args.heads_at_once) {
    const bool takes_in = base + args.heads_at_once >= args.group && args.after;
    work.begin_round(base);
#pragma unroll 1
    for (int number = 0; number < 2; ++number) work.send_for(number);
    work.gather();
    if (work.warp == 0) fixed.look_at_tokens(Decays::token_of(work.p, work.at, work.lane), work.tokens, work.lane);
    linattn_tile::copy_wait<1>();
    __syncthreads();
    const int weigh = work.at.split > 0 || work.tiles > WARPS / 2 ? 0 : work.tiles;  // warps that do nothing else meanwhile
    work.begin_sums();
    work.weigh_tokens();
    if (takes_in && work.rows > 0) work.take_in(0, weigh);
    __syncthreads();
    if (work.rows > 0) work.read(0);
#pragma unroll 1
    for (int number = 1; work.rows_in(number) > 0; ++number) {
      __syncthreads();
      work.send_for(number + 1);
      linattn_tile::copy_wait<1>();
      __syncthreads();
      work.read(number);
      if (takes_in) work.take_in(number, 0);
    }
    __syncthreads();
    work.leave_sums();
    __syncthreads();
    work.write();
    __syncthreads();
  }
}

// The kernel for a call.
struct Kernel {
  int warps, most_tiles;
  int (*shared_bytes)(int dim, int tiles, int rows);
  void (*kernel)(TokensArguments);
};
template <int SLICES, linattn_dtype DTYPE, int WARPS> Kernel kernel_of() {
  using Work = Tokens<SLICES, DTYPE, WARPS>;
  return {WARPS, Work::MOST_TILES, Work::shared_bytes, tokens_kernel<SLICES, DTYPE, WARPS>};
}
template <linattn_dtype DTYPE> Kernel kernel_of(int dim, bool by_few) {
  if (dim <= 32) return by_few ? kernel_of<1, DTYPE, FEW>() : kernel_of<1, DTYPE, MANY>();
  if (dim <= 64) return by_few ? kernel_of<2, DTYPE, FEW>() : kernel_of<2, DTYPE, MANY>();
  return dim <= 128 ? kernel_of<4, DTYPE, MANY>() : kernel_of<8, DTYPE, MANY>();
}
// Where small states are many, what each of a block's warps must know first is most of the time.
Kernel kernel_of(const linattn_problem &p) {
  const int dim = std::max(p.head_dim, p.value_dim);
  const bool is_small = p.degree == 1 && p.query_heads / p.state_heads * p.length <= 16;
  const bool are_many = static_cast<int64_t>(p.batch) * p.state_heads > 2 * card(cudaDevAttrMultiProcessorCount, 108);
  switch (p.dtype) {
    case LINATTN_FLOAT32: return kernel_of<LINATTN_FLOAT32>(dim, is_small && are_many);
    case LINATTN_FLOAT16: return kernel_of<LINATTN_FLOAT16>(dim, is_small && are_many);
    default: return kernel_of<LINATTN_BFLOAT16>(dim, is_small && are_many);
  }
}

// Query heads of a state that are worked on together, and the tiles that their pairs with the tokens are.
int heads_at_once(const linattn_problem &p, int most_tiles) { return std::min<int>(p.query_heads / p.state_heads, 16 * most_tiles / static_cast<int>(p.length)); }
int tiles_of(const linattn_problem &p, int heads) { return (heads * static_cast<int>(p.length) + 15) / 16; }

// The kernel of calls as models have them, where the call is one.
SeveralKernel several_of(const linattn_problem &p, const linattn_forward_result &result, const float *before) {
  const auto is_near = [&](const linattn_tensor &rows) { return aligned(rows) && std::max(rows.head_stride * p.query_heads, rows.token_stride * MOST_TOKENS) <= INT32_MAX / 2; };
  const bool is_for_it = p.dtype == LINATTN_BFLOAT16 && p.head_dim == p.value_dim && is_near(p.query) && is_near(p.key) && is_near(p.value) && is_near(result.out);
  const bool lie_alike = !before || !result.state || (reinterpret_cast<uintptr_t>(before) - reinterpret_cast<uintptr_t>(result.state)) % 16 == 0;  // from a boundary of 16 bytes
  if (!is_for_it || !lie_alike) return {};
  const int tokens = static_cast<int>(p.length), pairs = p.query_heads / p.state_heads * tokens;
  const SeveralKernel found = p.degree == 1 ? kernel_of_first_degree(p.head_dim, pairs, tokens) : kernel_of_second_degree(p.head_dim, pairs, tokens);
  return found.shared_bytes + found.fixed_bytes <= shared_memory() ? found : SeveralKernel{};
}
// How many blocks share a state: those that are at work at once do so in rounds, of as many units as one of their warps has, and what
// a block's beginning and end take, and a second kernel.
int splits_by_units(const linattn_problem &p, const SeveralKernel &kernel) {
  constexpr int ENDS = 3, JOIN = 2;  // in the time of units
  const int64_t states = static_cast<int64_t>(p.batch) * p.state_heads, at_once = static_cast<int64_t>(kernel.blocks) * card(cudaDevAttrMultiProcessorCount, 108);
  int best = 1;
  int64_t least = INT64_MAX;
  for (int splits = 1; splits * kernel.runs <= kernel.units; ++splits) {
    const int64_t rounds = (states * splits + at_once - 1) / at_once, units = (kernel.units + splits * kernel.runs - 1) / (splits * kernel.runs);
    const int64_t time = rounds * (units + ENDS) + (splits > 1 ? JOIN : 0);
    if (time < least) least = time, best = splits;
  }
  return best;
}

// How many blocks share a state where they go through its rows by lots.
int splits_by_lots(const linattn_problem &p) {
  const int64_t heads = static_cast<int64_t>(p.batch) * p.state_heads, blocks = 4 * static_cast<int64_t>(card(cudaDevAttrMultiProcessorCount, 108));
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(blocks / heads, feature_count(p) / FEWEST_ROWS)));
}

bool plan_tokens(const linattn_problem &problem, const linattn_forward_result &result, const float *before, linattn_plan &plan) {
  if (problem.length > MOST_TOKENS || !problem.causal || problem.dropout_p) return false;
  if (const SeveralKernel found = several_of(problem, result, before); found.kernel) {
    plan_splits(problem, splits_by_units(problem, found), plan);
    plan.shared_bytes = found.shared_bytes;
    return true;
  }
  plan_splits(problem, splits_by_lots(problem), plan);
  const Kernel found = kernel_of(problem);
  plan.shared_bytes = found.shared_bytes(problem.head_dim, tiles_of(problem, heads_at_once(problem, found.most_tiles)), static_cast<int>(plan.chunk));
  return true;
}

cudaError_t run_tokens(const linattn_problem &problem, const linattn_forward_result &result, const float *before, const linattn_plan &plan) {
  const cudaStream_t stream = static_cast<cudaStream_t>(problem.stream);
  const int tokens = static_cast<int>(problem.length);
  const SeveralArguments several = {step_arguments(problem, result, before, plan), (65535 + tokens) / tokens};
  if (const SeveralKernel found = several_of(problem, result, before); found.kernel) {
    if (const cudaError_t failed = cudaFuncSetAttribute(found.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, found.shared_bytes)) return failed;
    const auto kernel = found.kernel;
    kernel<<<blocks_of(several), 32 * found.warps, found.shared_bytes, stream>>>(several);
    return launch_join(several, stream);
  }
  const Kernel found = kernel_of(problem);
  const auto kernel = found.kernel;
  const int heads = heads_at_once(problem, found.most_tiles);
  const TokensArguments args = {several, heads, tiles_of(problem, heads)};
  if (const cudaError_t failed = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes)) return failed;
  kernel<<<blocks_of(args), 32 * found.warps, plan.shared_bytes, stream>>>(args);
  return launch_join(args, stream);
}

}  // namespace

bool tokens_plan_forward(const linattn_problem &problem, const linattn_forward_result &result, linattn_plan &plan) {
  return (problem.initial_state || result.state) && plan_tokens(problem, result, problem.initial_state, plan);
}
bool tokens_plan_step(const linattn_problem &problem, const linattn_forward_result &result, linattn_plan &plan) {
  return result.state && plan_tokens(problem, result, result.state, plan);
}

cudaError_t tokens_forward(const linattn_problem &problem, const linattn_forward_result &result, const linattn_plan &plan) {
  return run_tokens(problem, result, problem.initial_state, plan);
}
cudaError_t tokens_step(const linattn_problem &problem, const linattn_forward_result &result, const linattn_plan &plan) { return run_tokens(problem, result, result.state, plan); }

}  // namespace linattn
