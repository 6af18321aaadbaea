// The gradient of a decay is a running sum of small differences, of rows' sums of A dA and of columns', which were rounded each for itself; what they differ by would be counted at
// every token before. So what reaches over an edge between chunks is found out where it can be, and the first token of what lies between two such edges takes what its
// sums are away from it.
// - Where nothing reaches over a whole chunk on either side of an edge, the rows behind it and the columns before it sum up the same pairs out of their states: their mean.
// - Every few chunks the states of both passes are multiplied: sum A dA over the pairs with a key before the edge and a query behind it.
#pragma once
#include "pairs/running.cuh"
#include "pairs/state_sums.cuh"

namespace linattn_pairs {

__device__ __forceinline__ bool is_known(double flow) { return flow == flow; }

// One block an edge whose states are kept, as the keepers' registers have them.
__global__ void __launch_bounds__(kKeepers) running_edges_kernel(const __grid_constant__ Running args) {
  __shared__ double parts[kKeepers / 32];
  const RunningFlow &flow = args.flow;
  const int64_t edge = blockIdx.x, pair = edge / flow.edges, number = edge % flow.edges;
  const float *const before = flow.states[0] + edge * kStartFloats + threadIdx.x, *const behind = flow.states[1] + edge * kStartFloats + threadIdx.x;
  double all = 0;
  const auto product = [&](int i) { return static_cast<double>(before[i * kKeepers]) * behind[i * kKeepers]; };
#pragma unroll 8
  for (int i = 0; i < 136; ++i) all += (i / 32 == 1 ? 2.0 : 1.0) * product(i);  // pairs of two blocks of features, once each, among them; then masses
  if (threadIdx.x % 4 == 0) all += product(136) + product(138);  // lines: the other lanes have the same
  const double counts[2] = {over_place(before[140 * kKeepers]), over_place(behind[140 * kKeepers])};
  if (threadIdx.x % 32 == 0) all += counts[0] * counts[1];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) all += __shfl_xor_sync(0xffffffffu, all, step);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = all;
  __syncthreads();
  if (threadIdx.x == 0) flow.known[pair * args.chunks + (number + 1) * kRunEdgeChunks] = parts[0] + parts[1] + parts[2] + parts[3];
}

// One warp a chunk: its sums, and what reaches over the edge before it, NaN where nobody knows.
__global__ void __launch_bounds__(kReaders) running_chunks_kernel(const __grid_constant__ Running args) {
  constexpr float kNothing = 0x1p-9f;  // of what rounding leaves
  const Gradients &g = args.of;
  const linattn_problem &p = g.problem;
  const RunningFlow &flow = args.flow;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * (kReaders / 32) + threadIdx.x / 32, pair = index / args.chunks;
  if (index >= static_cast<int64_t>(p.batch) * p.key_heads * args.chunks) return;
  const int chunk = static_cast<int>(index % args.chunks), heads = p.query_heads / p.key_heads, lane = threadIdx.x % 32, batch = static_cast<int>(pair / p.key_heads);
  const int64_t begin = static_cast<int64_t>(chunk) * kRunTokens, end = min(begin + kRunTokens, p.length);
  double sum = 0, over = 0;
#pragma unroll
  for (int i = 0; i < kRunTokens / 32; ++i) {
    const int64_t token = begin + lane + 32 * i;
    if (token >= end) continue;
    sum -= g.column_sums[pair * p.length + token];
    for (int head = 0; head < heads; ++head) sum += g.row_sums[(pair * heads + head) * p.length + token];
  }
  if (chunk > 0 && lane < kWarps) {
    over = flow.columns[(index - 1) * kWarps + lane];
    for (int head = 0; head < heads; ++head) over += flow.rows[((pair * heads + head) * args.chunks + chunk) * kWarps + lane];
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step), over += __shfl_xor_sync(0xffffffffu, over, step);
  if (lane > 0) return;
  const int first_head = static_cast<int>(pair % p.key_heads) * heads;
  const float rate = exp2_fast(static_cast<float>(log2_rate(g, first_head) * kRunTokens));
  const bool near = kept_of(g, batch, first_head, chunk) * rate <= kNothing && (chunk == 0 || kept_of(g, batch, first_head, chunk - 1) * rate <= kNothing);
  flow.chunks[index] = sum;
  if (chunk == 0) flow.known[index] = 0;
  else if (near) flow.known[index] = 0.5 * over;
  else if (chunk % kRunEdgeChunks != 0) flow.known[index] = NAN;
}

// One thread a chunk that begins at an edge over which it is known what reaches: the chunks from there to the next one.
__global__ void __launch_bounds__(kReaders) running_correction_kernel(const __grid_constant__ Running args) {
  const linattn_problem &p = args.of.problem;
  const RunningFlow &flow = args.flow;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kReaders + threadIdx.x, pair = index / args.chunks;
  if (pair >= static_cast<int64_t>(p.batch) * p.key_heads || !is_known(flow.known[index])) return;
  const int64_t last = (pair + 1) * args.chunks;
  double sum = flow.chunks[index];
  int64_t next = index + 1;
  for (; next < last && !is_known(flow.known[next]); ++next) sum += flow.chunks[next];
  const double wanted = flow.known[index] - (next < last ? flow.known[next] : 0.0);
  args.of.row_sums[pair * (p.query_heads / p.key_heads) * p.length + index % args.chunks * kRunTokens] += static_cast<float>(wanted - sum);
}

}  // namespace linattn_pairs
