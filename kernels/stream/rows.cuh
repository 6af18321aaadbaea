// The forward direction in n: o (forward) or dq (backward), one block a (batch, key head, segment), chunk after chunk.
//
// Both are the same sums with other names. With x the row operand, y the key operand, z the value operand and r_n = 1 / |k_n|:
//   forward   x = q, y = k, z = v:   o_i  g_i = sum_n (a + alpha_i (x_i . y_n) r_n) z_n           alpha_i = b tau / |q_i|
//   gradient  x = W, y = v, z = k:   dq^_i    = b tau sum_n ((x_i . y_n) / g_i + e_i) r_n z_n
// Inside a chunk through the masked matrix of pairs, before it through the state sum_n r_n y_n z_n^T (float32 in registers, rounded once a chunk).
#pragma once
#include "stream/row_results.cuh"
#include "stream/row_rounds.cuh"
#include "stream/row_state.cuh"

namespace linattn_stream {

// Two kinds of warps: some compute a stripe of 16 rows of results each, the others copy, scale and keep the state, 16 rows of it each.
template <typename T, int D, bool GRAD, bool GATED, RowForm FORM, bool SUMS>
__global__ void __launch_bounds__(RowShape<D, GRAD, GATED, FORM>::THREADS, RowShape<D, GRAD, GATED, FORM>::MIN_BLOCKS) rows_kernel(const __grid_constant__ RowArguments args) {
  using Shape = RowShape<D, GRAD, GATED, FORM>;
  extern __shared__ __align__(1024) unsigned char shared[];
  const RowBlock<T, D, GRAD, GATED, FORM> job(args, shared);
  job.clear();
  using State = std::conditional_t<Shape::kWide, RowRounds<T, D, GATED>, RowState<T, D, GRAD, GATED, FORM, SUMS>>;
  if (warp_number() < Shape::RESULT_WARPS) RowResults<T, D, GRAD, GATED, FORM, SUMS>(job).run();
  else State(job).run();
  if constexpr (GRAD) {
    __syncthreads();
    const int thread = threadIdx.x;
    if (thread < job.heads * 2) {
      float total = 0.f;
      for (int w = 0; w < Shape::STRIPES; ++w) total += job.small.totals[w][thread / 2][thread % 2];
      const int64_t head = static_cast<int64_t>(job.batch) * args.problem.query_heads + job.key_head * job.heads + thread / 2;
      args.partials[(head * args.segments + job.segment) * 2 + thread % 2] = total;
    }
    if constexpr (SUMS)
      if (thread == 0) {
        float count = 0.f;
        for (int stripe = 0; stripe < Shape::STRIPES; ++stripe) count += job.small.counts[stripe];
        job.sums().count() = count;
      }
  }
}

}  // namespace linattn_stream
