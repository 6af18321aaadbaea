// The gradients of long sequences: which calls have a state beside the pairs of a chunk, what that takes of the workspace, and its launches.
#include <algorithm>
#include <type_traits>

#include "pairs/backward_readers.cuh"

namespace linattn_pairs {
namespace {

constexpr int64_t kShortest = 112;  // tokens, times the keys' dim: up to there all pairs cost less

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

bool gradient_state_takes(const linattn_problem &problem) {
  const TileDims tiles = tiles_of(problem);
  const bool dims = tiles.key == 16 || tiles.key == 32 || tiles.key == 64, one_state = !problem.log_decay || problem.state_heads == problem.key_heads;
  if (!problem.causal || problem.dtype != LINATTN_BFLOAT16 || !dims || !one_state || problem.length <= kShortest * std::max(tiles.key, 32)) return false;
  return static_cast<int64_t>(problem.batch) * problem.query_heads < 65536 && GradientStateMemory(problem).shared_bytes <= linattn::shared_memory();
}

GradientStateMemory::GradientStateMemory(const linattn_problem &problem) {
  with_state_tiles(tiles_of(problem), [&](auto key, auto value) {
    constexpr int K = key, V = value;
    using S = GradientState<K, V>;
    using Queries = ReaderShape<K, V, false>;
    using Keys = ReaderShape<K, V, true>;
    const int64_t padded = (problem.length + kRows - 1) / kRows * kRows, queries = static_cast<int64_t>(problem.batch) * problem.query_heads * padded;
    chunk = S::chunk(), chunks = static_cast<int32_t>((problem.length + chunk - 1) / chunk);
    tiles = static_cast<int32_t>((problem.length - chunk + Queries::TOKENS - 1) / Queries::TOKENS);
    const int64_t records = static_cast<int64_t>(problem.batch) * problem.key_heads * chunks;
    scaled = round_up(queries * K * 2), weights = scaled + round_up(queries * V * 2), rows = weights + round_up(queries * 4), sums = rows + round_up(records * S::ROWS * V * 2);
    columns = sums + round_up(records * S::FLOATS * 4), bytes = columns + round_up(records * S::FLOATS * 4);
    shared_bytes = std::max({SumsShape<K, V>::SHARED, Queries::SHARED, Keys::SHARED});
    return 0;
  });
}

cudaError_t gradient_state_launch(const Gradients &of, char *workspace, cudaStream_t stream) {
  const GradientStateMemory at(of.problem);
  StateGradients args{of, at.chunks};
  args.across = reinterpret_cast<__nv_bfloat16 *>(workspace), args.scaled = reinterpret_cast<__nv_bfloat16 *>(workspace + at.scaled);
  args.weights = reinterpret_cast<float *>(workspace + at.weights);
  args.rows = reinterpret_cast<__nv_bfloat16 *>(workspace + at.rows);
  args.sums = reinterpret_cast<float *>(workspace + at.sums), args.columns = reinterpret_cast<float *>(workspace + at.columns);
  return with_state_tiles(tiles_of(of.problem), [&](auto key, auto value) {
    constexpr int K = key, V = value;
    if (const cudaError_t failed = launch_state<K, V, false>(args, stream)) return failed;
    if (const cudaError_t failed = launch_reader<K, V, false>(args, stream)) return failed;
    if (const cudaError_t failed = launch_state<K, V, true>(args, stream)) return failed;
    return launch_reader<K, V, true>(args, stream);
  });
}

}  // namespace linattn_pairs
