// architectures: sm_90a
// The second degree over 16 features in one pass along a sequence, by Hopper's warpgroups: which calls take this form, and its launches.
#include <algorithm>

#include "pairs/running_flow.cuh"
#include "pairs/running_gradients.cuh"
#include "pairs/running_output.cuh"

namespace linattn_pairs {
namespace {

int32_t chunks_of(const linattn_problem &problem) { return static_cast<int32_t>((problem.length + kRunTokens - 1) / kRunTokens); }

// Into how many segments a sequence is cut, where `heads` have blocks of their own, one a multiprocessor: what costs least, counted in chunks, the sums of segments among it.
struct Cut {
  int32_t segments = 1;
  double cost = 1e30;
  Cut(const linattn_problem &problem, int heads) {
    const int64_t processors = linattn::card(cudaDevAttrMultiProcessorCount, 1), blocks = static_cast<int64_t>(problem.batch) * heads;
    const int32_t chunks = chunks_of(problem);
    for (int32_t count = 1; count <= std::max(1, chunks / 4) && count <= 64; ++count) {
      const int32_t each = (chunks + count - 1) / count;
      if ((chunks + each - 1) / each != count) continue;
      const int64_t rounds = (blocks * count + processors - 1) / processors;
      const int64_t sums = (static_cast<int64_t>(problem.batch) * problem.key_heads * (count - 1) + 2 * processors - 1) / (2 * processors);
      const double here = rounds * (each + 1.0) + (count > 1 ? sums * each + 4.0 : 0.0);
      if (here < cost) cost = here, segments = count;
    }
  }
};

// Whether all pairs take longer, by microseconds on an H100 at 512 to 32,768 tokens of 32 to 256 heads.
bool costs_less(const linattn_problem &problem, bool gradients) {
  const double heads = static_cast<double>(problem.batch) * problem.query_heads, tokens = static_cast<double>(problem.length);
  const double share = 132.0 / linattn::card(cudaDevAttrMultiProcessorCount, 1), rows = Cut(problem, problem.query_heads).cost;
  if (!gradients) return 3.75 * rows + 2.0 < (is_gated(problem) ? 30.0 : 20.0) + share * 2.6e-7 * heads * tokens * tokens;
  const double group = problem.query_heads / problem.key_heads, both = 6.5 * rows + (4.6 + 1.6 * group) * Cut(problem, problem.key_heads).cost + 12.0;
  return (is_gated(problem) ? both : 0.83 * both) < share * heads * tokens * (9e-7 * tokens + 8e-4);
}

template <typename Kernel> cudaError_t launch(Kernel kernel, int heads, int shared, const Running &args, cudaStream_t stream, int threads = kRunThreads) {
  if (const cudaError_t failed = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared)) return failed;
  kernel<<<static_cast<unsigned>(args.of.problem.batch * heads * args.segments), threads, shared, stream>>>(args);
  return cudaPeekAtLastError();
}

// With the state that each segment begins with.
template <Pass PASS> cudaError_t launch_starts(const Running &args, cudaStream_t stream) {
  if (args.segments == 1) return cudaSuccess;
  const linattn_problem &p = args.of.problem;
  if (const cudaError_t failed = launch(running_sums_kernel<PASS>, p.key_heads, SumsOfSegments<PASS>::SHARED, args, stream, kReaders)) return failed;
  running_scan_kernel<PASS == Pass::COLUMNS><<<dim3((141 * kKeepers + kReaders - 1) / kReaders, p.batch * p.key_heads), kReaders, 0, stream>>>(args);
  return cudaPeekAtLastError();
}

Running arguments_of(const Gradients &of, int heads, void *workspace) {
  Running args{};
  args.of = of, args.chunks = chunks_of(of.problem), args.segments = Cut(of.problem, heads).segments;
  args.segment = (args.chunks + args.segments - 1) / args.segments, args.starts = static_cast<float *>(workspace);
  return args;
}

// Where what it needs lies in the workspace, beside a decay that wants a gradient.
RunningFlow flow_of(const Gradients &of, void *workspace) {
  if (!of.row_sums) return {};
  const RunningMemory at(of.problem, true);
  const linattn_problem &p = of.problem;
  const int64_t keys = static_cast<int64_t>(p.batch) * p.key_heads, chunks = chunks_of(p);
  char *const memory = static_cast<char *>(workspace);
  float *const states = reinterpret_cast<float *>(memory + at.states), *const sums = reinterpret_cast<float *>(memory + at.warp_sums);
  double *const of_chunks = reinterpret_cast<double *>(memory + at.chunk_sums);
  return {at.edges, {states, states + keys * at.edges * kStartFloats}, sums + keys * chunks * kWarps, sums, of_chunks, of_chunks + keys * chunks};
}
cudaError_t launch_flow(Running args, cudaStream_t stream) {
  args.of.chunk = kRunTokens;
  const linattn_problem &p = args.of.problem;
  const int64_t chunks = static_cast<int64_t>(p.batch) * p.key_heads * args.chunks, warps = kReaders / 32;
  if (args.flow.edges) running_edges_kernel<<<static_cast<unsigned>(p.batch * p.key_heads * args.flow.edges), kKeepers, 0, stream>>>(args);
  running_chunks_kernel<<<static_cast<unsigned>((chunks + warps - 1) / warps), kReaders, 0, stream>>>(args);
  running_correction_kernel<<<static_cast<unsigned>((chunks + kReaders - 1) / kReaders), kReaders, 0, stream>>>(args);
  return cudaPeekAtLastError();
}

}  // namespace

bool running_takes(const linattn_problem &problem, bool gradients) {
  const TileDims tiles = tiles_of(problem);
  const bool one_state = !problem.log_decay || problem.state_heads == problem.key_heads;
  return linattn::card(cudaDevAttrComputeCapabilityMajor) == 9 && tiles.key == kRunKeys && tiles.value == kRunValues && problem.causal && one_state &&
         problem.length > kRunTokens && costs_less(problem, gradients);
}

RunningMemory::RunningMemory(const linattn_problem &problem, bool gradients) {
  const int64_t chunks = chunks_of(problem), keys = static_cast<int64_t>(problem.batch) * problem.key_heads, queries = static_cast<int64_t>(problem.batch) * problem.query_heads;
  segments = Cut(problem, problem.query_heads).segments, edges = static_cast<int32_t>(gradients && problem.log_decay ? (chunks - 1) / kRunEdgeChunks : 0);
  const int32_t most = gradients ? std::max(segments, Cut(problem, problem.key_heads).segments) : segments;
  const int64_t sums = gradients && problem.log_decay ? chunks : 0;
  states = most > 1 ? keys * most * kStartFloats * 4 : 0, chunk_sums = states + 2 * keys * edges * kStartFloats * 4;
  warp_sums = chunk_sums + 2 * keys * sums * 8, bytes = warp_sums + (keys + queries) * sums * kWarps * 4;
  shared_bytes = gradients ? std::max(RunShape<Pass::ROWS>::SHARED, RunShape<Pass::COLUMNS>::SHARED) : RunShape<Pass::OUTPUT>::SHARED;
}

cudaError_t running_output_launch(const Arguments &forward, void *workspace, cudaStream_t stream) {
  Gradients of{};
  of.problem = forward.problem, of.gates = forward.gates;
  const int heads = of.problem.query_heads, shared = RunShape<Pass::OUTPUT>::SHARED;
  Running args = arguments_of(of, heads, workspace);
  args.out = forward.out, args.mass = forward.mass;
  if (const cudaError_t failed = launch_starts<Pass::ROWS>(args, stream)) return failed;
  return is_gated(of.problem) ? launch(running_output_kernel<true>, heads, shared, args, stream) : launch(running_output_kernel<false>, heads, shared, args, stream);
}

cudaError_t running_gradients_launch(const Gradients &of, void *workspace, cudaStream_t stream) {
  const linattn_problem &p = of.problem;
  Running rows = arguments_of(of, p.query_heads, workspace), columns = arguments_of(of, p.key_heads, workspace);
  rows.flow = columns.flow = flow_of(of, workspace);
  if (const cudaError_t failed = launch_starts<Pass::ROWS>(rows, stream)) return failed;
  const auto rows_kernel = is_gated(p) ? running_rows_kernel<true> : running_rows_kernel<false>;
  if (const cudaError_t failed = launch(rows_kernel, p.query_heads, RunShape<Pass::ROWS>::SHARED, rows, stream)) return failed;
  if (const cudaError_t failed = launch_starts<Pass::COLUMNS>(columns, stream)) return failed;
  const auto columns_kernel = is_gated(p) ? running_columns_kernel<true> : running_columns_kernel<false>;
  if (const cudaError_t failed = launch(columns_kernel, p.key_heads, RunShape<Pass::COLUMNS>::SHARED, columns, stream)) return failed;
  return of.row_sums ? launch_flow(rows, stream) : cudaSuccess;
}

}  // namespace linattn_pairs
