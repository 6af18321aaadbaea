// Hopper's bulk copies: one thread asks for a tile of rows, or for bytes, and a barrier in shared memory tells all who wait when they are here.
// And kernels that begin beside the end of the one before. tests/emulation has a second form of this file.
#pragma once
#include <cuda.h>

#include "tile/tile.cuh"

namespace linattn_tile {

// A tensor (B, H, N, columns) of 16-bit numbers as copies of tiles take it.
struct TensorMap {
  CUtensorMap map;
};

using EncodeTensorMap = CUresult (*)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *, const cuuint64_t *, const cuuint32_t *, const cuuint32_t *,
                                     CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's function, null where it has none: the library is not linked against the driver, so that it loads where there is none.
inline EncodeTensorMap find_encode() {
  void *found = nullptr;
  cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
  const cudaError_t failed = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
  const cudaError_t failed = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
  return failed || result != cudaDriverEntryPointSuccess ? nullptr : reinterpret_cast<EncodeTensorMap>(found);
}

// For tiles Tile<D> of 64 rows; what lies outside of the tensor reads as zero. Of a head or batch stride of 0 only number 0 may be asked for; rows have none.
template <int D> cudaError_t map_tensor(TensorMap &result, const linattn_tensor &tensor, int batch, int heads, int64_t length, int columns) {
  static const EncodeTensorMap encode = find_encode();
  if (!encode) return cudaErrorNotSupported;
  constexpr int kColumns = D > 64 ? 64 : D;
  const auto count = [](int64_t stride, int64_t of) { return static_cast<cuuint64_t>(stride ? of : 1); };
  const auto bytes = [](int64_t stride) { return static_cast<cuuint64_t>(stride ? 2 * stride : 16); };
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(length), count(tensor.head_stride, heads), count(tensor.batch_stride, batch)};
  const cuuint64_t strides[3] = {bytes(tensor.token_stride), bytes(tensor.head_stride), bytes(tensor.batch_stride)};
  const cuuint32_t box[4] = {kColumns, 64, 1, 1}, steps[4] = {1, 1, 1, 1};
  constexpr CUtensorMapSwizzle kSwizzle = kColumns == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : kColumns == 32 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_32B;
  return encode(&result.map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, tensor.data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, kSwizzle,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE)
             ? cudaErrorInvalidValue
             : cudaSuccess;
}

// A launch whose blocks may begin as soon as all of the kernel before have begun and said so, or ended. What they read before they wait must have been
// there when that kernel began: it is one of ours, launched as any other.
template <typename... Given> cudaError_t launch_early(void (*kernel)(Given...), int blocks, int threads, int shared, cudaStream_t stream, const Given &...given) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization, early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks), config.blockDim = dim3(threads), config.dynamicSmemBytes = shared, config.stream = stream, config.attrs = &early, config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, given...);
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
// Said by a kernel: the next one may begin.
__device__ __forceinline__ void let_next_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
// Until the kernel before has ended, and what it has written is seen.
__device__ __forceinline__ void wait_for_kernel_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
// A barrier of 8 bytes opens once as often as `arrivals` and the bytes that were promised are here; what comes next is of the next turn.
__device__ __forceinline__ void bulk_barrier(uint32_t barrier, int arrivals) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory"); }
// Between the making of barriers and the block's barrier behind which they are used.
__device__ __forceinline__ void bulk_barriers_made() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void bulk_arrive(uint32_t barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory"); }
__device__ __forceinline__ void bulk_arrive_with(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Until the turn of this parity is over.
__device__ __forceinline__ void bulk_wait(uint32_t barrier, int parity) {
  asm volatile("{.reg .pred over; AGAIN: mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1; @!over bra AGAIN;}" ::"r"(barrier), "r"(parity) : "memory");
}
// 64 rows of a head from `row` on, into a Tile<D>.
template <int D> __device__ __forceinline__ void bulk_copy_tile(uint32_t tile, const TensorMap &from, int64_t row, int head, int batch, uint32_t barrier) {
#pragma unroll
  for (int panel = 0; panel < (D + 63) / 64; ++panel)
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(tile + panel * Tile<D>::kPanelBytes),
                 "l"(&from.map), "r"(64 * panel), "r"(static_cast<int>(row)), "r"(head), "r"(batch), "r"(barrier)
                 : "memory");
}
// A multiple of 16 bytes.
__device__ __forceinline__ void bulk_copy(uint32_t shared, const void *global, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared), "l"(global), "r"(bytes), "r"(barrier) : "memory");
}
#else
__device__ __forceinline__ void let_next_begin() {}
__device__ __forceinline__ void wait_for_kernel_before() {}
__device__ __forceinline__ void bulk_barrier(uint32_t, int) {}
__device__ __forceinline__ void bulk_barriers_made() {}
__device__ __forceinline__ void bulk_arrive(uint32_t) {}
__device__ __forceinline__ void bulk_arrive_with(uint32_t, int) {}
__device__ __forceinline__ void bulk_wait(uint32_t, int) {}
template <int D> __device__ __forceinline__ void bulk_copy_tile(uint32_t, const TensorMap &, int64_t, int, int, uint32_t) {}
__device__ __forceinline__ void bulk_copy(uint32_t, const void *, int, uint32_t) {}
#endif

}  // namespace linattn_tile
