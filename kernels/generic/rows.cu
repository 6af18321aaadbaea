// architectures: sm_80 compute_80 sm_90
// One number a row: inverse norms, inverse masses, the last column of dL/dA, the running sum of the decay. And the sums at the end of backward.
#include "generic/job.cuh"

namespace linattn {
namespace {

constexpr float SMALLEST_SQUARE = 1e-24f;  // |x| <= 1e-12 has no direction: its unit vector and its gradient are zero
constexpr int WARPS = 8;
constexpr float SMALLEST_DECAY = -100.0f;  // exp of it is zero beside 1; keeps -inf out of differences

// Sum over the block, in an order that never changes. Everyone gets it.
__device__ double block_sum(double x) {
  __shared__ double parts[THREADS];
  __syncthreads();
  parts[threadIdx.x] = x;
  __syncthreads();
  for (int step = THREADS / 2; step > 0; step /= 2) {
    if (threadIdx.x < step) parts[threadIdx.x] += parts[threadIdx.x + step];
    __syncthreads();
  }
  return parts[0];
}

// Sum over this thread and all earlier ones of the block.
__device__ double block_prefix(double x) {
  __shared__ double parts[THREADS];
  __syncthreads();
  parts[threadIdx.x] = x;
  __syncthreads();
  for (int step = 1; step < THREADS; step *= 2) {
    const double before = threadIdx.x >= step ? parts[threadIdx.x - step] : 0.0;
    __syncthreads();
    parts[threadIdx.x] += before;
    __syncthreads();
  }
  return parts[threadIdx.x];
}

// Rows are read 16 bytes a thread where that is aligned; `lanes` threads, a power of two, share a row.
__device__ float lane_sum(float x, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

__device__ void read(float (&x)[8], const void *data, int dtype, bool vector, int64_t at, int count) {
  if (vector && count == 8) {
    const int words = dtype == LINATTN_FLOAT32 ? 8 : 4;
    const uint4 *from = reinterpret_cast<const uint4 *>(static_cast<const char *>(data) + at * (words / 2));
    const uint4 first = from[0], second = words == 8 ? from[1] : first;
    const uint32_t raw[8] = {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (dtype == LINATTN_FLOAT32) {
        x[i] = __uint_as_float(raw[i]);
      } else if (dtype == LINATTN_BFLOAT16) {
        x[i] = __uint_as_float(i % 2 == 0 ? raw[i / 2] << 16 : raw[i / 2] & 0xffff0000u);
      } else {
        const __half2 two = *reinterpret_cast<const __half2 *>(&raw[i / 2]);
        x[i] = i % 2 == 0 ? __low2float(two) : __high2float(two);
      }
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = i < count ? load(data, dtype, at + i) : 0.0f;
}

__global__ void inverse_norms(linattn_tensor tensor, int dtype, bool vector, int heads, int64_t length, int width, int64_t rows, int lanes, float *result) {
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x) / lanes;
  const int lane = threadIdx.x % lanes;
  float square = 0.0f;
  if (row < rows) {
    const int64_t head = row / length;
    const int64_t start = offset_of(tensor, static_cast<int>(head / heads), static_cast<int>(head % heads), row - head * length);
    for (int d = lane * 8; d < width; d += lanes * 8) {
      float x[8];
      read(x, tensor.data, dtype, vector, start + d, min(8, width - d));
#pragma unroll
      for (int i = 0; i < 8; ++i) square = fmaf(x[i], x[i], square);
    }
  }
  square = lane_sum(square, lanes);
  if (row < rows && lane == 0) result[row] = square > SMALLEST_SQUARE ? 1.0f / sqrtf(square) : 0.0f;
}

__global__ void row_terms(const __grid_constant__ Job job, int64_t rows, int lanes) {
  const linattn_problem &p = job.p;
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x) / lanes;
  const int lane = threadIdx.x % lanes;
  float dot = 0.0f;
  bool real = false;
  if (row < rows) {
    const int64_t bh = row / p.length, n = row - bh * p.length;
    const int b = static_cast<int>(bh / p.query_heads), h = static_cast<int>(bh % p.query_heads);
    real = p.query_segments == nullptr || p.query_segments[b * p.query_segments_stride + n] > 0;
    if (real) {
      const int64_t out = offset_of(job.out, b, h, n), grad = offset_of(job.grad_out, b, h, n);
      for (int d = lane * 8; d < p.value_dim; d += lanes * 8) {
        float x[8], y[8];
        read(x, job.out.data, p.dtype, job.vector_out, out + d, min(8, p.value_dim - d));
        read(y, job.grad_out.data, p.dtype, job.vector, grad + d, min(8, p.value_dim - d));
#pragma unroll
        for (int i = 0; i < 8; ++i) dot = fmaf(x[i], y[i], dot);
      }
    }
  }
  dot = lane_sum(dot, lanes);
  if (row < rows && lane == 0) {
    const float g = job.mass[row], inverse = real && g != 0.0f ? 1.0f / g : 0.0f;
    job.inverse_mass[row] = inverse;
    job.row_term[row] = real ? -dot * inverse + (job.grad_mass == nullptr ? 0.0f : job.grad_mass[row]) : 0.0f;
  }
}

// A warp sums the decay inside one tile; lane l holds tokens 2 l and 2 l + 1.
__global__ void decay_in_tiles(const __grid_constant__ Job job, int64_t warps) {
  const linattn_problem &p = job.p;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / 32;
  if (warp >= warps) return;
  const int64_t bh = warp / job.tiles, tile = warp % job.tiles;
  const int lane = threadIdx.x % 32;
  const int64_t n = tile * TILE + lane * 2;
  const float *source = p.log_decay + (p.log_decay_per_token ? bh * p.length : bh % p.state_heads);
  auto rate = [&](int64_t at) { return at < p.length ? fmaxf(source[p.log_decay_per_token ? at : 0], SMALLEST_DECAY) : 0.0f; };
  const float first = rate(n), second = rate(n + 1);
  float sum = first + second;
  for (int step = 1; step < 32; step *= 2) {
    const float before = __shfl_up_sync(0xffffffffu, sum, step);
    if (lane >= step) sum += before;
  }
  float *target = job.decay + bh * p.length;
  if (n < p.length) target[n] = sum - second;
  if (n + 1 < p.length) target[n + 1] = sum;
  if (lane == 31) job.decay_tiles[bh * (job.tiles + 1) + tile] = sum;
}

__global__ void decay_over_tiles(const __grid_constant__ Job job) {
  double *sums = job.decay_tiles + static_cast<int64_t>(blockIdx.x) * (job.tiles + 1);
  double total = 0.0;
  for (int64_t first = 0; first < job.tiles; first += THREADS) {
    const int64_t tile = first + threadIdx.x;
    const double x = tile < job.tiles ? sums[tile] : 0.0;
    const double prefix = block_prefix(x);
    const double all = block_sum(x);
    if (tile < job.tiles) sums[tile] = total + prefix - x;
    total += all;
  }
  if (threadIdx.x == 0) sums[job.tiles] = total;
}

__global__ void coefficient_gradients(const __grid_constant__ Job job) {
  const linattn_problem &p = job.p;
  const int head = blockIdx.x;
  double sums[3] = {0.0, 0.0, 0.0};
  const int64_t parts = p.batch * job.row_tiles;
  for (int64_t part = threadIdx.x; part < parts; part += THREADS) {
    const int64_t b = part / job.row_tiles, tile = part % job.row_tiles;
    const float *x = job.coefficient_parts + ((b * p.query_heads + head) * job.row_tiles + tile) * 3;
    for (int i = 0; i < 3; ++i) sums[i] += x[i];
  }
  for (int i = 0; i < 3; ++i) sums[i] = block_sum(sums[i]);
  if (threadIdx.x == 0) {
    const double b = p.coefficients[p.query_heads + head], c = p.coefficients[2 * p.query_heads + head];
    const double t = p.coefficients[3 * p.query_heads + head];
    const bool second = p.degree == 2;
    job.grad_coefficients[head] = static_cast<float>(sums[0]);
    job.grad_coefficients[p.query_heads + head] = static_cast<float>(t * sums[1]);
    job.grad_coefficients[2 * p.query_heads + head] = second ? static_cast<float>(t * t * sums[2]) : 0.0f;
    job.grad_coefficients[3 * p.query_heads + head] = static_cast<float>(b * sums[1] + (second ? 2.0 * c * t * sums[2] : 0.0));
  }
}

// dL/dlog_decay_j is the sum of dG_n over n >= j, dG_n = (A dA over the keys that n sees) - (A dA over the queries that see n); the state
// that leaves decays to the last token, so its gradient times itself belongs to that token. Where rounding has moved `out`, and with it
// e, both sums have moved alike: that is why neither is replaced by what it is in exact arithmetic.
__global__ void decay_gradients(const __grid_constant__ Job job) {
  const linattn_problem &p = job.p;
  const int64_t bs = blockIdx.x;
  const int64_t b = bs / p.state_heads;
  const int head = static_cast<int>(bs % p.state_heads);
  double total = 0.0;
  if (job.grad_state != nullptr) {
    const int64_t size = static_cast<int64_t>(job.features) * (p.value_dim + 1);
    double dot = 0.0;
    for (int64_t i = threadIdx.x; i < size; i += THREADS) dot += static_cast<double>(job.grad_state[bs * size + i]) * job.final_state[bs * size + i];
    total = block_sum(dot);
  }
  double rate = p.log_decay_per_token ? 0.0 : total * p.length;
  if (!p.log_decay_per_token) {
    double sum = 0.0;
    for (int64_t n = threadIdx.x; n < p.length; n += THREADS) {
      double x = -static_cast<double>(job.column_sums[bs * p.length + n]);
      for (int r = 0; r < job.state_group; ++r) x += job.row_sums[(b * p.query_heads + head * job.state_group + r) * p.length + n];
      sum += (n + 1) * x;
    }
    rate += block_sum(sum);
    if (threadIdx.x == 0) job.decay_parts[bs] = rate;
    return;
  }
  for (int64_t first = (p.length + THREADS - 1) / THREADS * THREADS - 1; first >= 0; first -= THREADS) {
    const int64_t n = first - threadIdx.x;
    double x = 0.0;
    if (n < p.length) {
      x = -static_cast<double>(job.column_sums[bs * p.length + n]);
      for (int r = 0; r < job.state_group; ++r) x += job.row_sums[(b * p.query_heads + head * job.state_group + r) * p.length + n];
    }
    const double suffix = block_prefix(x);
    if (n < p.length) job.grad_log_decay[bs * p.length + n] = static_cast<float>(total + suffix);
    total += block_sum(x);
  }
}

__global__ void decay_rates(const __grid_constant__ Job job) {
  const int head = blockIdx.x * blockDim.x + threadIdx.x;
  if (head >= job.p.state_heads) return;
  double sum = 0.0;
  for (int b = 0; b < job.p.batch; ++b) sum += job.decay_parts[static_cast<int64_t>(b) * job.p.state_heads + head];
  job.grad_log_decay[head] = static_cast<float>(sum);
}

int lanes_for(int width) {
  int lanes = 1;
  while (lanes * 8 < width && lanes < 32) lanes *= 2;
  return lanes;
}

unsigned blocks_of(int64_t count, int64_t each) { return static_cast<unsigned>((count + each - 1) / each); }

}  // namespace

cudaError_t launch_inverse_norms(const Job &job, bool keys, cudaStream_t stream) {
  const linattn_problem &p = job.p;
  const int heads = keys ? p.key_heads : p.query_heads, lanes = lanes_for(p.head_dim);
  const int64_t rows = static_cast<int64_t>(p.batch) * heads * p.length;
  inverse_norms<<<blocks_of(rows * lanes, THREADS), THREADS, 0, stream>>>(keys ? p.key : p.query, p.dtype, job.vector, heads, p.length, p.head_dim, rows, lanes,
                                                                          keys ? job.inverse_key : job.inverse_query);
  return cudaGetLastError();
}

cudaError_t launch_row_terms(const Job &job, cudaStream_t stream) {
  const int lanes = lanes_for(job.p.value_dim);
  const int64_t rows = static_cast<int64_t>(job.p.batch) * job.p.query_heads * job.p.length;
  row_terms<<<blocks_of(rows * lanes, THREADS), THREADS, 0, stream>>>(job, rows, lanes);
  return cudaGetLastError();
}

cudaError_t launch_decay_sums(const Job &job, cudaStream_t stream) {
  const int64_t heads = static_cast<int64_t>(job.p.batch) * job.p.state_heads;
  decay_in_tiles<<<blocks_of(heads * job.tiles, WARPS), WARPS * 32, 0, stream>>>(job, heads * job.tiles);
  decay_over_tiles<<<static_cast<unsigned>(heads), THREADS, 0, stream>>>(job);
  return cudaGetLastError();
}

cudaError_t launch_coefficient_gradients(const Job &job, cudaStream_t stream) {
  coefficient_gradients<<<job.p.query_heads, THREADS, 0, stream>>>(job);
  return cudaGetLastError();
}

cudaError_t launch_decay_gradients(const Job &job, cudaStream_t stream) {
  const int64_t heads = static_cast<int64_t>(job.p.batch) * job.p.state_heads;
  decay_gradients<<<static_cast<unsigned>(heads), THREADS, 0, stream>>>(job);
  if (!job.p.log_decay_per_token) decay_rates<<<blocks_of(job.p.state_heads, THREADS), THREADS, 0, stream>>>(job);
  return cudaGetLastError();
}

}  // namespace linattn
