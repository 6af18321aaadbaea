// What of A dA reaches over the edges between chunks, for the gradient of a decay: that is a running sum of small differences, of rows' sums out of S and of columns' sums out of
// R, which were rounded each for itself, and what they differ by would be counted at every token before.
// - Where nothing reaches over a whole chunk on either side of an edge, the rows behind it and the columns before it sum up the same pairs: both become their mean.
// - Elsewhere both states are multiplied every few chunks: sum A dA over the pairs with a key before the edge and a query behind it. What the running sum is away from that, its
//   chunks' first token takes.
#pragma once
#include "pairs/state_sums.cuh"

namespace linattn_pairs {

constexpr int kFlowThreads = 256;

// S of an edge, since R takes its place.
template <int K, int V> __global__ void __launch_bounds__(kFlowThreads) keep_edges_kernel(const __grid_constant__ StateArguments args) {
  using S = FeatureState<K, V>;
  constexpr int kRowPieces = S::ROWS * V / 8, kPieces = kRowPieces + S::COUNT / 4 + 1;  // the last is the count alone: behind it nothing is written
  const int64_t edge = blockIdx.y, record = edge / args.edges * args.chunks + (edge % args.edges + 1) * kEdgeChunks;
  const float *const columns = args.columns + record * S::FLOATS;
  float *const kept = args.edge_columns + edge * S::FLOATS;
  for (int i = blockIdx.x * kFlowThreads + threadIdx.x; i < kPieces; i += gridDim.x * kFlowThreads) {
    if (i < kRowPieces) reinterpret_cast<uint4 *>(args.edge_rows + edge * S::ROWS * V)[i] = reinterpret_cast<const uint4 *>(args.rows + record * S::ROWS * V)[i];
    else if (i + 1 < kPieces) reinterpret_cast<float4 *>(kept)[i - kRowPieces] = reinterpret_cast<const float4 *>(columns)[i - kRowPieces];
    else kept[S::COUNT] = columns[S::COUNT];
  }
}

__device__ __forceinline__ double flow_sum(double x, double *parts) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  double sum = 0;
  for (int warp = 0; warp < kFlowThreads / 32; ++warp) sum += parts[warp];
  return sum;
}

// One block an edge. Values are as far from their mean as S has them; a pair of two blocks is in both states twice, and counts twice.
template <int K, int V> __global__ void __launch_bounds__(kFlowThreads) flow_kernel(const __grid_constant__ StateArguments args) {
  using E = Element<__nv_bfloat16>;
  using S = FeatureState<K, V>;
  __shared__ double parts[kFlowThreads / 32];
  const int64_t edge = blockIdx.x, record = edge / args.edges * args.chunks + (edge % args.edges + 1) * kEdgeChunks - 1;
  const __nv_bfloat16 *const left = args.edge_rows + edge * S::ROWS * V, *const right = args.rows + record * S::ROWS * V;
  const float *const left_columns = args.edge_columns + edge * S::FLOATS, *const right_columns = args.columns + record * S::FLOATS, *const mean = left_columns + S::VALUES;
  double all = 0;
  for (int i = threadIdx.x; i < S::ROWS * V / 2; i += kFlowThreads) {
    const int row = 2 * i / V, column = 2 * i % V;
    int block = 0;
    while (block + 1 < S::BLOCKS && row / 16 >= S::first_item(block + 1)) ++block;
    const float share = row < S::PAIRS && row / 16 - S::first_item(block) < 16 * block ? 0.5f : 1.f, mass = left_columns[row];
    const uint32_t x = reinterpret_cast<const uint32_t *>(left)[i], y = reinterpret_cast<const uint32_t *>(right)[i];
    float sum = (E::low(x) + mass * mean[column]) * E::low(y) + (E::high(x) + mass * mean[column + 1]) * E::high(y);
    if (column == 0) sum += mass * right_columns[row];
    all += static_cast<double>(share * sum);
  }
  for (int i = threadIdx.x; i <= V; i += kFlowThreads) all += static_cast<double>(left_columns[S::COUNT]) * right_columns[S::VALUES + i] * (i < V ? mean[i] : 1.f);
  all = flow_sum(all, parts);
  if (threadIdx.x == 0) args.flows[edge] = all;
}

// One block a chunk but the first, between the readers and the kernels of pairs: the first row of the chunk and the last column of the one before take what their sums are
// away from the mean.
__global__ void __launch_bounds__(kFlowThreads) flow_mean_kernel(const __grid_constant__ StateArguments args) {
  constexpr float kNothing = 0x1p-9f;  // of what rounding leaves
  __shared__ double parts[2][kFlowThreads / 32];
  const Gradients &g = args.of;
  const linattn_problem &p = g.problem;
  const int pair = blockIdx.x / (args.chunks - 1), chunk = blockIdx.x % (args.chunks - 1) + 1, batch = pair / p.key_heads, heads = p.query_heads / p.key_heads;
  const int first_head = pair % p.key_heads * heads;
  if (kept_of(g, batch, first_head, chunk) > kNothing || kept_of(g, batch, first_head, chunk - 1) > kNothing) return;
  const int64_t begin = chunk * g.chunk, end = min(begin + g.chunk, p.length), first_row = static_cast<int64_t>(pair) * heads * p.length;
  double rows = 0, columns = 0;
  for (int64_t token = begin + threadIdx.x; token < end; token += kFlowThreads)
    for (int head = 0; head < heads; ++head) rows += g.row_sums[first_row + head * p.length + token];
  for (int64_t token = begin - g.chunk + threadIdx.x; token < begin; token += kFlowThreads) columns += g.column_sums[pair * p.length + token];
  rows = flow_sum(rows, parts[0]), columns = flow_sum(columns, parts[1]);
  if (threadIdx.x > 0) return;
  const double mean = 0.5 * (rows + columns);
  g.row_sums[first_row + begin] += static_cast<float>(mean - rows), g.column_sums[pair * p.length + begin - 1] += static_cast<float>(mean - columns);
  if (chunk % kEdgeChunks == 0) args.flows[static_cast<int64_t>(pair) * args.edges + chunk / kEdgeChunks - 1] = mean;
}

// One block for the chunks between two edges, the beginning and the end of the sequence counting as edges that nothing reaches over.
__global__ void __launch_bounds__(kFlowThreads) flow_correction_kernel(const __grid_constant__ StateArguments args) {
  __shared__ double parts[kFlowThreads / 32];
  const Gradients &g = args.of;
  const linattn_problem &p = g.problem;
  const int64_t pair = blockIdx.x / (args.edges + 1), stretch = blockIdx.x % (args.edges + 1), begin = stretch * kEdgeChunks * g.chunk;
  const int64_t end = stretch < args.edges ? begin + kEdgeChunks * g.chunk : p.length;
  const int heads = p.query_heads / p.key_heads;
  double sum = 0;
  for (int64_t token = begin + threadIdx.x; token < end; token += kFlowThreads) {
    sum -= g.column_sums[pair * p.length + token];
    for (int head = 0; head < heads; ++head) sum += g.row_sums[(pair * heads + head) * p.length + token];
  }
  sum = flow_sum(sum, parts);
  if (threadIdx.x > 0) return;
  const double *const flows = args.flows + pair * args.edges;
  const double wanted = (stretch > 0 ? flows[stretch - 1] : 0.0) - (stretch < args.edges ? flows[stretch] : 0.0);
  g.row_sums[pair * heads * p.length + begin] += static_cast<float>(wanted - sum);
}

}  // namespace linattn_pairs
