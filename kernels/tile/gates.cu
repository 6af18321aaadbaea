// architectures: sm_80 compute_80 sm_90
// The decay's sums ahead of the fast kernels and its gradient behind them, in double where sums are long.
#include <algorithm>

#include "tile/gates.cuh"
#include "tile/noise.cuh"

namespace linattn_tile {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kEach = 8;         // tokens a thread takes at a time, where a block goes along a sequence
constexpr int kMostOfChunk = 3;  // tokens of a chunk that a lane takes, of at most 96

// One warp a chunk: the running sum of log2 decay from the chunk's first token on. A lane takes `each` tokens, side by side.
__global__ void chunk_decay_kernel(const float *log_decay, int64_t length, int chunk, int64_t chunks, int64_t count, float *decay) {
  const int64_t number = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (number >= count) return;
  const int64_t head = number / chunks, begin = number % chunks * chunk;
  const int lane = threadIdx.x % 32, each = (chunk + 31) / 32, first = lane * each;
  const int real = static_cast<int>(min(static_cast<int64_t>(min(chunk - first, each)), length - begin - first));
  const int64_t at = head * length + begin + first;
  float own[kMostOfChunk];
#pragma unroll
  for (int i = 0; i < kMostOfChunk; ++i) own[i] = i < real ? log_decay[at + i] : 0.f;
#pragma unroll
  for (int i = 1; i < kMostOfChunk; ++i) own[i] += own[i - 1];
  const float total = own[kMostOfChunk - 1];
  float before = total;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const float other = __shfl_up_sync(0xffffffffu, before, step);
    if (lane >= step) before += other;
  }
  before = __shfl_up_sync(0xffffffffu, before, 1);
#pragma unroll
  for (int i = 0; i < kMostOfChunk; ++i)
    if (i < real) decay[at + i] = (lane == 0 ? own[i] : before + own[i]) * static_cast<float>(kLog2E);
}

// Every thread gets the sum over the block.
__device__ double block_sum(double x) {
  __shared__ double parts[kWarps];
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  __syncthreads();
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  x = 0;
  for (int warp = 0; warp < kWarps; ++warp) x += parts[warp];
  return x;
}

// The sum over the threads before this one; all: over the block.
__device__ double block_prefix(double x, double &all) {
  __shared__ double parts[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  double sum = x;
  for (int step = 1; step < 32; step *= 2) {
    const double other = __shfl_up_sync(0xffffffffu, sum, step);
    if (lane >= step) sum += other;
  }
  __syncthreads();
  if (lane == 31) parts[warp] = sum;
  __syncthreads();
  all = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) sum += parts[w];
    all += parts[w];
  }
  return sum - x;
}

// One block a head.
__global__ void running_decay_kernel(const float *log_decay, bool per_token, int state_heads, int64_t length, double *decay) {
  const int64_t head = blockIdx.x;
  double before = 0;
  for (int64_t block_begin = 0; block_begin < length; block_begin += kThreads * kEach) {
    const int64_t first = block_begin + static_cast<int64_t>(threadIdx.x) * kEach;
    float each[kEach];  // all of them are asked for at once
#pragma unroll
    for (int i = 0; i < kEach; ++i) each[i] = first + i < length ? log_decay[per_token ? head * length + first + i : head % state_heads] : 0.f;
    double own[kEach], total = 0, all;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (first + i < length) total += real_decay(each[i]);
      own[i] = total;
    }
    const double ahead = before + block_prefix(total, all);
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      if (first + i < length) decay[head * length + first + i] = (ahead + own[i]) * kLog2E;
    before += all;
  }
}

struct Sums {
  const float *rows, *columns;  // of A dA: (batch, query heads, length) over each row's keys, (batch, state heads, length) over each key's rows
  int heads;                    // query heads to a state
  int64_t length;
  // dL/dG of the tokens `first`, `first` + `step`, ... in state head `head`, counted over the batch; 0 where there is none. Where rounding has
  // moved `out`, both sums have moved alike, so neither is replaced by what it is in exact arithmetic. All loads of a row are under way at once.
  __device__ void read(double (&slopes)[kEach], int64_t head, int64_t first, int64_t step) const {
    const auto add = [&](const float *row, double sign) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int64_t n = first + i * step;
        if (n >= 0 && n < length) slopes[i] += sign * row[n];
      }
    };
    for (int i = 0; i < kEach; ++i) slopes[i] = 0;
    add(columns + head * length, -1);
    for (int r = 0; r < heads; ++r) add(rows + (head * heads + r) * length, 1);
  }
};

// dL/dlog_decay of a token is the sum of dL/dG over the tokens from it on; what the state at the end gets (`ends`) belongs to the last.
__global__ void token_gradient_kernel(Sums sums, const float *ends, float *gradient) {
  const int64_t head = blockIdx.x, length = sums.length;
  double later = ends ? ends[head] : 0.0;
  for (int64_t block_end = length; block_end > 0; block_end -= kThreads * kEach) {
    const int64_t last = block_end - 1 - static_cast<int64_t>(threadIdx.x) * kEach;  // a thread's tokens run down from here
    double own[kEach], total = 0, all;
    sums.read(own, head, last, -1);
    for (int i = 0; i < kEach; ++i) own[i] = total += own[i];
    const double before = block_prefix(total, all);
    for (int i = 0; i < kEach; ++i)
      if (last - i >= 0) gradient[head * length + last - i] = static_cast<float>(later + before + own[i]);
    later += all;
  }
}

// A constant rate is every token's: token n counts n + 1 times. One part a (batch entry, head).
__global__ void rate_gradient_kernel(Sums sums, const float *ends, double *parts) {
  const int64_t head = blockIdx.x, length = sums.length;
  double sum = 0;
  for (int64_t first = threadIdx.x; first < length; first += kThreads * kEach) {
    double slopes[kEach];
    sums.read(slopes, head, first, kThreads);
    for (int i = 0; i < kEach; ++i) sum += static_cast<double>(first + i * kThreads + 1) * slopes[i];
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) parts[head] = sum + (ends ? static_cast<double>(ends[head]) * static_cast<double>(length) : 0.0);
}

__global__ void rate_total_kernel(const double *parts, int batch, int heads, float *gradient) {
  const int head = blockIdx.x * kThreads + threadIdx.x;
  if (head >= heads) return;
  double sum = 0;
  for (int b = 0; b < batch; ++b) sum += parts[static_cast<int64_t>(b) * heads + head];
  gradient[head] = static_cast<float>(sum);
}

// The state behind the last token times its gradient, one number a head. `state` is transposed, as the gradient's row kernel keeps it.
__global__ void end_kernel(const float *state, const float *grad_state, int dim, float *ends) {
  const int64_t head = blockIdx.x;
  const int square = dim * dim, all = square + 2 * dim + 1;
  const float *const own = state + head * (square + 2 * dim + 4), *const gradient = grad_state + head * (dim + 1) * (dim + 1);
  double sum = 0;
  for (int i = threadIdx.x; i < all; i += kThreads) {
    // own: (value, key) pairs, sums of values, sums of keys, the count
    const int row = i < square ? i % dim : i < square + dim ? dim : i < all - 1 ? i - square - dim : dim;
    const int column = i < square ? i / dim : i < square + dim ? i - square : dim;
    sum += static_cast<double>(own[i]) * gradient[row * (dim + 1) + column];
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) ends[head] = static_cast<float>(sum);
}

// Partial gradients of the query heads that share a key head, summed in their order.
template <typename T>
__global__ void share_kernel(const T *parts, int shared, int64_t length, int dim, linattn_tensor result) {
  const int64_t key_head = blockIdx.y, batch = blockIdx.z;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, token = i / (dim / 2);
  if (token >= length) return;
  const int64_t plane = length * dim, at = token * dim + i % (dim / 2) * 2;
  const T *const from = parts + (batch * gridDim.y + key_head) * shared * plane + at;
  float low = 0, high = 0;
  for (int r = 0; r < shared; ++r) {
    const uint32_t both = *reinterpret_cast<const uint32_t *>(from + r * plane);
    low += Element<T>::low(both), high += Element<T>::high(both);
  }
  T *const to = head_of<T>(result, batch, key_head) + token * result.token_stride + i % (dim / 2) * 2;
  *reinterpret_cast<uint32_t *>(to) = Element<T>::pack(low, high);
}

// Eight lanes a row.
template <typename T> __global__ void noised_gradient_kernel(linattn_problem p, linattn_backward_data data, float *error, float *query_scale) {
  constexpr int kLanes = 8;
  const int64_t rows = static_cast<int64_t>(p.batch) * p.query_heads * p.length, wanted = static_cast<int64_t>(blockIdx.x) * (kThreads / kLanes) + threadIdx.x / kLanes;
  const int64_t row = wanted < rows ? wanted : rows - 1;  // the last lanes repeat a row, so that all can exchange
  const int64_t token = row % p.length, number = row / p.length, batch = number / p.query_heads, head = number % p.query_heads;
  const int lane = threadIdx.x % kLanes;
  const auto from = [&](const linattn_tensor &tensor) { return reinterpret_cast<const uint2 *>(head_of<const T>(tensor, batch, head) + token * tensor.token_stride); };
  const uint2 *const out = from(data.out), *const grad_out = from(data.grad_out), *const query = from(p.query);
  uint2 *const noised = const_cast<uint2 *>(from(data.grad_query));
  const Noise noise(p);
  float dot = 0, square = 0;
  const auto product = [](uint32_t x, uint32_t y) { return Element<T>::low(x) * Element<T>::low(y) + Element<T>::high(x) * Element<T>::high(y); };
  const auto scaled = [](uint32_t x, float2 factor) { return Element<T>::pack(Element<T>::low(x) * factor.x, Element<T>::high(x) * factor.y); };
  for (int i = lane; i < p.head_dim / 4; i += kLanes) {
    const uint2 o = out[i], w = grad_out[i], q = query[i];
    dot += product(w.x, o.x) + product(w.y, o.y), square += product(q.x, q.x) + product(q.y, q.y);
    const uint4 words = noise.words(static_cast<uint32_t>(number), token, 4 * i);
    noised[i] = make_uint2(scaled(w.x, noise.factors(words.x, words.y)), scaled(w.y, noise.factors(words.z, words.w)));
  }
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) dot += __shfl_xor_sync(0xffffffffu, dot, step), square += __shfl_xor_sync(0xffffffffu, square, step);
  if (lane) return;
  const float mass = data.mass[row];
  error[row] = mass == 0.f ? 0.f : (data.grad_mass ? data.grad_mass[row] : 0.f) - dot / mass;
  query_scale[row] = p.normalize_qk ? inverse_norm(square) : 1.f;
}

}  // namespace

template <typename T> cudaError_t launch_noised_gradient(const linattn_problem &problem, const linattn_backward_data &data, float *error, float *query_scale) {
  const int64_t rows = static_cast<int64_t>(problem.batch) * problem.query_heads * problem.length;
  constexpr int kRows = kThreads / 8;
  noised_gradient_kernel<T><<<static_cast<unsigned>((rows + kRows - 1) / kRows), kThreads, 0, static_cast<cudaStream_t>(problem.stream)>>>(problem, data, error, query_scale);
  return cudaPeekAtLastError();
}
template cudaError_t launch_noised_gradient<__nv_bfloat16>(const linattn_problem &, const linattn_backward_data &, float *, float *);
template cudaError_t launch_noised_gradient<__half>(const linattn_problem &, const linattn_backward_data &, float *, float *);

cudaError_t launch_chunk_decay(const linattn_problem &problem, int chunk, float *decay) {
  const int64_t chunks = (problem.length + chunk - 1) / chunk, count = chunks * problem.batch * problem.state_heads;
  chunk_decay_kernel<<<static_cast<unsigned>((count + kWarps - 1) / kWarps), kThreads, 0, static_cast<cudaStream_t>(problem.stream)>>>(problem.log_decay, problem.length, chunk,
                                                                                                                                       chunks, count, decay);
  return cudaPeekAtLastError();
}

cudaError_t launch_running_decay(const linattn_problem &problem, double *decay) {
  running_decay_kernel<<<problem.batch * problem.state_heads, kThreads, 0, static_cast<cudaStream_t>(problem.stream)>>>(problem.log_decay, problem.log_decay_per_token,
                                                                                                                        problem.state_heads, problem.length, decay);
  return cudaPeekAtLastError();
}

cudaError_t launch_decay_gradient(const linattn_problem &problem, const DecaySums &given, float *gradient) {
  const cudaStream_t stream = static_cast<cudaStream_t>(problem.stream);
  const int heads = problem.batch * problem.state_heads;
  const float *ends = nullptr;
  if (given.grad_state) {
    end_kernel<<<heads, kThreads, 0, stream>>>(given.final_state, given.grad_state, problem.head_dim, given.ends);
    ends = given.ends;
  }
  const Sums sums{given.rows, given.columns, problem.query_heads / problem.state_heads, problem.length};
  if (problem.log_decay_per_token) {
    token_gradient_kernel<<<heads, kThreads, 0, stream>>>(sums, ends, gradient);
  } else {
    rate_gradient_kernel<<<heads, kThreads, 0, stream>>>(sums, ends, given.parts);
    rate_total_kernel<<<(problem.state_heads + kThreads - 1) / kThreads, kThreads, 0, stream>>>(given.parts, problem.batch, problem.state_heads, gradient);
  }
  return cudaPeekAtLastError();
}

template <typename T> cudaError_t launch_share(const linattn_problem &problem, const T *parts, const linattn_tensor &result) {
  const int64_t pairs = problem.length * (problem.head_dim / 2);
  const dim3 grid(static_cast<unsigned>((pairs + kThreads - 1) / kThreads), problem.key_heads, problem.batch);
  share_kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(problem.stream)>>>(parts, problem.state_heads / problem.key_heads, problem.length, problem.head_dim, result);
  return cudaPeekAtLastError();
}
template cudaError_t launch_share(const linattn_problem &, const __nv_bfloat16 *, const linattn_tensor &);
template cudaError_t launch_share(const linattn_problem &, const __half *, const linattn_tensor &);

}  // namespace linattn_tile
