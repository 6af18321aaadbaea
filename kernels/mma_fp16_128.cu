#include "mma_launch.cuh"
namespace linattn_mma {
LINATTN_MMA_INSTANTIATE(__half, 128)
}
