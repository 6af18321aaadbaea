#include "mma_launch.cuh"
namespace linattn_mma {
LINATTN_MMA_INSTANTIATE(__nv_bfloat16, 32)
}
