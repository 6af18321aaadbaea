// Long sequences: which calls have states beside the pairs of a chunk, what those take of the workspace, and their launches.
#include <algorithm>
#include <type_traits>

#include "pairs/state_flow.cuh"
#include "pairs/state_gradients.cuh"
#include "pairs/state_output.cuh"

namespace linattn_pairs {
namespace {

// Tokens up to which all pairs cost less, or not so much more that they were worth the memory of states.
int64_t shortest(TileDims tiles, bool gradients) { return (gradients ? 80 : tiles.key == 64 ? 128 : 112) * std::max(tiles.key, 32); }

template <typename Call> auto with_state_tiles(TileDims tiles, Call call) {
  using std::integral_constant;
  const auto is = [&](int key, int value) { return tiles.key == key && tiles.value == value; };
  if (is(16, 64)) return call(integral_constant<int, 16>(), integral_constant<int, 64>());
  if (is(16, 128)) return call(integral_constant<int, 16>(), integral_constant<int, 128>());
  if (is(32, 32)) return call(integral_constant<int, 32>(), integral_constant<int, 32>());
  if (is(32, 64)) return call(integral_constant<int, 32>(), integral_constant<int, 64>());
  if (is(32, 128)) return call(integral_constant<int, 32>(), integral_constant<int, 128>());
  return call(integral_constant<int, 64>(), integral_constant<int, 64>());
}

int64_t round_up(int64_t bytes) { return (bytes + 255) / 256 * 256; }

}  // namespace

bool states_take(const linattn_problem &problem, bool gradients) {
  const TileDims tiles = tiles_of(problem);
  const bool dims = tiles.key == 16 || tiles.key == 32 || tiles.key == 64, one_state = !problem.log_decay || problem.state_heads == problem.key_heads;
  if (!problem.causal || problem.dtype != LINATTN_BFLOAT16 || !dims || !one_state || problem.length <= shortest(tiles, gradients)) return false;
  return static_cast<int64_t>(problem.batch) * problem.query_heads < 65536 && StateMemory(problem, gradients).shared_bytes <= linattn::shared_memory();
}

StateMemory::StateMemory(const linattn_problem &problem, bool gradients) {
  with_state_tiles(tiles_of(problem), [&](auto key, auto value) {
    constexpr int K = key, V = value;
    using S = FeatureState<K, V>;
    using Queries = ReaderShape<K, V, false>;
    using Keys = ReaderShape<K, V, true>;
    const int64_t padded = (problem.length + kRows - 1) / kRows * kRows,
                  tokens = static_cast<int64_t>(problem.batch) * (gradients ? problem.query_heads : problem.key_heads) * padded;
    chunk = S::chunk(), chunks = static_cast<int32_t>((problem.length + chunk - 1) / chunk);
    tiles = static_cast<int32_t>((problem.length - chunk + Queries::TOKENS - 1) / Queries::TOKENS);
    const int64_t records = static_cast<int64_t>(problem.batch) * problem.key_heads * chunks;
    scaled = round_up(tokens * K * 2), weights = scaled + (gradients || is_gated(problem) ? round_up(tokens * V * 2) : 0);
    rows = weights + round_up(tokens * 4), sums = rows + round_up(records * S::ROWS * V * 2);
    columns = sums + round_up(records * S::FLOATS * 4), edge_rows = columns + round_up(records * S::FLOATS * 4);
    edges = gradients && problem.log_decay ? (chunks - 1) / kEdgeChunks : 0;
    const int64_t all_edges = static_cast<int64_t>(problem.batch) * problem.key_heads * edges;
    edge_columns = edge_rows + round_up(all_edges * S::ROWS * V * 2), flows = edge_columns + round_up(all_edges * S::FLOATS * 4), bytes = flows + round_up(all_edges * 8);
    shared_bytes = gradients ? std::max({SumsShape<K, V>::SHARED, Queries::SHARED, Keys::SHARED}) : std::max(SumsShape<K, V>::SHARED, OutputShape<K, V>::SHARED);
    return 0;
  });
}

namespace {

StateArguments arguments_of(const Gradients &of, const StateMemory &at, void *memory) {
  char *const workspace = static_cast<char *>(memory);
  StateArguments args{};
  args.of = of, args.of.chunk = at.chunk, args.chunks = at.chunks;
  args.across = reinterpret_cast<__nv_bfloat16 *>(workspace), args.scaled = reinterpret_cast<__nv_bfloat16 *>(workspace + at.scaled);
  args.weights = reinterpret_cast<float *>(workspace + at.weights);
  args.rows = reinterpret_cast<__nv_bfloat16 *>(workspace + at.rows);
  args.edges = at.edges, args.edge_rows = reinterpret_cast<__nv_bfloat16 *>(workspace + at.edge_rows);
  args.edge_columns = reinterpret_cast<float *>(workspace + at.edge_columns), args.flows = reinterpret_cast<double *>(workspace + at.flows);
  args.sums = reinterpret_cast<float *>(workspace + at.sums), args.columns = reinterpret_cast<float *>(workspace + at.columns);
  return args;
}

}  // namespace

cudaError_t launch_state_gradients(const Gradients &of, void *workspace, cudaStream_t stream) {
  const StateArguments args = arguments_of(of, StateMemory(of.problem, true), workspace);
  return with_state_tiles(tiles_of(of.problem), [&](auto key, auto value) {
    constexpr int K = key, V = value;
    if (const cudaError_t failed = launch_state<K, V, false>(args, stream)) return failed;
    if (const cudaError_t failed = launch_reader<K, V, false>(args, stream)) return failed;
    const int edges = of.row_sums ? of.problem.batch * of.problem.key_heads * args.edges : 0;
    if (edges) keep_edges_kernel<K, V><<<dim3(16, edges), kFlowThreads, 0, stream>>>(args);
    if (const cudaError_t failed = launch_state<K, V, true>(args, stream)) return failed;
    if (edges) flow_kernel<K, V><<<edges, kFlowThreads, 0, stream>>>(args);
    if (const cudaError_t failed = launch_reader<K, V, true>(args, stream)) return failed;
    if (of.row_sums) flow_mean_kernel<<<of.problem.batch * of.problem.key_heads *(args.chunks - 1), kFlowThreads, 0, stream>>>(args);
    return cudaPeekAtLastError();
  });
}

cudaError_t launch_flow_correction(const Gradients &of, void *workspace, cudaStream_t stream) {
  const StateArguments args = arguments_of(of, StateMemory(of.problem, true), workspace);
  flow_correction_kernel<<<of.problem.batch * of.problem.key_heads *(args.edges + 1), kFlowThreads, 0, stream>>>(args);
  return cudaPeekAtLastError();
}

cudaError_t launch_state_output(const Arguments &forward, void *workspace, cudaStream_t stream) {
  Gradients of{};
  of.problem = forward.problem, of.key_scale = forward.key_scale, of.padded = forward.padded, of.gates = forward.gates;
  StateArguments args = arguments_of(of, StateMemory(of.problem, false), workspace);
  args.out = forward.out, args.mass = forward.mass;
  return with_state_tiles(tiles_of(of.problem), [&](auto key, auto value) {
    constexpr int K = key, V = value;
    if (const cudaError_t failed = launch_state<K, V, false>(args, stream)) return failed;
    return launch_output<K, V>(args, stream);
  });
}

}  // namespace linattn_pairs
