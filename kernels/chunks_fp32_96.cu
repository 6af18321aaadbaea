// architectures: sm_80 compute_80 sm_90
#include "chunks_launch.cuh"
namespace linattn_chunks {
LINATTN_CHUNKS_INSTANTIATE(float, 96)
}
