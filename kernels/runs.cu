// architectures: sm_80 compute_80 sm_90
// What kernels are told of packed sequences and padding: runs of tokens, made of a caller's numbers of segments, and a decay that is 0 at padding.
// What they say is that of hf_linattn/ops/segments.py and decay.py; both together are one launch. Numbers that are none are refused by what
// PyTorch asserts by as well, since Python would have to wait for them: its next call raises "device-side assert triggered".
#include <assert.h>
#include <cuda_runtime.h>

#include "runs.h"

namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kEach = 8, kTokens = kThreads * kEach;  // tokens of a thread, side by side, and of a block
constexpr int32_t kMost = 0x7fffffff;
constexpr uint32_t kAll = 0xffffffffu;

// Every thread gets what `better` leaves of all threads' x.
template <typename Better> __device__ int32_t of_block(int32_t x, Better better) {
  __shared__ int32_t parts[kWarps];
  for (int step = 16; step > 0; step /= 2) x = better(x, __shfl_xor_sync(kAll, x, step));
  __syncthreads();
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  x = parts[0];
  for (int warp = 1; warp < kWarps; ++warp) x = better(x, parts[warp]);
  return x;
}

// The highest x of the threads before this one, 0 of none; x is not below 0.
__device__ int32_t highest_before(int32_t x) {
  __shared__ int32_t parts[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int step = 1; step < 32; step *= 2) {
    const int32_t other = __shfl_up_sync(kAll, x, step);
    if (lane >= step) x = max(x, other);
  }
  if (lane == 31) parts[warp] = x;
  __syncthreads();
  x = __shfl_up_sync(kAll, x, 1);
  if (lane == 0) x = 0;
  for (int w = 0; w < warp; ++w) x = max(x, parts[w]);
  return x;
}

__host__ __device__ inline int blocks_of(int64_t length, int tokens) { return static_cast<int>((length + tokens - 1) / tokens); }

// A block has kTokens of a row, and looks itself for what it has to know of the others: the highest number before them, and where there is none, and they begin with
// padding, the lowest behind. A row is seldom longer than a block has tokens.
template <typename T> __device__ void make_runs(const linattn_segments &from, int block, int32_t *runs) {
  const int blocks = blocks_of(from.length, kTokens);
  const int64_t row = block / blocks, begin = static_cast<int64_t>(block % blocks) * kTokens, first = begin + threadIdx.x * kEach, length = from.length;
  const T *const ids = static_cast<const T *>(from.ids) + row * from.row_stride;
  const auto id_of = [&](int64_t token) {
    const int64_t id = ids[token * from.token_stride];
    assert(0 <= id && id <= kMost && "segment_ids must be 0 for padding and below 2**31: number the segments of a row from 1 on");
    return static_cast<int32_t>(id);
  };
  const auto lower = [](int32_t x, int32_t y) { return min(x, y); };
  const auto higher = [](int32_t x, int32_t y) { return max(x, y); };
  int32_t own[kEach], highest[kEach], before = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) own[i] = first + i < length ? id_of(first + i) : 0;
  for (int64_t token = threadIdx.x; token < begin; token += kThreads) before = max(before, id_of(token));
  if (begin > 0) before = of_block(before, higher);
#pragma unroll
  for (int i = 0; i < kEach; ++i) highest[i] = max(i ? highest[i - 1] : 0, own[i]);
  before = max(before, highest_before(highest[kEach - 1]));

  int32_t lowest = 1;
  if (__syncthreads_or(max(before, highest[0]) == 0 && first < length)) {  // padding ahead of all tokens
    lowest = kMost;
    for (int64_t token = begin + threadIdx.x; token < length; token += kThreads) {
      const int32_t id = id_of(token);
      if (id > 0) lowest = min(lowest, id);
    }
    lowest = of_block(lowest, lower);
    if (lowest == kMost) lowest = 1;
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int32_t last = max(before, highest[i]), run = last ? last : lowest;
    assert((own[i] <= 0 || own[i] == last) && "segment_ids must, apart from zeros, never fall along a row");
    if (first + i < length) runs[row * length + first + i] = own[i] > 0 ? run : -run;
  }
}

// A block has kThreads tokens of a head. Id: of runs, or of the segments that they are made of.
template <typename Id> __device__ void leave_padding_out(const linattn_decay &decay, const Id *ids, int64_t row_stride, int64_t token_stride, int block, float *result) {
  const int blocks = blocks_of(decay.length, kThreads);
  const int64_t number = block / blocks, batch = number / decay.heads, head = number % decay.heads, token = static_cast<int64_t>(block % blocks) * kThreads + threadIdx.x;
  if (token >= decay.length) return;
  const float own = decay.log_decay[batch * decay.batch_stride + head * decay.head_stride + token * decay.token_stride];
  result[number * decay.length + token] = static_cast<int32_t>(ids[batch * row_stride + token * token_stride]) > 0 ? own : 0.f;
}

// The first blocks make runs, those behind them leave padding out of a decay, which needs no run.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    runs_kernel(const __grid_constant__ linattn_segments from, int blocks, const __grid_constant__ linattn_decay decay, int32_t *runs, float *result) {
  const int block = blockIdx.x;
  if (block < blocks) make_runs<T>(from, block, runs);
  else leave_padding_out(decay, static_cast<const T *>(from.ids), from.row_stride, from.token_stride, block - blocks, result);
}

__global__ void __launch_bounds__(kThreads) decay_at_tokens_kernel(const __grid_constant__ linattn_decay decay, const int32_t *runs, float *result) {
  leave_padding_out(decay, runs, decay.length, 1, blockIdx.x, result);
}

// A head's gradients at tokens, over the batch, by a block.
__global__ void __launch_bounds__(kThreads) sum_at_tokens_kernel(const float *gradient, const int32_t *runs, int batch, int heads, int64_t length, float *result) {
  __shared__ double parts[kWarps];
  double sum = 0;
  for (int b = 0; b < batch; ++b)
    for (int64_t token = threadIdx.x; token < length; token += kThreads)
      if (runs[b * length + token] > 0) sum += gradient[(static_cast<int64_t>(b) * heads + blockIdx.x) * length + token];
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kAll, sum, step);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x) return;
  for (int warp = 1; warp < kWarps; ++warp) sum += parts[warp];
  result[blockIdx.x] = static_cast<float>(sum);
}

int decay_blocks(const linattn_decay &decay) { return decay.batch * decay.heads * blocks_of(decay.length, kThreads); }

template <typename T> void launch_runs(const linattn_segments &from, const linattn_decay &decay, int32_t *runs, float *result, cudaStream_t stream) {
  const int blocks = from.batch * blocks_of(from.length, kTokens), all = blocks + decay_blocks(decay);
  runs_kernel<T><<<static_cast<unsigned>(all), kThreads, 0, stream>>>(from, blocks, decay, runs, result);
}

}  // namespace

extern "C" {

int linattn_runs(const linattn_segments *segments, const linattn_decay *given, int32_t *runs, float *result, void *stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  const linattn_decay decay = given ? *given : linattn_decay{};
  switch (segments->dtype) {
    case LINATTN_UINT8: launch_runs<uint8_t>(*segments, decay, runs, result, on); break;
    case LINATTN_INT8: launch_runs<int8_t>(*segments, decay, runs, result, on); break;
    case LINATTN_INT16: launch_runs<int16_t>(*segments, decay, runs, result, on); break;
    case LINATTN_INT32: launch_runs<int32_t>(*segments, decay, runs, result, on); break;
    case LINATTN_INT64: launch_runs<int64_t>(*segments, decay, runs, result, on); break;
    default: return cudaErrorInvalidValue;
  }
  return cudaPeekAtLastError();
}

int linattn_decay_at_tokens(const linattn_decay *decay, const int32_t *runs, float *result, void *stream) {
  decay_at_tokens_kernel<<<static_cast<unsigned>(decay_blocks(*decay)), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(*decay, runs, result);
  return cudaPeekAtLastError();
}

int linattn_sum_at_tokens(const linattn_decay *gradient, const int32_t *runs, float *result, void *stream) {
  const linattn_decay &from = *gradient;
  sum_at_tokens_kernel<<<from.heads, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(from.log_decay, runs, from.batch, from.heads, from.length, result);
  return cudaPeekAtLastError();
}

}  // extern "C"
