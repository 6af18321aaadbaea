// architectures: sm_80 compute_80 sm_90
// The state of every chunk alone: sum over its tokens of features x values, each weighed by its decay to the chunk's end (or, in reverse,
// of the queries' features x [w, e], weighed by the decay since the chunk's start: the gradient of the state ahead of the chunk).
#include "generic/tile.cuh"

namespace linattn {
namespace {

constexpr int FEATURES = 64;  // a block works on; the row of ones comes on top in the first block of each chunk
constexpr int STEP = 32;      // tokens at a time
constexpr int FEATURE_STRIDE = FEATURES + 4;

__host__ __device__ constexpr int vector_stride(int dim) { return (dim + 7) / 8 * 8; }

template <int WIDTH>
size_t shared_bytes(const linattn_problem &p) {
  return sizeof(float) * (STEP * (FEATURE_STRIDE + WIDTH + 4 + (p.degree == 2 ? vector_stride(p.head_dim) : 0)) + 2 * STEP);
}

template <int WIDTH, bool REVERSE, bool PRECISE>
__global__ void __launch_bounds__(THREADS) chunk_states(const __grid_constant__ Job job, int feature_blocks) {
  constexpr int PARTS = WIDTH / 16, VALUE_STRIDE = WIDTH + 4;  // 4 by 2 warps
  extern __shared__ __align__(16) float shared[];
  float *features = shared;                                // [STEP][FEATURE_STRIDE]
  float *value_rows = features + STEP * FEATURE_STRIDE;    // [STEP][VALUE_STRIDE]
  float *weights = value_rows + STEP * VALUE_STRIDE;       // [STEP]: what a token counts
  float *last = weights + STEP;                            // [STEP]: the last column: 1, or e
  float *vectors = last + STEP;                            // [STEP][vector_stride]: degree 2 makes its features of these
  const linattn_problem &p = job.p;
  const int dim = p.head_dim, width = p.value_dim, vectors_stride = vector_stride(dim);
  int64_t index = blockIdx.x;
  const int first_feature = static_cast<int>(index % feature_blocks) * FEATURES;
  index /= feature_blocks;
  const int64_t chunk = index % job.chunks, bs = index / job.chunks;
  const int b = static_cast<int>(bs / p.state_heads), state_head = static_cast<int>(bs % p.state_heads);
  const int64_t start = chunk * job.chunk, stop = smaller(start + job.chunk, p.length);
  const int key_head = state_head * job.state_group / job.group;
  const int main_features = job.features - 1;  // all but the row of ones
  const int tid = threadIdx.x;
  const Place at(4);

  const int32_t *key_segments = segments_of(p.key_segments, p.key_segments_stride, b);
  const int run = key_segments == nullptr ? 0 : REVERSE ? run_before(key_segments, start) : run_behind(key_segments, stop);
  const double *tiles = job.decay == nullptr ? nullptr : job.decay_tiles + bs * (job.tiles + 1);
  const double origin = tiles == nullptr ? 0.0 : REVERSE ? tiles[start / TILE] : tiles[(stop + TILE - 1) / TILE];

  // the feature that this thread makes for the block, where they are products of two
  int first_factor = 0, second_factor = -1;
  float multiplicity = 1.0f;
  const int own_feature = first_feature + tid % FEATURES;
  if (own_feature < dim) {
    first_factor = own_feature;
  } else if (own_feature < main_features) {
    const int2 pair = pair_of(own_feature - dim, dim);
    first_factor = pair.x;
    second_factor = pair.y;
    if (REVERSE && pair.x != pair.y) multiplicity = 2.0f;
  } else {
    multiplicity = 0.0f;
  }

  float acc[PARTS][4] = {};
  float last_column = 0.0f, ones_row = 0.0f, corner = 0.0f;
  const int heads = REVERSE ? job.state_group : 1;
  for (int r = 0; r < heads; ++r) {
    const int head = state_head * job.state_group + r;
    const Rows x = REVERSE ? unit_queries(job, b, head) : unit_keys(job, b, key_head);
    const Rows y = REVERSE ? upstream(job, b, head) : values(job, b, key_head);
    const Coefficients f = REVERSE ? coefficients_of(p, head) : Coefficients{1.0f, 1.0f, 1.0f};
    const float *row_term = REVERSE ? job.row_term + (static_cast<int64_t>(b) * p.query_heads + head) * p.length : nullptr;
    float head_ones_row = 0.0f, head_corner = 0.0f;
    for (int64_t token = start; token < stop; token += STEP) {
      __syncthreads();
      if (tid < STEP) {
        const int64_t n = token + tid;
        bool counts = n < stop && y.real(n);
        if (counts && y.segments != nullptr) counts = y.segments[n] == run;
        float weight = counts ? 1.0f : 0.0f;
        if (counts && tiles != nullptr) {
          const float gap = static_cast<float>(REVERSE ? tiles[n / TILE] - origin : origin - tiles[n / TILE]);
          const float own = job.decay[bs * p.length + n];
          weight = expf(fminf(REVERSE ? gap + own : gap - own, 0.0f));
        }
        weights[tid] = weight;
        last[tid] = counts ? (REVERSE ? row_term[n] : 1.0f) * weight : 0.0f;
      }
      if (p.degree == 1) stage<PRECISE>(features, FEATURE_STRIDE, x, token, STEP, first_feature, FEATURES, f.b);
      else stage<PRECISE>(vectors, vectors_stride, x, token, STEP, 0, vectors_stride);
      __syncthreads();
      stage<PRECISE>(value_rows, VALUE_STRIDE, y, token, STEP, 0, WIDTH, 1.0f, weights);
      if (p.degree == 2) {
        const float scale = multiplicity * (second_factor < 0 ? f.b : f.c);
        for (int t = tid / FEATURES; t < STEP; t += THREADS / FEATURES) {
          const float *row = vectors + t * vectors_stride;
          features[t * FEATURE_STRIDE + tid % FEATURES] = kept<PRECISE>(scale * row[first_factor] * (second_factor < 0 ? 1.0f : row[second_factor]));
        }
      }
      __syncthreads();
      multiply<PRECISE, false, false, PARTS>(acc, features + at.warp_row * 16, FEATURE_STRIDE, value_rows + at.warp_column * (WIDTH / 2), VALUE_STRIDE, STEP);
#pragma unroll
      for (int k = 0; k < STEP / 4; ++k) {
        const int t = tid % 4 * (STEP / 4) + k;
        last_column = fmaf(features[t * FEATURE_STRIDE + tid / 4], last[t], last_column);
      }
      if (first_feature == 0) {
        if (tid < WIDTH) {
          for (int t = 0; t < STEP; ++t) head_ones_row += value_rows[t * VALUE_STRIDE + tid];
        }
        if (tid < STEP) head_corner += last[tid];
      }
    }
    ones_row = fmaf(f.a, head_ones_row, ones_row);
    corner = fmaf(f.a, head_corner, corner);
  }

  float *state = job.states + (bs * job.chunks + chunk) * job.features * (width + 1);
  // the row of ones stands between the linear rows and the pairs
  auto row_at = [&](int feature) { return static_cast<int64_t>(feature < dim ? feature : feature + 1) * (width + 1); };
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int feature = first_feature + at.row(half);
    if (feature >= main_features) continue;
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int m = at.warp_column * (WIDTH / 2) + part * 8 + at.place * 2 + i;
        if (m < width) state[row_at(feature) + m] = acc[part][half * 2 + i];
      }
    }
  }
  last_column += __shfl_xor_sync(0xffffffffu, last_column, 1);
  last_column += __shfl_xor_sync(0xffffffffu, last_column, 2);
  if (tid % 4 == 0 && first_feature + tid / 4 < main_features) state[row_at(first_feature + tid / 4) + width] = last_column;
  if (first_feature == 0) {
    if (tid < width) state[static_cast<int64_t>(dim) * (width + 1) + tid] = ones_row;
    if (tid < STEP) {
      for (int step = 16; step > 0; step /= 2) corner += __shfl_xor_sync(0xffffffffu, corner, step);
      if (tid == 0) state[static_cast<int64_t>(dim) * (width + 1) + width] = corner;
    }
  }
}

template <int WIDTH, bool REVERSE, bool PRECISE>
cudaError_t launch(const Job &job, cudaStream_t stream) {
  const int feature_blocks = (job.features - 1 + FEATURES - 1) / FEATURES;
  const int64_t blocks = static_cast<int64_t>(job.p.batch) * job.p.state_heads * job.chunks * feature_blocks;
  const int bytes = static_cast<int>(shared_bytes<WIDTH>(job.p));
  const auto kernel = chunk_states<WIDTH, REVERSE, PRECISE>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(blocks), THREADS, bytes, stream>>>(job, feature_blocks);
  return cudaGetLastError();
}

template <int WIDTH>
cudaError_t launch(const Job &job, bool reverse, cudaStream_t stream) {
  if (job.p.dtype == LINATTN_FLOAT32) return reverse ? launch<WIDTH, true, true>(job, stream) : launch<WIDTH, false, true>(job, stream);
  return reverse ? launch<WIDTH, true, false>(job, stream) : launch<WIDTH, false, false>(job, stream);
}

}  // namespace

int states_shared_bytes(const linattn_problem &problem) {
  const int width = problem.value_dim;
  return static_cast<int>(width <= 64 ? shared_bytes<64>(problem) : width <= 128 ? shared_bytes<128>(problem) : shared_bytes<256>(problem));
}

cudaError_t launch_states(const Job &job, bool reverse, cudaStream_t stream) {
  if (job.p.value_dim <= 64) return launch<64>(job, reverse, stream);
  if (job.p.value_dim <= 128) return launch<128>(job, reverse, stream);
  return launch<256>(job, reverse, stream);
}

}  // namespace linattn
