// architectures: compute_80 sm_90a
#include "chunks_launch.cuh"
namespace linattn_chunks {
LINATTN_CHUNKS_INSTANTIATE(float, 128)
}
