// architectures: sm_80 compute_80 sm_90
// The gradients of what gated_forward.cu puts out.
#include "pairs/backward_columns.cuh"
#include "pairs/backward_rows.cuh"

namespace linattn_pairs {

cudaError_t gated_backward_launch(const Gradients &args, cudaStream_t stream) {
  return with_gated_tiles(tiles_of(args.problem), [&](auto key, auto value) {
    if (const cudaError_t failed = launch_rows<key(), value(), true>(args, stream)) return failed;
    return launch_columns<key(), value(), true>(args, stream);
  });
}

int gated_backward_shared_bytes(TileDims tiles) {
  return with_gated_tiles(tiles, [](auto key, auto value) { return gradient_shared_bytes<key(), value(), true>(); });
}

}  // namespace linattn_pairs
