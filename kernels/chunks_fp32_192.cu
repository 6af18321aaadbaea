#include "chunks_launch.cuh"
namespace linattn_chunks {
LINATTN_CHUNKS_INSTANTIATE(float, 192)
}
