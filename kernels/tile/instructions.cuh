// What the kernels say in PTX, or by intrinsics that have no meaning on a host: nothing else does, but for Hopper's warpgroups (warpgroup.cuh).
// tests/emulation has a second form of this file, so that every kernel can run on a CPU.
//
// In a fragment, lane = 4 * group + place: a lane holds rows `group` and `group + 8`, columns 2 * place and 2 * place + 1.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace linattn_tile {

// The same number, of which the compiler knows nothing: what follows from it is made again here, not carried round a loop in registers.
__device__ __forceinline__ int remade(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
__device__ __forceinline__ uint32_t pack_fp16(float low, float high) {
  uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

// Two products of two bfloat16.
__device__ __forceinline__ uint32_t multiply_two(uint32_t x, uint32_t y) {
  const __nv_bfloat162 product = __hmul2(*reinterpret_cast<__nv_bfloat162 *>(&x), *reinterpret_cast<__nv_bfloat162 *>(&y));
  return *reinterpret_cast<const uint32_t *>(&product);
}
// Two products of two float16.
__device__ __forceinline__ uint32_t multiply_two_halves(uint32_t x, uint32_t y) {
  const __half2 product = __hmul2(*reinterpret_cast<__half2 *>(&x), *reinterpret_cast<__half2 *>(&y));
  return *reinterpret_cast<const uint32_t *>(&product);
}

// x * (high + low) of two elements: the second term carries what rounding took from the factor.
template <typename Two> __device__ __forceinline__ uint32_t scale_pair(uint32_t x, uint32_t high, uint32_t low) {
  const Two value = *reinterpret_cast<Two *>(&x), h = *reinterpret_cast<Two *>(&high), l = *reinterpret_cast<Two *>(&low);
  const Two product = __hfma2(value, h, __hmul2(value, l));
  return *reinterpret_cast<const uint32_t *>(&product);
}

// sum += A B: A 16 x 16 by rows, B 16 x 8 by columns.
__device__ __forceinline__ void mma_bf16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_fp16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- shared memory

__device__ __forceinline__ uint32_t shared_address(const void *pointer) { return static_cast<uint32_t>(__cvta_generic_to_shared(pointer)); }

__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
// The inverse of ldmatrix.
__device__ __forceinline__ void stmatrix(uint32_t address, const uint32_t (&r)[4], int lane) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
#else
  // Lane l's address is that of row l % 8 of corner l / 8: each lane asks those of the rows it holds.
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t row = __shfl_sync(0xffffffffu, address, 8 * i + (lane >> 2));
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(row + 4 * (lane & 3)), "r"(r[i]) : "memory");
  }
#endif
}

// Zeros where not `valid`.
__device__ __forceinline__ void copy_async(uint32_t shared, const void *global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copy_number_async(uint32_t shared, const float *global, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(global), "r"(valid ? 4 : 0) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

// ---- barriers between some of a block's warps; the arriving ones go on at once. Number 0 is __syncthreads.

enum Barrier { kScalesReady = 1, kScalesShared, kStateRead, kHalvesExchanged, kRowsWeighed, kFirstGroup, kSecondGroup };
template <Barrier NUMBER, int THREADS> __device__ __forceinline__ void barrier_sync() { asm volatile("bar.sync %0, %1;" ::"n"(static_cast<int>(NUMBER)), "n"(THREADS) : "memory"); }
template <Barrier NUMBER, int THREADS> __device__ __forceinline__ void barrier_arrive() {
  asm volatile("bar.arrive %0, %1;" ::"n"(static_cast<int>(NUMBER)), "n"(THREADS) : "memory");
}
// The same of a number that only the running kernel knows.
template <int THREADS> __device__ __forceinline__ void barrier_sync(int number) { asm volatile("bar.sync %0, %1;" ::"r"(number), "n"(THREADS) : "memory"); }
template <int THREADS> __device__ __forceinline__ void barrier_arrive(int number) { asm volatile("bar.arrive %0, %1;" ::"r"(number), "n"(THREADS) : "memory"); }

// ---- fast functions: a few units in the last place of float32

__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal_root(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float log2_fast(float x) { return __log2f(x); }
__device__ __forceinline__ void sine_and_cosine_fast(float x, float &sine, float &cosine) { __sincosf(x, &sine, &cosine); }

}  // namespace linattn_tile

namespace linattn {

// To 11 bits, to the nearest.
__device__ __forceinline__ float round_to_tf32(float x) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(x));
  return __uint_as_float(rounded);
}

// sum += A B: A 16 x 8 by rows, B 8 x 8 by columns. The factors' lower 13 bits are not read.
__device__ __forceinline__ void mma_tf32(float (&sum)[4], const float (&a)[4], const float (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
}

}  // namespace linattn
