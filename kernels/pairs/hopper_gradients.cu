// architectures: sm_90a
// The second degree's gradients by wgmma: which calls take this form, and its launches.
#include "pairs/group_columns.cuh"
#include "pairs/group_rows.cuh"

namespace linattn_pairs {
namespace {

// `call` with the widths of tiles that there are kernels for, or else `otherwise`.
template <typename Result, typename Call> Result with_group_tiles(TileDims tiles, Result otherwise, Call call) {
  using std::integral_constant;
  const auto is = [&](int key, int value) { return tiles.key == key && tiles.value == value; };
  if (is(16, 64)) return call(integral_constant<int, 16>(), integral_constant<int, 64>());
  if (is(32, 32)) return call(integral_constant<int, 32>(), integral_constant<int, 32>());
  if (is(32, 64)) return call(integral_constant<int, 32>(), integral_constant<int, 64>());
  if (is(64, 64)) return call(integral_constant<int, 64>(), integral_constant<int, 64>());
  if (is(128, 128)) return call(integral_constant<int, 128>(), integral_constant<int, 128>());
  return otherwise;
}

template <int K, int V, bool GATED> cudaError_t launch(const Gradients &args, cudaStream_t stream) {
  constexpr int kShared = GroupShape<K, V>::SHARED;
  if (const cudaError_t failed = cudaFuncSetAttribute(group_rows_kernel<K, V, GATED>, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared)) return failed;
  if (const cudaError_t failed = cudaFuncSetAttribute(group_columns_kernel<K, V, GATED>, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared)) return failed;
  const linattn_problem &p = args.problem;
  group_rows_kernel<K, V, GATED><<<static_cast<unsigned>(p.batch * p.query_heads * args.row_tiles), kBlockThreads, kShared, stream>>>(args);
  group_columns_kernel<K, V, GATED><<<static_cast<unsigned>(p.batch * p.key_heads * args.row_tiles), kBlockThreads, kShared, stream>>>(args);
  return cudaPeekAtLastError();
}

}  // namespace

// A decay of each query head beside grouped keys has no one factor of a key.
bool group_gradients_take(const linattn_problem &problem) {
  const TileDims tiles = tiles_of(problem);
  const bool dims = with_group_tiles(tiles, false, [](auto, auto) { return true; });
  return linattn::card(cudaDevAttrComputeCapabilityMajor) == 9 && dims && problem.length < (1 << 30) && (!problem.log_decay || problem.state_heads == problem.key_heads);
}

int group_gradients_shared_bytes(TileDims tiles) {
  return with_group_tiles(tiles, 0, [](auto key, auto value) -> int { return GroupShape<key(), value()>::SHARED; });
}

cudaError_t group_gradients_launch(const Gradients &args, bool gated, cudaStream_t stream) {
  return with_group_tiles(tiles_of(args.problem), cudaErrorInvalidValue, [&](auto key, auto value) {
    constexpr int K = key, V = value;
    if constexpr (K == V)
      if (!gated) return launch<K, V, false>(args, stream);
    return launch<K, V, true>(args, stream);
  });
}

}  // namespace linattn_pairs
