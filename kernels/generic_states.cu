// The state of every chunk alone: sum over its tokens of features x values, each weighed by its decay to the chunk's end (or, in reverse,
// of the queries' features x [w, e], weighed by the decay since the chunk's start: the gradient of the state ahead of the chunk).
#include "generic.cuh"

namespace linattn {
namespace {

constexpr int FEATURES = 64;  // a block works on; the row of ones comes on top in the first block of each chunk

template <int WIDTH>
struct Shared {
  alignas(16) float features[FEATURES][DEPTH + PAD];
  alignas(16) float values[DEPTH][WIDTH];
  float vectors[DEPTH][MAX_DIM + 1];
  float last[DEPTH];  // the last column: 1, or e
};

template <int WIDTH, bool REVERSE>
__global__ void __launch_bounds__(THREADS) chunk_states(const __grid_constant__ Job job, int feature_blocks) {
  constexpr int ROWS = FEATURES / 16, COLUMNS = WIDTH / 16;
  __shared__ Shared<WIDTH> shared;
  const linattn_problem &p = job.p;
  const int dim = p.head_dim, width = p.value_dim;
  int64_t index = blockIdx.x;
  const int first_feature = static_cast<int>(index % feature_blocks) * FEATURES;
  index /= feature_blocks;
  const int64_t chunk = index % job.chunks, bs = index / job.chunks;
  const int b = static_cast<int>(bs / p.state_heads), state_head = static_cast<int>(bs % p.state_heads);
  const int64_t start = chunk * job.chunk, stop = smaller(start + job.chunk, p.length);
  const int key_head = state_head * job.state_group / job.group;
  const int main_features = job.features - 1;  // all but the row of ones
  const int tid = threadIdx.x, tx = tid % 16, ty = tid / 16;

  const int32_t *key_segments = segments_of(p.key_segments, p.key_segments_stride, b);
  const int run = key_segments == nullptr ? 0 : REVERSE ? run_before(key_segments, start) : run_behind(key_segments, stop);
  const double *tiles = job.decay == nullptr ? nullptr : job.decay_tiles + bs * (job.tiles + 1);
  const double origin = tiles == nullptr ? 0.0 : REVERSE ? tiles[start / TILE] : tiles[(stop + TILE - 1) / TILE];

  float acc[ROWS][COLUMNS] = {};
  float last_column = 0.0f, ones_row = 0.0f, corner = 0.0f;
  const int heads = REVERSE ? job.state_group : 1;
  for (int r = 0; r < heads; ++r) {
    const int head = state_head * job.state_group + r;
    const Rows x = REVERSE ? unit_queries(job, b, head) : unit_keys(job, b, key_head);
    const Rows y = REVERSE ? upstream(job, b, head) : values(job, b, key_head);
    const Coefficients f = REVERSE ? coefficients_of(p, head) : Coefficients{1.0f, 1.0f, 1.0f};
    const float *last = REVERSE ? job.row_term + (static_cast<int64_t>(b) * p.query_heads + head) * p.length : nullptr;
    float head_ones_row = 0.0f, head_corner = 0.0f;
    for (int64_t token = start; token < stop; token += DEPTH) {
      __syncthreads();
      stage_rows(&shared.vectors[0][0], MAX_DIM + 1, x, token, DEPTH, dim);
      for (int t = tid / 32; t < DEPTH; t += THREADS / 32) {
        const int64_t n = token + t;
        bool counts = n < stop && y.real(n);
        if (counts && y.segments != nullptr) counts = y.segments[n] == run;
        float weight = counts ? y.factor(n) : 0.0f, decay = 1.0f;
        if (counts && tiles != nullptr) {
          const float gap = static_cast<float>(REVERSE ? tiles[n / TILE] - origin : origin - tiles[n / TILE]);
          const float own = job.decay[bs * p.length + n];
          decay = expf(fminf(REVERSE ? gap + own : gap - own, 0.0f));
        }
        for (int m = tid % 32; m < WIDTH; m += 32) shared.values[t][m] = counts && m < width ? y.element(n, m) * weight * decay : 0.0f;
        if (tid % 32 == 0) shared.last[t] = counts ? (REVERSE ? last[n] : 1.0f) * decay : 0.0f;
      }
      __syncthreads();
      {
        const int row = tid / 4, feature = first_feature + row;
        int i = feature, j = -1;
        float scale = f.b;
        if (feature >= dim) {
          const int2 pair = pair_of(feature - dim, dim);
          i = pair.x;
          j = pair.y;
          scale = REVERSE && i != j ? 2.0f * f.c : f.c;
        }
#pragma unroll
        for (int k = 0; k < DEPTH / 4; ++k) {
          const int t = tid % 4 * (DEPTH / 4) + k;
          float v = 0.0f;
          if (feature < main_features) v = scale * shared.vectors[t][i] * (j < 0 ? 1.0f : shared.vectors[t][j]);
          shared.features[row][t] = v;
        }
      }
      __syncthreads();
      multiply<ROWS, COLUMNS>(acc, &shared.features[ty * ROWS][0], DEPTH + PAD, &shared.values[0][tx * 4], WIDTH);
#pragma unroll
      for (int k = 0; k < DEPTH / 4; ++k) {
        const int t = tid % 4 * (DEPTH / 4) + k;
        last_column = fmaf(shared.features[tid / 4][t], shared.last[t], last_column);
      }
      if (first_feature == 0) {
        for (int t = 0; t < DEPTH; ++t) {
          if (tid < WIDTH) head_ones_row += shared.values[t][tid];
          head_corner += shared.last[t];
        }
      }
    }
    ones_row = fmaf(f.a, head_ones_row, ones_row);
    corner = fmaf(f.a, head_corner, corner);
  }

  float *state = job.states + (bs * job.chunks + chunk) * job.features * (width + 1);
  // the row of ones stands between the linear rows and the pairs
  auto row_at = [&](int feature) { return static_cast<int64_t>(feature < dim ? feature : feature + 1) * (width + 1); };
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const int feature = first_feature + ty * ROWS + r;
    if (feature >= main_features) continue;
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
      const int m = column_of(tx, c);
      if (m < width) state[row_at(feature) + m] = acc[r][c];
    }
  }
  last_column += __shfl_xor_sync(0xffffffffu, last_column, 1);
  last_column += __shfl_xor_sync(0xffffffffu, last_column, 2);
  if (tid % 4 == 0 && first_feature + tid / 4 < main_features) state[row_at(first_feature + tid / 4) + width] = last_column;
  if (first_feature == 0) {
    if (tid < width) state[static_cast<int64_t>(dim) * (width + 1) + tid] = ones_row;
    if (tid == 0) state[static_cast<int64_t>(dim) * (width + 1) + width] = corner;
  }
}

template <int WIDTH>
cudaError_t launch(const Job &job, bool reverse, cudaStream_t stream) {
  const int feature_blocks = (job.features - 1 + FEATURES - 1) / FEATURES;
  const unsigned blocks = static_cast<unsigned>(job.p.batch * static_cast<int64_t>(job.p.state_heads) * job.chunks * feature_blocks);
  if (reverse) chunk_states<WIDTH, true><<<blocks, THREADS, 0, stream>>>(job, feature_blocks);
  else chunk_states<WIDTH, false><<<blocks, THREADS, 0, stream>>>(job, feature_blocks);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_states(const Job &job, bool reverse, cudaStream_t stream) {
  if (job.p.value_dim <= 64) return launch<64>(job, reverse, stream);
  if (job.p.value_dim <= 128) return launch<128>(job, reverse, stream);
  return launch<256>(job, reverse, stream);
}

}  // namespace linattn
