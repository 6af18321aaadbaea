// architectures: sm_80 compute_80 sm_90
// The outputs of weights that a decay or runs of tokens multiply, or whose keys are narrower than their values.
#include "pairs/forward.cuh"

namespace linattn_pairs {

using T = __nv_bfloat16;

cudaError_t gated_forward_launch(const Arguments &args, cudaStream_t stream) {
  return with_gated_tiles(tiles_of(args.problem), [&](auto key, auto value) { return launch_forward<T, key(), value(), true>(args, stream); });
}

int gated_forward_shared_bytes(TileDims tiles) {
  return with_gated_tiles(tiles, [](auto key, auto value) -> int { return ForwardShape<T, key(), value(), true>::SHARED; });
}

}  // namespace linattn_pairs
