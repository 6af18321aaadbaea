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

// The same with whether they know gates, as those of keys narrower than values do in any case.
template <typename Result, typename Call> Result with_group_kernels(TileDims tiles, bool gated, Result otherwise, Call call) {
  return with_group_tiles(tiles, otherwise, [&](auto key, auto value) {
    if constexpr (key() == value())
      if (!gated) return call(key, value, std::false_type());
    return call(key, value, std::true_type());
  });
}

// Both kinds of blocks in one launch, the longer ones first, so that the card runs out of work once.
template <int K, int V, bool GATED>
__global__ void __launch_bounds__(GroupShape<K, V, GATED>::THREADS, GroupShape<K, V, GATED>::BLOCKS)
    group_gradients_kernel(const __grid_constant__ Gradients args, int column_blocks) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char shared[];
  const int block = blockIdx.x;
  if (block < column_blocks) group_columns<K, V, GATED>(args, shared, block);
  else group_rows<K, V, GATED>(args, shared, block - column_blocks);
#endif
}

template <int K, int V, bool GATED> cudaError_t launch(const Gradients &args, cudaStream_t stream) {
  constexpr int kShared = GroupShape<K, V, GATED>::SHARED;
  if (const cudaError_t failed = cudaFuncSetAttribute(group_gradients_kernel<K, V, GATED>, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared)) return failed;
  const linattn_problem &p = args.problem;
  const int column_blocks = static_cast<int>(p.batch * p.key_heads * args.row_tiles), row_blocks = static_cast<int>(p.batch * p.query_heads * args.row_tiles);
  group_gradients_kernel<K, V, GATED><<<static_cast<unsigned>(column_blocks + row_blocks), GroupShape<K, V, GATED>::THREADS, kShared, stream>>>(args, column_blocks);
  return cudaPeekAtLastError();
}

}  // namespace

// A decay of each query head beside grouped keys has no one factor of a key.
bool group_gradients_take(const linattn_problem &problem) {
  const TileDims tiles = tiles_of(problem);
  const bool dims = with_group_tiles(tiles, false, [](auto, auto) { return true; });
  return linattn::card(cudaDevAttrComputeCapabilityMajor) == 9 && dims && problem.length < (1 << 30) && (!problem.log_decay || problem.state_heads == problem.key_heads);
}

GroupPlan group_gradients_plan(TileDims tiles, bool gated) {
  return with_group_kernels(tiles, gated, GroupPlan{}, [](auto key, auto value, auto gates) {
    using S = GroupShape<key(), value(), gates()>;
    return GroupPlan{S::SHARED, S::TOKENS};
  });
}

cudaError_t group_gradients_launch(const Gradients &args, bool gated, cudaStream_t stream) {
  return with_group_kernels(tiles_of(args.problem), gated, cudaErrorInvalidValue, [&](auto key, auto value, auto gates) { return launch<key(), value(), gates()>(args, stream); });
}

}  // namespace linattn_pairs
