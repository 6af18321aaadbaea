// The backward direction in n: dk and dv, one block a (batch, key head, segment), chunk after chunk from the last token to the first.
// With the rows' mass g_i, e_i and 1 / |q_i| from the row kernel, and r_n = 1 / |k_n|, summed over the group's query heads:
//   dv_n  = sum_i (level_i + mixed_i r_n (k_n . q_i)) W_i               level = a / g, mixed = b tau / (|q| g)
//   dk^_n = sum_i (mixed_i (v_n . W_i) + slope_i) q_i                    slope = b tau e / |q|
// Half of the warps take dv, half dk; both need the state R = sum_i mixed_i q_i W_i^T of the later chunks, and its margins.
#pragma once
#include "stream/column_results.cuh"

namespace linattn_stream {

template <typename T, int D, bool GATED>
__global__ void __launch_bounds__(ColumnShape<D>::THREADS, ColumnShape<D>::MIN_BLOCKS) columns_kernel(const __grid_constant__ ColumnArguments args) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const ColumnBlock<T, D, GATED> job(args, shared);
  job.clear();
  ColumnResults<T, D, GATED>(job).run();
}

}  // namespace linattn_stream
