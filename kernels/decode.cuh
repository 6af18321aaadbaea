// What one new token a sequence and several have in common. The state S (F, Dv + 1) of each head takes tokens in, one after the other:
//   S <- exp(log_decay) S + psi(k) [v, 1]^T,   num_h = phi_h(q)^T S for each query head h of the state,   out_h = num_h / (its last element).
// A block has some rows of a state, a warp of it every eighth of them, a lane its columns. Where heads are few and rows many, several blocks
// share a state's rows, and a second kernel adds up what they found, in a fixed order.
#pragma once
#include <algorithm>

#include "card.h"
#include "generic/job.cuh"
#include "plan.h"

namespace linattn {

constexpr int WARPS = THREADS / 32, HEADS_AT_ONCE = 8;
constexpr int FEWEST_ROWS = 64;             // that are worth a block of their own
constexpr float SMALLEST_SQUARE = 1e-24f;  // |x| <= 1e-12 has no direction: its unit vector is zero

struct StepArguments {
  linattn_problem problem;
  linattn_tensor out;
  const float *before;      // the state, or null: zeros
  float *after;             // behind the tokens, in the same place or another; or null: not asked for
  float *mass, *partials;   // partials: (batch, query_heads, length, splits, value_dim + 1), with several blocks a state
  int32_t features, splits, rows_each;
  int32_t group, key_group;  // query heads of a state, and states of a key head: divisions are long on the device
};

// What a block works on.
struct Place {
  int batch, head, split;  // of which sequence, which head's state, and which part of its rows
  __device__ __forceinline__ Place() : batch(blockIdx.x), head(blockIdx.y), split(blockIdx.z) {}
};
static __device__ __forceinline__ int key_head_of(const StepArguments &args, int head) { return args.key_group == 1 ? head : head / args.key_group; }
inline dim3 blocks_of(const StepArguments &args) { return dim3(args.problem.batch, args.problem.state_heads, args.splits); }

inline int feature_count(const linattn_problem &p) { return p.head_dim + 1 + (p.degree == 2 ? p.head_dim * (p.head_dim + 1) / 2 : 0); }

// The parts of a plan that say how a state's rows are shared among blocks.
inline void plan_splits(const linattn_problem &p, int splits, linattn_plan &plan) {
  plan.segments = splits, plan.chunk = (feature_count(p) + splits - 1) / splits;  // of the state's rows here
  plan.workspace_bytes = splits == 1 ? 0 : 4 * static_cast<int64_t>(p.batch) * p.query_heads * p.length * splits * (p.value_dim + 1);
}

inline StepArguments step_arguments(const linattn_problem &p, const linattn_forward_result &result, const float *before, const linattn_plan &plan) {
  const int32_t rows = static_cast<int32_t>(plan.chunk), group = p.query_heads / p.state_heads, key_group = p.state_heads / p.key_heads;
  return {p, result.out, before, result.state, result.mass, static_cast<float *>(p.workspace), feature_count(p), plan.segments, rows, group, key_group};
}

static __device__ float warp_sum(float x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

// The run of tokens that the state is of behind a token; whether a token is taken in; and whether its query sees the state behind it.
static __device__ int run_of(const linattn_problem &p, int batch, int token) { return p.key_segments ? abs(p.key_segments[batch * p.key_segments_stride + token]) : 0; }
static __device__ bool is_taken(const linattn_problem &p, int batch, int token) { return !p.key_segments || p.key_segments[batch * p.key_segments_stride + token] > 0; }
static __device__ bool sees(const linattn_problem &p, int batch, int token) {
  if (!p.query_segments) return true;
  const int run = p.query_segments[batch * p.query_segments_stride + token];
  return run > 0 && run == run_of(p, batch, token);
}

// Adds up what the blocks of a state found for a token and query head, and divides. A thread has a column and some of the blocks, of which it adds
// up the sum of weights as well, since waiting for another thread's would take longer.
inline __host__ __device__ int columns_of_join(int value_dim) { return (value_dim + 31) / 32 * 32; }
static __global__ void __launch_bounds__(THREADS) join_kernel(const StepArguments args) {
  constexpr int AT_ONCE = 12;        // blocks of a thread: all of a state's, where heads of 64 have as many as there are
  __shared__ float2 found[THREADS];  // of a column's sum, and of the weights'
  const linattn_problem &p = args.problem;
  const int batch = blockIdx.x, head = blockIdx.y, token = blockIdx.z, width = p.value_dim + 1, columns = columns_of_join(p.value_dim);
  const int64_t number = (static_cast<int64_t>(batch) * p.query_heads + head) * p.length + token;
  const int splits = sees(p, batch, token) ? args.splits : 0;  // what a query that sees nothing would read was not written
  const int column = threadIdx.x % columns, parts = blockDim.x / columns;
  float sum = 0.f, total = 0.f;
  const float *part = args.partials + (number * args.splits + threadIdx.x / columns) * width;
#pragma unroll 1
  for (int split = threadIdx.x / columns; split < splits; split += AT_ONCE * parts) {
    float of_column[AT_ONCE], of_weights[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i, part += parts * width) {
      const bool is_there = split + i * parts < splits;
      of_column[i] = is_there && column < p.value_dim ? part[column] : 0.f, of_weights[i] = is_there ? part[p.value_dim] : 0.f;
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) sum += of_column[i], total += of_weights[i];
  }
  found[threadIdx.x] = make_float2(sum, total);
  __syncthreads();
  if (threadIdx.x >= p.value_dim) return;
#pragma unroll 1
  for (int other = 1; other < parts; ++other) sum += found[other * columns + column].x, total += found[other * columns + column].y;
  store(args.out.data, p.dtype, offset_of(args.out, batch, head, token) + column, sum / (total == 0.f ? 1.f : total));
  if (column == 0 && args.mass) args.mass[number] = total;
}

// Behind the kernel that took the tokens in.
inline cudaError_t launch_join(const StepArguments &args, cudaStream_t stream) {
  const linattn_problem &p = args.problem;
  if (const cudaError_t failed = cudaPeekAtLastError()) return failed;
  const int columns = columns_of_join(p.value_dim), threads = THREADS / columns * columns;
  if (args.splits > 1) join_kernel<<<dim3(p.batch, p.query_heads, static_cast<unsigned>(p.length)), threads, 0, stream>>>(args);
  return cudaPeekAtLastError();
}

}  // namespace linattn
