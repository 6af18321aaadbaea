// Rows gather values by the weights f(s): out and the mass g for queries, or the gradient of the values for keys.
#include "generic.cuh"

namespace linattn {
namespace {

template <int WIDTH>
struct Layout {  // of the dynamic shared memory, in floats
  static constexpr int ROWS = rows_of(WIDTH);
  static constexpr int RIGHT = DEPTH * (WIDTH > SLICE_STRIDE ? WIDTH : SLICE_STRIDE);
  static constexpr int PAIRS = ROWS * (TILE + PAD);
  static int x_stride(int dim) { return (dim + DEPTH - 1) / DEPTH * DEPTH + PAD; }
  static size_t bytes(int dim) { return sizeof(float) * (ROWS * x_stride(dim) + PAIRS + RIGHT + DEPTH + 3 * ROWS + 2 * TILE); }
};

template <int WIDTH, bool REVERSE>
__global__ void __launch_bounds__(THREADS) apply(const __grid_constant__ Job job, int x_stride, int64_t row_tiles) {
  using L = Layout<WIDTH>;
  constexpr int ROWS = L::ROWS, R = ROWS / 16, C = WIDTH / 16, LANES = THREADS / ROWS;
  extern __shared__ __align__(16) float shared[];
  float *x_rows = shared;                     // [ROWS][x_stride]: the row vectors
  float *pairs = x_rows + ROWS * x_stride;    // [ROWS][TILE + PAD]: weights, or features of the rows
  float *right = pairs + L::PAIRS;            // [DEPTH][...]
  float *right_last = right + L::RIGHT;       // [DEPTH]: the last column of the state
  float *row_decay = right_last + DEPTH, *row_carry = row_decay + ROWS, *row_mass = row_carry + ROWS;
  float *column_decay = row_mass + ROWS;
  int *column_run = reinterpret_cast<int *>(column_decay + TILE);

  const linattn_problem &p = job.p;
  const int tid = threadIdx.x, tx = tid % 16, ty = tid / 16;
  const int dim = p.head_dim, width = p.value_dim;
  const int heads = REVERSE ? p.key_heads : p.query_heads;
  const int64_t bh = blockIdx.x / row_tiles, tile_index = blockIdx.x % row_tiles;
  const int64_t row_tile = REVERSE ? tile_index : row_tiles - 1 - tile_index;  // the longest first
  const int b = static_cast<int>(bh / heads), row_head = static_cast<int>(bh % heads);
  const int64_t first_row = row_tile * ROWS, chunk = p.causal || job.direct ? first_row / job.chunk : 0;
  const int64_t start = chunk * job.chunk, stop = smaller(start + job.chunk, p.length);
  const int64_t own_tile = first_row / TILE;
  const int32_t *query_segments = segments_of(p.query_segments, p.query_segments_stride, b);
  const int32_t *key_segments = segments_of(p.key_segments, p.key_segments_stride, b);
  const int32_t *row_segments = REVERSE ? key_segments : query_segments;
  const int32_t *column_segments = REVERSE ? query_segments : key_segments;

  const Rows x = REVERSE ? unit_keys(job, b, row_head) : unit_queries(job, b, row_head);
  stage_rows(x_rows, x_stride, x, first_row, ROWS, x_stride);

  float acc[R][C] = {};
  float mass[R] = {};
  const int first_state = REVERSE ? row_head * job.group / job.state_group : row_head / job.state_group;
  const int state_heads = REVERSE ? job.group / job.state_group : 1;
  for (int state_index = 0; state_index < state_heads; ++state_index) {
    const int state_head = first_state + state_index;
    const int64_t bs = static_cast<int64_t>(b) * p.state_heads + state_head;
    const double *tiles = job.decay == nullptr ? nullptr : job.decay_tiles + bs * (job.tiles + 1);
    __syncthreads();
    if (tid < ROWS) {
      const int64_t n = first_row + tid;
      const bool real = n < p.length && (row_segments == nullptr || row_segments[n] > 0);
      row_decay[tid] = real && tiles != nullptr ? job.decay[bs * p.length + n] : 0.0f;
      float carry = real ? 1.0f : 0.0f;
      if (real && p.causal && row_segments != nullptr) {
        const int run = REVERSE ? run_behind(key_segments, stop) : run_before(key_segments, start);
        if (row_segments[n] != run) carry = 0.0f;
      }
      if (tiles != nullptr) {
        const float gap = static_cast<float>(REVERSE ? tiles[(stop + TILE - 1) / TILE] - tiles[own_tile] : tiles[own_tile] - tiles[start / TILE]);
        carry *= expf(fminf(REVERSE ? gap - row_decay[tid] : gap + row_decay[tid], 0.0f));
      }
      row_carry[tid] = carry;
    }
    __syncthreads();

    // ---- the state
    const bool first_chunk = p.causal && (REVERSE ? chunk == job.chunks - 1 && job.grad_state == nullptr : chunk == 0 && p.initial_state == nullptr);
    if ((REVERSE ? job.has_reverse : job.has_state) && !first_chunk) {
      const float *state = job.states + (bs * job.chunks + (p.causal ? chunk : 0)) * job.features * (width + 1);
      const Coefficients f = REVERSE ? Coefficients{1.0f, 1.0f, 1.0f} : coefficients_of(p, row_head);
      float sum[R][C] = {};
      float last = 0.0f;  // of row tid / LANES, this lane's share
      auto walk = [&](const float *left, int left_stride, int state_row, int count) {
        for (int t = tid / 32; t < DEPTH; t += THREADS / 32) {
          const float *from = state + static_cast<int64_t>(state_row + t) * (width + 1);
          for (int m = tid % 32; m < WIDTH; m += 32) right[t * WIDTH + m] = t < count && m < width ? from[m] : 0.0f;
          if (tid % 32 == 0) right_last[t] = t < count ? from[width] : 0.0f;
        }
        __syncthreads();
        multiply<R, C>(sum, left + ty * R * left_stride, left_stride, right + tx * 4, WIDTH);
        if (!REVERSE) {
          for (int k = tid % LANES; k < DEPTH; k += LANES) last = fmaf(left[tid / LANES * left_stride + k], right_last[k], last);
        }
        __syncthreads();
      };
      for (int k = 0; k < dim; k += DEPTH) walk(x_rows + k, x_stride, k, min(DEPTH, dim - k));
      const float *ones = state + static_cast<int64_t>(dim) * (width + 1);
#pragma unroll
      for (int c = 0; c < C; ++c) {
        const int m = column_of(tx, c);
        const float one = m < width ? f.a * ones[m] : 0.0f;
#pragma unroll
        for (int r = 0; r < R; ++r) sum[r][c] = fmaf(f.b, sum[r][c], one);
      }
      last *= f.b;
      if (tid % LANES == 0) last += f.a * ones[width];
      if (p.degree == 2) {
        const int count = dim * (dim + 1) / 2;
        for (int k = 0; k < count; k += DEPTH) {
          const int t = tid % DEPTH;
          const int2 pair = pair_of(min(k + t, count - 1), dim);
          const float scale = !REVERSE && pair.x != pair.y ? 2.0f * f.c : f.c;
          for (int r = tid / DEPTH; r < ROWS; r += THREADS / DEPTH)
            pairs[r * (DEPTH + PAD) + t] = k + t < count ? scale * x_rows[r * x_stride + pair.x] * x_rows[r * x_stride + pair.y] : 0.0f;
          walk(pairs, DEPTH + PAD, dim + 1 + k, min(DEPTH, count - k));
        }
      }
#pragma unroll
      for (int r = 0; r < R; ++r) {
#pragma unroll
        for (int c = 0; c < C; ++c) acc[r][c] = fmaf(row_carry[ty * R + r], sum[r][c], acc[r][c]);
      }
      if (!REVERSE) {
        for (int step = LANES / 2; step > 0; step /= 2) last += __shfl_xor_sync(0xffffffffu, last, step);
        if (tid % LANES == 0) row_mass[tid / LANES] = last * row_carry[tid / LANES];
        __syncthreads();
        if (tx == 0) {
#pragma unroll
          for (int r = 0; r < R; ++r) mass[r] = row_mass[ty * R + r];
        }
      }
    }
    if (!job.direct) continue;

    // ---- the pairs
    const int64_t first_tile = p.causal ? (REVERSE ? own_tile : start / TILE) : 0;
    const int64_t last_tile = p.causal ? (REVERSE ? (stop - 1) / TILE : own_tile) : job.tiles - 1;
    const int query_heads = REVERSE ? job.state_group : 1;
    for (int r_index = 0; r_index < query_heads; ++r_index) {
      const int query_head = REVERSE ? state_head * job.state_group + r_index : row_head;
      const Coefficients f = coefficients_of(p, query_head);
      const Rows y = REVERSE ? unit_queries(job, b, query_head) : unit_keys(job, b, row_head / job.group);
      const Rows z = REVERSE ? upstream(job, b, query_head) : values(job, b, row_head / job.group);
      for (int64_t tile = first_tile; tile <= last_tile; ++tile) {
        const int64_t first_column = tile * TILE;
        if (row_segments != nullptr && column_segments != nullptr) {  // runs only grow along the sequence: skip tiles that share none
          const int64_t last_row = smaller(first_row + ROWS, p.length) - 1, last_column = smaller(first_column + TILE, p.length) - 1;
          if (abs(column_segments[last_column]) < abs(row_segments[first_row]) || abs(column_segments[first_column]) > abs(row_segments[last_row]))
            continue;
        }
        __syncthreads();
        if (tid < TILE) {
          const int64_t n = first_column + tid;
          column_decay[tid] = n < p.length && tiles != nullptr ? job.decay[bs * p.length + n] : 0.0f;
          column_run[tid] = n < p.length ? (column_segments == nullptr ? 1 : column_segments[n]) : 0;
        }
        float s[R][4] = {};
        for (int k = 0; k < dim; k += DEPTH) {
          stage_slice(right, y, first_column, k);
          __syncthreads();
          multiply<R, 4>(s, x_rows + ty * R * x_stride + k, x_stride, right + tx * 4, SLICE_STRIDE);
          __syncthreads();
        }
        const float gap = tiles == nullptr ? 0.0f : static_cast<float>(REVERSE ? tiles[tile] - tiles[own_tile] : tiles[own_tile] - tiles[tile]);
#pragma unroll
        for (int r = 0; r < R; ++r) {
          const int64_t row = first_row + ty * R + r;
          const int run = row < p.length ? (row_segments == nullptr ? 1 : row_segments[row]) : 0;
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            const int at = tx * 4 + c;
            const int64_t column = first_column + at;
            const bool seen = run > 0 && column_run[at] == run && (!p.causal || (REVERSE ? column >= row : column <= row));
            float weight = seen ? f.weight(s[r][c]) : 0.0f;
            if (seen && tiles != nullptr) {
              const float between = REVERSE ? column_decay[at] - row_decay[ty * R + r] : row_decay[ty * R + r] - column_decay[at];
              weight *= expf(fminf(gap + between, 0.0f));
            }
            mass[r] += weight;
            pairs[(ty * R + r) * (TILE + PAD) + at] = weight;
          }
        }
        for (int k = 0; k < TILE; k += DEPTH) {
          stage_rows(right, WIDTH, z, first_column + k, DEPTH, WIDTH);
          __syncthreads();
          multiply<R, C>(acc, pairs + ty * R * (TILE + PAD) + k, TILE + PAD, right + tx * 4, WIDTH);
          __syncthreads();
        }
      }
    }
  }

  const linattn_tensor target = REVERSE ? job.grad_value : job.out;
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int64_t n = first_row + ty * R + r;
    const float g = REVERSE ? 1.0f : row_total(mass[r]);
    if (n >= p.length) continue;
    const bool real = row_segments == nullptr || row_segments[n] > 0;
    const float inverse = !real ? 0.0f : g == 0.0f ? 1.0f : 1.0f / g;
    const int64_t at = offset_of(target, b, row_head, n);
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const int m = column_of(tx, c);
      if (m >= width) continue;
      float value = acc[r][c] * inverse;
      if (!REVERSE && p.dropout_p != nullptr) value *= noise({p.dropout_p, p.seed}, b * p.query_heads + row_head, n, m);
      store(target.data, p.dtype, at + m, value);
    }
    if (!REVERSE && tx == 0) job.mass_out[bh * p.length + n] = real ? g : 0.0f;
  }
}

template <int WIDTH>
cudaError_t launch(const Job &job, bool reverse, cudaStream_t stream) {
  using L = Layout<WIDTH>;
  const linattn_problem &p = job.p;
  const int64_t row_tiles = (p.length + L::ROWS - 1) / L::ROWS;
  const int64_t heads = static_cast<int64_t>(p.batch) * (reverse ? p.key_heads : p.query_heads);
  const int bytes = static_cast<int>(L::bytes(p.head_dim));
  const auto kernel = reverse ? apply<WIDTH, true> : apply<WIDTH, false>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(heads * row_tiles), THREADS, bytes, stream>>>(job, L::x_stride(p.head_dim), row_tiles);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_apply(const Job &job, bool reverse, cudaStream_t stream) {
  const int width = job.p.value_dim > job.p.head_dim ? job.p.value_dim : job.p.head_dim;
  if (width <= 64) return launch<64>(job, reverse, stream);
  if (width <= 128) return launch<128>(job, reverse, stream);
  return launch<256>(job, reverse, stream);
}

}  // namespace linattn
