// architectures: sm_80 compute_80 sm_90
#include "mma_launch.cuh"
namespace linattn_mma {
LINATTN_MMA_INSTANTIATE(__half, 96)
}
