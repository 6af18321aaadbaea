// kernels/tile/bulk.cuh on a CPU: bytes are NaN from when they are asked for until somebody waits for the barrier that they are promised to.
#pragma once
#include "tile/tile.cuh"

namespace linattn_tile {

struct TensorMap {
  linattn_tensor tensor;
  int64_t length;
  int columns;
};

template <int D> cudaError_t map_tensor(TensorMap &result, const linattn_tensor &tensor, int, int, int64_t length, int columns) {
  result = {tensor, length, columns};
  return cudaSuccess;
}

// One kernel after the other.
template <typename... Given> cudaError_t launch_early(void (*kernel)(Given...), int blocks, int threads, int, cudaStream_t, const Given &...given) {
  emulation::launch(dim3(blocks), threads, [&] { kernel(given...); });
  return cudaSuccess;
}
inline void let_next_begin() {}
inline void wait_for_kernel_before() {}

inline void bulk_barrier(uint32_t barrier, int arrivals) { emulation::block->turns[barrier] = {arrivals}; }
inline void bulk_barriers_made() {}
inline void bulk_arrive(uint32_t barrier) { emulation::turn(barrier).arrive(0); }
inline void bulk_arrive_with(uint32_t barrier, int bytes) { emulation::turn(barrier).arrive(bytes); }
inline void bulk_wait(uint32_t barrier, int parity) { emulation::wait_for_turn(barrier, parity); }

inline void bulk_copy(uint32_t shared, const void *global, int bytes, uint32_t barrier) {
  emulation::require(shared % 16 == 0 && bytes % 16 == 0 && shared + bytes <= emulation::kShared, "a bulk copy goes outside of shared memory, or is not of 16 bytes");
  emulation::require(reinterpret_cast<uintptr_t>(global) % 16 == 0, "a bulk copy begins off its boundary");
  std::memset(emulation::shared_memory + shared, 0xff, bytes);
  emulation::turn(barrier).copies.push_back({shared, global, bytes});
}
template <int D> void bulk_copy_tile(uint32_t tile, const TensorMap &from, int64_t row, int head, int batch, uint32_t barrier) {
  const char *const begin = static_cast<const char *>(from.tensor.data) + 2 * (batch * from.tensor.batch_stride + head * from.tensor.head_stride);
  emulation::require(tile % 1024 == 0, "a tile begins off its boundary");
  for (int i = 0; i < 64; ++i)
    for (int piece = 0; piece < D / 8; ++piece) {
      const uint32_t to = tile + Tile<D>::at(i, piece);
      const bool real = row + i < from.length && 8 * piece < from.columns;
      std::memset(emulation::shared_memory + to, 0xff, 16);
      emulation::turn(barrier).copies.push_back({to, real ? begin + 2 * ((row + i) * from.tensor.token_stride + 8 * piece) : nullptr, 16});
    }
}

}  // namespace linattn_tile
