// What a row has gathered, as it is written: divided by its mass, or brought back through the length of its vector.
#pragma once
#include "chunks/sum.cuh"

namespace linattn_chunks {

// What a lane's two rows (group and group + 8) sum to over the lanes that share them.
__device__ __forceinline__ void over_row(float (&x)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    x[half] += __shfl_xor_sync(0xffffffffu, x[half], 1);
    x[half] += __shfl_xor_sync(0xffffffffu, x[half], 2);
  }
}
// Two neighbours as memory has them, and as numbers.
__device__ __forceinline__ float2 both_of(const float *x) { return *reinterpret_cast<const float2 *>(x); }
__device__ __forceinline__ uint32_t both_of(const __nv_bfloat16 *x) { return *reinterpret_cast<const uint32_t *>(x); }
__device__ __forceinline__ float2 apart(float2 both) { return both; }
__device__ __forceinline__ float2 apart(uint32_t both) { return make_float2(Element<__nv_bfloat16>::low(both), Element<__nv_bfloat16>::high(both)); }
template <typename T> __device__ __forceinline__ float2 two_of(const T *x) { return apart(both_of(x)); }
__device__ __forceinline__ void put_two(float *to, float x, float y) { *reinterpret_cast<float2 *>(to) = make_float2(x, y); }
__device__ __forceinline__ void put_two(__nv_bfloat16 *to, float x, float y) { *reinterpret_cast<uint32_t *>(to) = pack_bf16(x, y); }

// Where a lane's two rows lie, row0 and row0 + 8 of those from `begin` on.
struct LaneRows {
  int place, row0, rows, batch, head;
  int64_t begin, first_number;  // of the first row: in its head, and among the masses and e
};

// `sums` gets what the lane's rows of kQuery add to the coefficients' gradients: sums of dA, and of dA times products.
template <typename T, int D, Role ROLE>
__device__ __forceinline__ void put_results(const linattn_problem &problem, const Written &written, const LaneRows &at, float b_tau, float (&acc)[D / 8][4], float (&total)[2],
                                            float (&sums)[2]) {
  constexpr int BLOCKS = D / 16;
  if constexpr (kTotals<ROLE>) over_row(total);
  float finish[2] = {1.f, 1.f}, along[2] = {0.f, 0.f};
  // A lane's part of q or k is read once, all of it before anything waits or is written.
  decltype(both_of(static_cast<const T *>(nullptr))) own[kAcross<ROLE> ? 2 * BLOCKS : 1][2];
  if constexpr (kAcross<ROLE>) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = at.row0 + 8 * half;
      const T *const from = head_of<const T>(written.grad_of, at.batch, at.head) + (at.begin + (row < at.rows ? row : 0)) * written.grad_of.token_stride + 2 * at.place;
#pragma unroll
      for (int n = 0; n < 2 * BLOCKS; ++n) own[n][half] = both_of(from + 8 * n);
    }
  }
  T *to_rows[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = at.row0 + 8 * half;
    to_rows[half] = head_of<T>(written.result, at.batch, at.head) + (at.begin + row) * written.result.token_stride;
    if constexpr (ROLE == Role::kOut) {
      if (at.place == 0 && row < at.rows) written.mass[at.first_number + row] = total[half];
      finish[half] = total[half] == 0.f ? 1.f : 1.f / total[half];
    }
  }
  if constexpr (kAcross<ROLE>) {
    float square[2] = {0.f, 0.f};
#pragma unroll
    for (int n = 0; n < 2 * BLOCKS; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 x = apart(own[n][half]);
        square[half] = fmaf(x.x, x.x, fmaf(x.y, x.y, square[half]));
        along[half] = fmaf(x.x, acc[n][2 * half], fmaf(x.y, acc[n][2 * half + 1], along[half]));
      }
    over_row(square);
    over_row(along);
    float dot[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float inverse = problem.normalize_qk ? inverse_length(square[half]) : 1.f;
      dot[half] = along[half] * inverse;
      along[half] *= problem.normalize_qk ? inverse * inverse : 0.f;
      finish[half] = b_tau * inverse;
    }
    if constexpr (ROLE == Role::kQuery) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (at.row0 + 8 * half < at.rows) sums[0] += total[half], sums[1] += dot[half];
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (at.row0 + 8 * half >= at.rows) continue;
#pragma unroll
    for (int n = 0; n < 2 * BLOCKS; ++n) {
      float left = acc[n][2 * half], right = acc[n][2 * half + 1];
      if constexpr (kAcross<ROLE>) {
        const float2 x = apart(own[n][half]);
        left = fmaf(-x.x, along[half], left), right = fmaf(-x.y, along[half], right);
      }
      put_two(to_rows[half] + 8 * n + 2 * at.place, left * finish[half], right * finish[half]);
    }
  }
}

// A block's part of both sums, from what the four lanes of each row hold alike.
template <int WARPS> __device__ __forceinline__ void put_sums(float (&sums)[2], float (&totals)[WARPS][2], float *partials, int warp, int lane_id) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int step = 4; step < 32; step *= 2) sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], step);
    if (lane_id == 0) totals[warp][i] = sums[i];
  }
  __syncthreads();
  if (threadIdx.x < 2) {
    float sum = 0.f;
    for (int w = 0; w < WARPS; ++w) sum += totals[w][threadIdx.x];
    partials[threadIdx.x] = sum;
  }
}

}  // namespace linattn_chunks
