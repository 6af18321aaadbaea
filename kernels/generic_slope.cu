// Rows gather columns by the gradient of the weights: dq for queries, dk for keys, and the sums that the coefficients and the decay need.
#include "generic.cuh"

namespace linattn {
namespace {

template <int WIDTH>
struct Layout {  // of the dynamic shared memory, in floats
  static constexpr int ROWS = rows_of(WIDTH);
  static constexpr int RIGHT_STRIDE = WIDTH + PAD;
  static constexpr int PAIRS = ROWS * (TILE + PAD);
  static int stride(int columns) { return (columns + DEPTH - 1) / DEPTH * DEPTH + PAD; }
  static size_t bytes(int dim, int width) {
    return sizeof(float) * (ROWS * (stride(dim) + stride(width + 1)) + PAIRS + DEPTH * RIGHT_STRIDE + 3 * ROWS + 3 * TILE);
  }
};

template <int WIDTH, bool REVERSE>
__global__ void __launch_bounds__(THREADS) slope(const __grid_constant__ Job job, int x_stride, int u_stride, int64_t row_tiles) {
  using L = Layout<WIDTH>;
  constexpr int ROWS = L::ROWS, R = ROWS / 16, C = WIDTH / 16, LANES = THREADS / ROWS;
  extern __shared__ __align__(16) float shared[];
  float *x_rows = shared;                     // [ROWS][x_stride]: q or k
  float *u_rows = x_rows + ROWS * x_stride;   // [ROWS][u_stride]: [w, e] or [v, 1]
  float *pairs = u_rows + ROWS * u_stride;    // [ROWS][TILE + PAD]
  float *right = pairs + L::PAIRS;            // [DEPTH][...]
  float *row_decay = right + DEPTH * L::RIGHT_STRIDE, *row_carry = row_decay + ROWS, *row_ones = row_carry + ROWS;
  float *column_decay = row_ones + ROWS, *column_term = column_decay + TILE;
  int *column_run = reinterpret_cast<int *>(column_term + TILE);

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
  const Rows u = REVERSE ? values(job, b, row_head) : upstream(job, b, row_head);
  stage_rows(x_rows, x_stride, x, first_row, ROWS, x_stride);
  stage_rows(u_rows, u_stride, u, first_row, ROWS, u_stride);
  __syncthreads();
  if (tid < ROWS) {
    const int64_t n = first_row + tid;
    u_rows[tid * u_stride + width] = !u.real(n) ? 0.0f : REVERSE ? 1.0f : job.row_term[bh * p.length + n];
  }

  float acc[R][C] = {};
  float sum0[R] = {}, sum1[R] = {}, sum2[R] = {};  // of dA exp(..) s^k over the columns
  const int first_state = REVERSE ? row_head * job.group / job.state_group : row_head / job.state_group;
  const int state_heads = REVERSE ? job.group / job.state_group : 1;
  for (int state_index = 0; state_index < state_heads; ++state_index) {
    const int state_head = first_state + state_index;
    const int64_t bs = static_cast<int64_t>(b) * p.state_heads + state_head;
    const double *tiles = job.decay == nullptr ? nullptr : job.decay_tiles + bs * (job.tiles + 1);
    float total[R] = {};  // of A dA
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
      float part[R][C];
      // part[r][j] = [u, last] . state row of (pair, j); pair < 0: the linear rows
      auto product = [&](int pair) {
#pragma unroll
        for (int r = 0; r < R; ++r) {
#pragma unroll
          for (int c = 0; c < C; ++c) part[r][c] = 0.0f;
        }
        for (int k = 0; k <= width; k += DEPTH) {
          const int m = tid % 4 * 4;
#pragma unroll
          for (int part_of = 0; part_of < WIDTH / 64; ++part_of) {
            const int j = tid / 4 + part_of * 64;
            const int row = pair < 0 ? j : dim + 1 + pair_start(min(pair, j), dim) + abs(pair - j);
            const float *from = state + static_cast<int64_t>(row) * (width + 1) + k + m;
#pragma unroll
            for (int i = 0; i < 4; ++i) right[(m + i) * L::RIGHT_STRIDE + j] = j < dim && k + m + i <= width ? from[i] : 0.0f;
          }
          __syncthreads();
          multiply<R, C>(part, u_rows + ty * R * u_stride + k, u_stride, right + tx * 4, L::RIGHT_STRIDE);
          __syncthreads();
        }
      };

      float ones = 0.0f;
      const float *ones_row = state + static_cast<int64_t>(dim) * (width + 1);
      for (int m = tid % LANES; m <= width; m += LANES) ones = fmaf(u_rows[tid / LANES * u_stride + m], ones_row[m], ones);
      for (int step = LANES / 2; step > 0; step /= 2) ones += __shfl_xor_sync(0xffffffffu, ones, step);
      if (tid % LANES == 0) row_ones[tid / LANES] = ones;

      product(-1);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const float carry = row_carry[ty * R + r];
        if (tx == 0) sum0[r] = fmaf(carry, row_ones[ty * R + r], sum0[r]);
        if (REVERSE && tx == 0) total[r] = fmaf(carry, row_ones[ty * R + r], total[r]);
#pragma unroll
        for (int c = 0; c < C; ++c) {
          const int d = column_of(tx, c);
          const float own = d < dim ? x_rows[(ty * R + r) * x_stride + d] : 0.0f;
          const float term = carry * part[r][c];
          sum1[r] = fmaf(own, term, sum1[r]);
          if (REVERSE) total[r] = fmaf(own, term, total[r]);
          acc[r][c] = fmaf(f.b, term, acc[r][c]);
        }
      }
      if (p.degree == 2) {
        for (int i = 0; i < dim; ++i) {
          product(i);
#pragma unroll
          for (int r = 0; r < R; ++r) {
            const float factor = row_carry[ty * R + r] * x_rows[(ty * R + r) * x_stride + i];
#pragma unroll
            for (int c = 0; c < C; ++c) {
              const int d = column_of(tx, c);
              const float own = d < dim ? x_rows[(ty * R + r) * x_stride + d] : 0.0f;
              // the state holds each pair once; R holds it with both orders in it, and its diagonal counts twice in a derivative
              const float term = factor * part[r][c] * (REVERSE ? (d == i ? 2.0f : 1.0f) : 1.0f);
              sum2[r] = fmaf(own, term, sum2[r]);
              if (REVERSE) total[r] = fmaf(0.5f * own, term, total[r]);
              acc[r][c] = fmaf(REVERSE ? 1.0f : 2.0f * f.c, term, acc[r][c]);
            }
          }
        }
      }
    }

    // ---- the pairs
    const int64_t first_tile = p.causal ? (REVERSE ? own_tile : start / TILE) : 0;
    const int64_t last_tile = !job.direct ? -1 : p.causal ? (REVERSE ? (stop - 1) / TILE : own_tile) : job.tiles - 1;
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
          const bool inside = n < p.length;
          column_decay[tid] = inside && tiles != nullptr ? job.decay[bs * p.length + n] : 0.0f;
          column_term[tid] = REVERSE && inside ? job.row_term[(static_cast<int64_t>(b) * p.query_heads + query_head) * p.length + n] : 0.0f;
          column_run[tid] = inside ? (column_segments == nullptr ? 1 : column_segments[n]) : 0;
        }
        float s[R][4] = {}, grad[R][4] = {};
        for (int k = 0; k < dim; k += DEPTH) {
          stage_slice(right, y, first_column, k);
          __syncthreads();
          multiply<R, 4>(s, x_rows + ty * R * x_stride + k, x_stride, right + tx * 4, SLICE_STRIDE);
          __syncthreads();
        }
        for (int k = 0; k < width; k += DEPTH) {
          stage_slice(right, z, first_column, k);
          __syncthreads();
          multiply<R, 4>(grad, u_rows + ty * R * u_stride + k, u_stride, right + tx * 4, SLICE_STRIDE);
          __syncthreads();
        }
        const float gap = tiles == nullptr ? 0.0f : static_cast<float>(REVERSE ? tiles[tile] - tiles[own_tile] : tiles[own_tile] - tiles[tile]);
#pragma unroll
        for (int r = 0; r < R; ++r) {
          const int64_t row = first_row + ty * R + r;
          const int run = row < p.length ? (row_segments == nullptr ? 1 : row_segments[row]) : 0;
          const float term = REVERSE ? 0.0f : u_rows[(ty * R + r) * u_stride + width];
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            const int at = tx * 4 + c;
            const int64_t column = first_column + at;
            const bool seen = run > 0 && column_run[at] == run && (!p.causal || (REVERSE ? column >= row : column <= row));
            float gradient = seen ? grad[r][c] + (REVERSE ? column_term[at] : term) : 0.0f;
            if (seen && tiles != nullptr) {
              const float between = REVERSE ? column_decay[at] - row_decay[ty * R + r] : row_decay[ty * R + r] - column_decay[at];
              gradient *= expf(fminf(gap + between, 0.0f));
            }
            const float product = seen ? s[r][c] : 0.0f;
            sum0[r] += gradient;
            sum1[r] = fmaf(gradient, product, sum1[r]);
            sum2[r] = fmaf(gradient * product, product, sum2[r]);
            if (REVERSE) total[r] = fmaf(gradient, f.weight(product), total[r]);
            pairs[(ty * R + r) * (TILE + PAD) + at] = gradient * f.slope(product);
          }
        }
        for (int k = 0; k < TILE; k += DEPTH) {
          stage_rows(right, L::RIGHT_STRIDE, y, first_column + k, DEPTH, WIDTH);
          __syncthreads();
          multiply<R, C>(acc, pairs + ty * R * (TILE + PAD) + k, TILE + PAD, right + tx * 4, L::RIGHT_STRIDE);
          __syncthreads();
        }
      }
    }
    if (REVERSE && job.column_sums != nullptr) {
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const int64_t n = first_row + ty * R + r;
        const float sum = row_total(total[r]);
        if (tx == 0 && n < p.length) job.column_sums[bs * p.length + n] = sum;
      }
    }
  }

  const linattn_tensor target = REVERSE ? job.grad_key : job.grad_query;
  float *const sums = pairs;  // [3][ROWS]
  if (!REVERSE) __syncthreads();
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int row = ty * R + r;
    const int64_t n = first_row + row;
    if (!REVERSE) {
      sum0[r] = row_total(sum0[r]);
      sum1[r] = row_total(sum1[r]);
      sum2[r] = row_total(sum2[r]);
      if (tx == 0) {
        sums[row] = sum0[r];
        sums[ROWS + row] = sum1[r];
        sums[2 * ROWS + row] = sum2[r];
        if (job.row_sums != nullptr && n < p.length) {
          const Coefficients f = coefficients_of(p, row_head);
          job.row_sums[bh * p.length + n] = f.a * sum0[r] + f.b * sum1[r] + f.c * sum2[r];
        }
      }
    }
    float along = 0.0f;
    if (p.normalize_qk) {
#pragma unroll
      for (int c = 0; c < C; ++c) {
        const int d = column_of(tx, c);
        if (d < dim) along = fmaf(acc[r][c], x_rows[row * x_stride + d], along);
      }
      along = row_total(along);
    }
    if (n >= p.length) continue;
    const bool real = x.real(n);
    const float scale = real ? x.factor(n) : 0.0f;
    const int64_t at = offset_of(target, b, row_head, n);
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const int d = column_of(tx, c);
      if (d < dim) store(target.data, p.dtype, at + d, real ? (acc[r][c] - along * x_rows[row * x_stride + d]) * scale : 0.0f);
    }
  }
  if (!REVERSE) {
    __syncthreads();
    if (tid < 3) {
      float sum = 0.0f;
      for (int row = 0; row < ROWS; ++row) sum += sums[tid * ROWS + row];
      job.coefficient_parts[(bh * row_tiles + row_tile) * 3 + tid] = sum;
    }
  }
}

template <int WIDTH>
cudaError_t launch(const Job &job, bool reverse, cudaStream_t stream) {
  using L = Layout<WIDTH>;
  const linattn_problem &p = job.p;
  const int64_t row_tiles = (p.length + L::ROWS - 1) / L::ROWS;
  const int64_t heads = static_cast<int64_t>(p.batch) * (reverse ? p.key_heads : p.query_heads);
  const int bytes = static_cast<int>(L::bytes(p.head_dim, p.value_dim));
  const auto kernel = reverse ? slope<WIDTH, true> : slope<WIDTH, false>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(heads * row_tiles), THREADS, bytes, stream>>>(job, L::stride(p.head_dim), L::stride(p.value_dim + 1), row_tiles);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_slope(const Job &job, bool reverse, cudaStream_t stream) {
  const int width = job.p.value_dim > job.p.head_dim ? job.p.value_dim : job.p.head_dim;
  if (width <= 64) return launch<64>(job, reverse, stream);
  if (width <= 128) return launch<128>(job, reverse, stream);
  return launch<256>(job, reverse, stream);
}

}  // namespace linattn
