// Shared parts of the generic kernels: every problem that the interface can state, float32 inputs to float32 accuracy.
//
// Everything is a product of small tiles. A sequence is cut into chunks; inside a chunk the weights are formed pair by pair, and what came
// before a chunk is one running sum, the state S = sum psi(k) [v, 1]^T with psi(k) = [k, 1, k_i k_j for i <= j]:
//
//   states    the sum of every chunk alone                                       states.cu
//   scan      the state ahead of every chunk, in place                           scan.cu
//   apply     rows = queries: out, from the state and the pairs of the chunk     apply.cu
//   slope     rows = queries: their gradient                                     slope.cu
//
// Backward is the same with the roles turned round: rows are keys, columns are the queries behind them, and R, the gradient of the
// state, runs from the end of the sequence to its start. With w_i = dL/do_i / g_i and e_i = -(dL/do_i . o_i) / g_i + dL/dg_i:
//   weight of a pair A_in = f(s_in) exp(G_i - G_n),   its gradient dA_in = w_i . v_n + e_i,
//   dq_i = sum_n f'(s_in) exp(..) dA_in k_n,   dk_n = sum_i f'(s_in) exp(..) dA_in q_i,   dv_n = sum_i A_in w_i.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "linattn.h"

namespace linattn {

constexpr int TILE = 64;       // tokens a tile of columns; chunks are whole tiles, and so is the running sum of the decay
constexpr int THREADS = 256;   // 8 warps
constexpr int MAX_DIM = 256;

// Rows a block works on: fewer where rows are wide, so that a block fits the 99 KB of the smaller cards.
__host__ __device__ constexpr int rows_of(int width) { return width > 128 ? 32 : 64; }

// How a problem is cut, and where its intermediate results lie.
struct Job {
  linattn_problem p;
  int group;             // query heads of a key head
  int state_group;       // query heads of a state head
  int features;          // rows of the state
  bool vector;           // rows of q, k, v and dL/do may be read 16 bytes at a time
  bool vector_out;       // rows of out too
  bool direct;           // pairs are formed (false: bidirectional through the state alone)
  bool has_state;        // queries read a state
  bool has_reverse;      // keys read R
  int64_t chunk, chunks; // tokens in a chunk (whole tiles), number of chunks
  int64_t tiles;
  float *inverse_query, *inverse_key;  // 1 / |q|, 1 / |k|, or null: used as they are
  float *inverse_mass, *row_term;      // 1 / g and e
  float *decay;                        // (B, Hs, N): sum of log_decay from the tile's first token to this one
  double *decay_tiles;                 // (B, Hs, tiles + 1): sum over all earlier tiles
  float *states;                       // (B, Hs, chunks, features, Dv + 1): S, later R
  float *final_state;                  // (B, Hs, features, Dv + 1), or null
  float *coefficient_parts;            // (B, Hq, row tiles, 3)
  float *row_sums, *column_sums;       // sum of A dA over a query's keys (B, Hq, N); over a key's queries (B, Hs, N)
  double *decay_parts;                 // (B, Hs)
  int64_t row_tiles;                   // of the kernels whose rows are as wide as rows_of(max(D, Dv)) says
  linattn_tensor out, grad_out, grad_query, grad_key, grad_value;
  const float *mass, *grad_mass, *grad_state;
  float *mass_out, *grad_coefficients, *grad_log_decay, *grad_initial_state;
};

struct Coefficients {
  float a, b, c;  // of the product of the unit-length vectors: the temperature is multiplied in
  __device__ float weight(float s) const { return fmaf(fmaf(c, s, b), s, a); }
  __device__ float slope(float s) const { return fmaf(2.0f * c, s, b); }
};

__device__ inline Coefficients coefficients_of(const linattn_problem &p, int head) {
  const float t = p.coefficients[3 * p.query_heads + head];
  const float c = p.degree == 2 ? p.coefficients[2 * p.query_heads + head] : 0.0f;
  return {p.coefficients[head], p.coefficients[p.query_heads + head] * t, c * t * t};
}

__device__ inline float load(const void *data, int dtype, int64_t at) {
  if (dtype == LINATTN_FLOAT32) return static_cast<const float *>(data)[at];
  if (dtype == LINATTN_FLOAT16) return __half2float(static_cast<const __half *>(data)[at]);
  return __bfloat162float(static_cast<const __nv_bfloat16 *>(data)[at]);
}

__device__ inline void store(void *data, int dtype, int64_t at, float x) {
  if (dtype == LINATTN_FLOAT32) static_cast<float *>(data)[at] = x;
  else if (dtype == LINATTN_FLOAT16) static_cast<__half *>(data)[at] = __float2half_rn(x);
  else static_cast<__nv_bfloat16 *>(data)[at] = __float2bfloat16_rn(x);
}

__device__ inline int64_t offset_of(const linattn_tensor &t, int b, int h, int64_t n) { return b * t.batch_stride + h * t.head_stride + n * t.token_stride; }

// The noise that stands in for dropout: nothing where `p` is null.
struct Noise {
  const float *p;
  const int64_t *seed;
};

// (1 - p) (1 + psi), psi ~ N(0, p), of one output: Philox4x32-10 keyed by the seed, counted by column / 4, token and row.
static __device__ __noinline__ float noise(Noise source, int row, int64_t token, int column) {
  const uint64_t seed = static_cast<uint64_t>(*source.seed);
  uint32_t c0 = column / 4, c1 = static_cast<uint32_t>(token), c2 = static_cast<uint32_t>(token >> 32), c3 = row;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = static_cast<uint64_t>(c0) * 0xD2511F53u, second = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(second >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(second);
    c2 = static_cast<uint32_t>(first >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(first);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const bool later = column & 2;
  const float radius = (static_cast<float>((later ? c2 : c0) >> 8) + 0.5f) * 0x1p-24f;
  const float angle = 6.283185307179586f * ((static_cast<float>((later ? c3 : c1) >> 8) + 0.5f) * 0x1p-24f);
  const float normal = sqrtf(-2.0f * logf(radius)) * (column & 1 ? sinf(angle) : cosf(angle));
  const float drop = *source.p;
  return (1.0f - drop) * (1.0f + sqrtf(drop) * normal);
}

// The rows of one head as float32, zero past the end and in padding: what every kernel reads through.
struct Rows {
  const void *data;
  int64_t start, stride, length;
  int dtype, width;
  const float *scale;     // one factor a token, or null
  const int32_t *segments;
  bool vector;            // 16-byte loads are aligned
  Noise noised;  // multiplies as well
  int noise_row;

  __device__ bool real(int64_t n) const { return n < length && (segments == nullptr || segments[n] > 0); }
  __device__ float factor(int64_t n) const { return scale == nullptr ? 1.0f : scale[n]; }
  // of a real token
  __device__ float element(int64_t n, int d) const {
    float x = load(data, dtype, start + n * stride + d);
    if (noised.p != nullptr) x *= noise(noised, noise_row, n, d);
    return x;
  }
  __device__ float at(int64_t n, int d) const { return d < width && real(n) ? element(n, d) * factor(n) : 0.0f; }
};

__device__ inline const int32_t *segments_of(const int32_t *segments, int64_t stride, int b) { return segments == nullptr ? nullptr : segments + b * stride; }

__device__ inline Rows unit_queries(const Job &job, int b, int head) {
  const linattn_problem &p = job.p;
  const float *scale = job.inverse_query == nullptr ? nullptr : job.inverse_query + (static_cast<int64_t>(b) * p.query_heads + head) * p.length;
  return {p.query.data,
          offset_of(p.query, b, head, 0),
          p.query.token_stride,
          p.length,
          p.dtype,
          p.head_dim,
          scale,
          segments_of(p.query_segments, p.query_segments_stride, b),
          job.vector,
          {},
          0};
}

__device__ inline Rows unit_keys(const Job &job, int b, int head) {
  const linattn_problem &p = job.p;
  const float *scale = job.inverse_key == nullptr ? nullptr : job.inverse_key + (static_cast<int64_t>(b) * p.key_heads + head) * p.length;
  return {p.key.data, offset_of(p.key, b, head, 0), p.key.token_stride, p.length, p.dtype, p.head_dim, scale, segments_of(p.key_segments, p.key_segments_stride, b), job.vector, {},
          0};
}

__device__ inline Rows values(const Job &job, int b, int head) {
  const linattn_problem &p = job.p;
  return {p.value.data,
          offset_of(p.value, b, head, 0),
          p.value.token_stride,
          p.length,
          p.dtype,
          p.value_dim,
          nullptr,
          segments_of(p.key_segments, p.key_segments_stride, b),
          job.vector,
          {},
          0};
}

// w_i; its last column e_i lies in job.row_term.
__device__ inline Rows upstream(const Job &job, int b, int head) {
  const linattn_problem &p = job.p;
  const int row = b * p.query_heads + head;
  return {job.grad_out.data,
          offset_of(job.grad_out, b, head, 0),
          job.grad_out.token_stride,
          p.length,
          p.dtype,
          p.value_dim,
          job.inverse_mass + row * p.length,
          segments_of(p.query_segments, p.query_segments_stride, b),
          job.vector,
          {p.dropout_p, p.seed},
          row};
}

// The run of tokens whose sum is the state ahead of a chunk, and the run of the one behind it.
__device__ inline int run_before(const int32_t *key_segments, int64_t start) { return abs(key_segments[start > 0 ? start - 1 : 0]); }
__device__ inline int run_behind(const int32_t *key_segments, int64_t stop) { return abs(key_segments[stop - 1]); }

__device__ inline int64_t smaller(int64_t x, int64_t y) { return x < y ? x : y; }

// Pair number -> (i, j), i <= j, row by row through the upper triangle of a D x D matrix.
__device__ inline int pair_start(int i, int dim) { return i * dim - i * (i - 1) / 2; }
__device__ inline int2 pair_of(int number, int dim) {
  const float side = 2.0f * dim + 1.0f;
  int i = static_cast<int>(0.5f * (side - sqrtf(fmaxf(side * side - 8.0f * number, 0.0f))));
  i = min(max(i, 0), dim - 1);
  while (i > 0 && pair_start(i, dim) > number) --i;
  while (i + 1 < dim && pair_start(i + 1, dim) <= number) ++i;
  return {i, i + number - pair_start(i, dim)};
}

// ---- launchers of the single steps

cudaError_t launch_inverse_norms(const Job &job, bool keys, cudaStream_t stream);
cudaError_t launch_row_terms(const Job &job, cudaStream_t stream);
cudaError_t launch_decay_sums(const Job &job, cudaStream_t stream);
cudaError_t launch_states(const Job &job, bool reverse, cudaStream_t stream);
cudaError_t launch_scan(const Job &job, bool reverse, cudaStream_t stream);
cudaError_t launch_apply(const Job &job, bool reverse, cudaStream_t stream);
cudaError_t launch_slope(const Job &job, bool reverse, cudaStream_t stream);
cudaError_t launch_coefficient_gradients(const Job &job, cudaStream_t stream);
cudaError_t launch_decay_gradients(const Job &job, cudaStream_t stream);

// Shared memory of a block of those that ask for it at the launch.
int states_shared_bytes(const linattn_problem &problem);
int apply_shared_bytes(const linattn_problem &problem);
int slope_shared_bytes(const linattn_problem &problem);

}  // namespace linattn
