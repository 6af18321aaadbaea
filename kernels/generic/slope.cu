// architectures: sm_80 compute_80 sm_90
// Rows gather columns by the gradient of the weights: dq for queries, dk for keys, and the sums that the coefficients and the decay need.
#include "generic/tile.cuh"

namespace linattn {
namespace {

template <int WIDTH>
size_t shared_bytes(int dim, int width) {
  using S = Shape<WIDTH>;
  return sizeof(float) * (S::ROWS * (left_stride(dim) + left_stride(width) + S::PAIR_STRIDE) + S::RIGHT + 4 * S::ROWS + S::COLUMN_WARPS * S::ROWS + 3 * TILE);
}

template <int WIDTH, bool REVERSE, bool PRECISE>
__global__ void __launch_bounds__(THREADS, 2) slope(const __grid_constant__ Job job, int64_t row_tiles) {
  using S = Shape<WIDTH>;
  constexpr int ROWS = S::ROWS;
  constexpr bool AHEAD = !PRECISE;  // fetch each slice during the product before it; precise products leave no registers for that
  const linattn_problem &p = job.p;
  const int dim = p.head_dim, width = p.value_dim;
  const int x_stride = left_stride(dim), u_stride = left_stride(width);
  extern __shared__ __align__(16) float shared[];
  float *x_rows = shared;                          // [ROWS][x_stride]: q or k
  float *u_rows = x_rows + ROWS * x_stride;        // [ROWS][u_stride]: w or v
  float *pairs = u_rows + ROWS * u_stride;         // [ROWS][PAIR_STRIDE]
  float *right = pairs + ROWS * S::PAIR_STRIDE;    // a slice of the columns' vectors or of the state
  float *row_decay = right + S::RIGHT, *row_carry = row_decay + ROWS, *row_ones = row_carry + ROWS;
  float *row_last = row_ones + ROWS;               // the last column beside u: e or 1
  float *scratch = row_last + ROWS;
  float *column_decay = scratch + S::COLUMN_WARPS * ROWS, *column_last = column_decay + TILE;
  int *column_run = reinterpret_cast<int *>(column_last + TILE);

  const int tid = threadIdx.x;
  const Place at(S::ROW_WARPS);
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
  const float *x_own = x_rows + at.warp_row * 16 * x_stride, *u_own = u_rows + at.warp_row * 16 * u_stride;

  const Rows x = REVERSE ? unit_keys(job, b, row_head) : unit_queries(job, b, row_head);
  const Rows u = REVERSE ? values(job, b, row_head) : upstream(job, b, row_head);
  stage<PRECISE>(x_rows, x_stride, x, first_row, ROWS, 0, x_stride);
  stage<PRECISE>(u_rows, u_stride, u, first_row, ROWS, 0, u_stride);
  if (tid < ROWS) {
    const int64_t n = first_row + tid;
    row_last[tid] = !u.real(n) ? 0.0f : REVERSE ? 1.0f : job.row_term[bh * p.length + n];
  }
  int row_run[2];  // 0 past the end and in padding
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t n = first_row + at.row(half);
    row_run[half] = n >= p.length ? 0 : row_segments == nullptr ? 1 : max(row_segments[n], 0);
  }

  float acc[S::PARTS][4] = {};
  float sum0[2] = {}, sum1[2] = {}, sum2[2] = {};  // of dA exp(..) s^k over the columns
  const int first_state = REVERSE ? row_head * job.group / job.state_group : row_head / job.state_group;
  const int state_heads = REVERSE ? job.group / job.state_group : 1;
  for (int state_index = 0; state_index < state_heads; ++state_index) {
    const int state_head = first_state + state_index;
    const int64_t bs = static_cast<int64_t>(b) * p.state_heads + state_head;
    const double *tiles = job.decay == nullptr ? nullptr : job.decay_tiles + bs * (job.tiles + 1);
    float total[2] = {};  // of A dA
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
    const bool nothing_carried = p.causal && (REVERSE ? chunk == job.chunks - 1 && job.grad_state == nullptr : chunk == 0 && p.initial_state == nullptr);
    if ((REVERSE ? job.has_reverse : job.has_state) && !nothing_carried) {
      const float *state = job.states + (bs * job.chunks + (p.causal ? chunk : 0)) * job.features * (width + 1);
      const Coefficients f = REVERSE ? Coefficients{1.0f, 1.0f, 1.0f} : coefficients_of(p, row_head);
      // Where (pair, j) lies in the state, behind the linear rows and the row of ones. Pair -1 is the linear rows: as if vectors began with a 1.
      auto row_of_pair = [&](int pair, int j) { return state + static_cast<int64_t>(dim + (pair < 0 ? 0 : 1) + pair_start(min(pair, j), dim) + abs(pair - j)) * (width + 1); };

      float ones = 0.0f;
      const int own_row = tid / S::LANES;
      const float *ones_row = state + static_cast<int64_t>(dim) * (width + 1);
      for (int m = tid % S::LANES; m < width; m += S::LANES) ones = fmaf(u_rows[own_row * u_stride + m], ones_row[m], ones);
      if (tid % S::LANES == 0) ones = fmaf(row_last[own_row], ones_row[width], ones);
      for (int step = S::LANES / 2; step > 0; step /= 2) ones += __shfl_xor_sync(0xffffffffu, ones, step);
      if (tid % S::LANES == 0) row_ones[own_row] = ones;
      __syncthreads();

      const int last_pair = p.degree == 2 ? dim - 1 : -1;
#pragma unroll 1
      for (int pair = -1; pair <= last_pair; ++pair) {
        const bool linear = pair < 0;
        float part_sum[S::PARTS][4];  // [row][j]: [u, last] . state row of (pair, j)
#pragma unroll
        for (int part = 0; part < S::PARTS; ++part) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int j = column_of<WIDTH>(at, part, i % 2);
            part_sum[part][i] = j < dim ? row_last[at.row(i / 2)] * row_of_pair(pair, j)[width] : 0.0f;
          }
        }
#pragma unroll 1
        for (int slice = 0; slice < S::SLICES && slice * S::SLICE < dim; ++slice) {
          for (int k = 0; k < width; k += TILE) {
            for (int index = tid; index < S::SLICE * TILE; index += THREADS) {
              const int j = slice * S::SLICE + index / TILE, m = k + index % TILE;
              right[index / TILE * (TILE + 8) + index % TILE] = kept<PRECISE>(j < dim && m < width ? row_of_pair(pair, j)[m] : 0.0f);
            }
            __syncthreads();
            multiply_slice<WIDTH, PRECISE, true>(part_sum, slice, u_own + k, u_stride, right + at.warp_column * (S::SLICE_PARTS * 8) * (TILE + 8), TILE + 8,
                                                 min(TILE, (width - k + 7) / 8 * 8));
            __syncthreads();
          }
        }
        // the state holds each pair once; R holds it with both orders in it, and its diagonal counts twice in a derivative
        const float weight = linear ? f.b : REVERSE ? 1.0f : 2.0f * f.c, share = linear ? 1.0f : 0.5f;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = at.row(half);
          const float carry = row_carry[row], factor = linear ? carry : carry * x_rows[row * x_stride + pair];
          if (linear && at.warp_column == 0 && at.place == 0) {
            sum0[half] = fmaf(carry, row_ones[row], sum0[half]);
            if (REVERSE) total[half] = fmaf(carry, row_ones[row], total[half]);
          }
          float sum = linear ? sum1[half] : sum2[half];
#pragma unroll
          for (int part = 0; part < S::PARTS; ++part) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const int d = column_of<WIDTH>(at, part, i);
              const float own = d < dim ? x_rows[row * x_stride + d] : 0.0f;
              const float term = factor * part_sum[part][half * 2 + i] * (REVERSE && d == pair ? 2.0f : 1.0f);
              sum = fmaf(own, term, sum);
              if (REVERSE) total[half] = fmaf(share * own, term, total[half]);
              acc[part][half * 2 + i] = fmaf(weight, term, acc[part][half * 2 + i]);
            }
          }
          (linear ? sum1 : sum2)[half] = sum;
        }
      }
    }

    // ---- the pairs
    const int64_t first_tile = p.causal ? (REVERSE ? own_tile : start / TILE) : 0;
    const int64_t last_tile = !job.direct ? -1 : p.causal ? (REVERSE ? (stop - 1) / TILE : own_tile) : job.tiles - 1;
    const int query_heads = REVERSE ? job.state_group : 1;
    auto following = [&](int64_t tile) { return next_tile(tile, last_tile, row_segments, column_segments, first_row, smaller(first_row + ROWS, p.length) - 1, p.length); };
    for (int r_index = 0; r_index < query_heads; ++r_index) {
      const int query_head = REVERSE ? state_head * job.state_group + r_index : row_head;
      const Coefficients f = coefficients_of(p, query_head);
      const Rows y = REVERSE ? unit_queries(job, b, query_head) : unit_keys(job, b, row_head / job.group);
      const Rows z = REVERSE ? upstream(job, b, query_head) : values(job, b, row_head / job.group);
      int64_t tile = following(first_tile);
      Slice<PRECISE, S::SLICE> slice_on_its_way;
      if (AHEAD && tile <= last_tile) slice_on_its_way.fetch(z, tile * TILE, 0);
      while (tile <= last_tile) {
        const int64_t first_column = tile * TILE, after = following(tile + 1);
        if (tid < TILE) {
          const int64_t n = first_column + tid;
          const bool inside = n < p.length;
          column_decay[tid] = inside && tiles != nullptr ? job.decay[bs * p.length + n] : 0.0f;
          column_last[tid] = REVERSE && inside ? job.row_term[(static_cast<int64_t>(b) * p.query_heads + query_head) * p.length + n] : 0.0f;
          column_run[tid] = inside ? (column_segments == nullptr ? 1 : column_segments[n]) : -1;
        }
        float s[S::PAIR_PARTS][4] = {}, grad[S::PAIR_PARTS][4] = {};
        for (int k = 0; k < width; k += S::SLICE) {
          if (!AHEAD) slice_on_its_way.fetch(z, first_column, k);
          slice_on_its_way.put(right, S::SLICE + 8, z, first_column, k);
          __syncthreads();
          if (AHEAD) {
            if (k + S::SLICE < width) slice_on_its_way.fetch(z, first_column, k + S::SLICE);
            else slice_on_its_way.fetch(y, first_column, 0);
          }
          multiply<PRECISE, true, true, S::PAIR_PARTS>(grad, u_own + k, u_stride, right + at.warp_column * (S::PAIR_PARTS * 8) * (S::SLICE + 8), S::SLICE + 8,
                                                       min(S::SLICE, (width - k + 7) / 8 * 8));
          __syncthreads();
        }
        for (int k = 0; k < dim; k += S::SLICE) {
          if (!AHEAD) slice_on_its_way.fetch(y, first_column, k);
          slice_on_its_way.put(right, S::SLICE + 8, y, first_column, k);
          __syncthreads();
          if (AHEAD && S::SLICES > 1) slice_on_its_way.fetch(y, first_column, k + S::SLICE < dim ? k + S::SLICE : 0);
          multiply<PRECISE, true, true, S::PAIR_PARTS>(s, x_own + k, x_stride, right + at.warp_column * (S::PAIR_PARTS * 8) * (S::SLICE + 8), S::SLICE + 8,
                                                       min(S::SLICE, (dim - k + 7) / 8 * 8));
          __syncthreads();
        }
        const float gap = tiles == nullptr ? 0.0f : static_cast<float>(REVERSE ? tiles[tile] - tiles[own_tile] : tiles[own_tile] - tiles[tile]);
        const bool inner = !p.causal || tile != own_tile;  // no row of the tile is beside a column it may not see for its place
#pragma unroll
        for (int part = 0; part < S::PAIR_PARTS; ++part) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float2 slopes;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const int at_column = pair_column_of<WIDTH>(at, part, i);
              const int distance = static_cast<int>(first_row - first_column) + at.row(half) - at_column;  // of two tokens of one tile
              const bool seen = row_run[half] == column_run[at_column] && (inner || (REVERSE ? distance <= 0 : distance >= 0));
              float gradient = seen ? grad[part][half * 2 + i] + (REVERSE ? column_last[at_column] : row_last[at.row(half)]) : 0.0f;
              if (seen && tiles != nullptr) {
                const float own = row_decay[at.row(half)], other = column_decay[at_column];
                gradient *= expf(fminf(gap + (REVERSE ? other - own : own - other), 0.0f));
              }
              const float score = seen ? s[part][half * 2 + i] : 0.0f;
              if (REVERSE) {
                total[half] = fmaf(gradient, f.weight(score), total[half]);
              } else {
                sum0[half] += gradient;
                sum1[half] = fmaf(gradient, score, sum1[half]);
                sum2[half] = fmaf(gradient * score, score, sum2[half]);
              }
              (i == 0 ? slopes.x : slopes.y) = kept<PRECISE>(gradient * f.slope(score));
            }
            *reinterpret_cast<float2 *>(&pairs[at.row(half) * S::PAIR_STRIDE + pair_column_of<WIDTH>(at, part, 0)]) = slopes;
          }
        }
#pragma unroll 1
        for (int slice = 0; slice < S::SLICES && slice * S::SLICE < dim; ++slice) {
          if (!AHEAD && S::SLICES > 1) slice_on_its_way.fetch(y, first_column, slice * S::SLICE);
          slice_on_its_way.put(right, S::SLICE + 4, y, first_column, slice * S::SLICE);
          __syncthreads();
          if (AHEAD) {
            if ((slice + 1) * S::SLICE < dim) slice_on_its_way.fetch(y, first_column, (slice + 1) * S::SLICE);
            else if (after <= last_tile) slice_on_its_way.fetch(z, after * TILE, 0);
          }
          multiply_slice<WIDTH, PRECISE, false>(acc, slice, pairs + at.warp_row * 16 * S::PAIR_STRIDE, S::PAIR_STRIDE, right + at.warp_column * (S::SLICE_PARTS * 8), S::SLICE + 4,
                                                TILE);
          __syncthreads();
        }
        tile = after;
      }
    }
    if (REVERSE && job.column_sums != nullptr) {
      row_totals<WIDTH>(total, scratch, at);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t n = first_row + at.row(half);
        if (at.warp_column == 0 && at.place == 0 && n < p.length) job.column_sums[bs * p.length + n] = total[half];
      }
    }
  }

  if (!REVERSE) {
    row_totals<WIDTH>(sum0, scratch, at);
    row_totals<WIDTH>(sum1, scratch, at);
    row_totals<WIDTH>(sum2, scratch, at);
    float *const sums = pairs;  // [3][ROWS]
    if (at.warp_column == 0 && at.place == 0) {
      const Coefficients f = coefficients_of(p, row_head);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = at.row(half);
        const int64_t n = first_row + row;
        sums[row] = sum0[half];
        sums[ROWS + row] = sum1[half];
        sums[2 * ROWS + row] = sum2[half];
        if (job.row_sums != nullptr && n < p.length) job.row_sums[bh * p.length + n] = f.a * sum0[half] + f.b * sum1[half] + f.c * sum2[half];
      }
    }
    __syncthreads();
    if (tid < 3) {
      float sum = 0.0f;
      for (int row = 0; row < ROWS; ++row) sum += sums[tid * ROWS + row];
      job.coefficient_parts[(bh * row_tiles + row_tile) * 3 + tid] = sum;
    }
  }

  float along[2] = {};  // the part of the gradient along the unit vector, which normalisation takes away
  if (p.normalize_qk) {
#pragma unroll
    for (int part = 0; part < S::PARTS; ++part) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int d = column_of<WIDTH>(at, part, i % 2);
        if (d < dim) along[i / 2] = fmaf(acc[part][i], x_rows[at.row(i / 2) * x_stride + d], along[i / 2]);
      }
    }
    row_totals<WIDTH>(along, scratch, at);
  }
  const linattn_tensor target = REVERSE ? job.grad_key : job.grad_query;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = at.row(half);
    const int64_t n = first_row + row;
    if (n >= p.length) continue;
    const bool real = row_run[half] > 0;
    const float scale = real ? x.factor(n) : 0.0f;
    const int64_t to = offset_of(target, b, row_head, n);
#pragma unroll
    for (int part = 0; part < S::PARTS; ++part) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int d = column_of<WIDTH>(at, part, i);
        if (d < dim) store(target.data, p.dtype, to + d, real ? (acc[part][half * 2 + i] - along[half] * x_rows[row * x_stride + d]) * scale : 0.0f);
      }
    }
  }
}

template <int WIDTH, bool REVERSE, bool PRECISE>
cudaError_t launch(const Job &job, cudaStream_t stream) {
  const linattn_problem &p = job.p;
  const int64_t row_tiles = (p.length + Shape<WIDTH>::ROWS - 1) / Shape<WIDTH>::ROWS;
  const int64_t heads = static_cast<int64_t>(p.batch) * (REVERSE ? p.key_heads : p.query_heads);
  const int bytes = static_cast<int>(shared_bytes<WIDTH>(p.head_dim, p.value_dim));
  const auto kernel = slope<WIDTH, REVERSE, PRECISE>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(heads * row_tiles), THREADS, bytes, stream>>>(job, row_tiles);
  return cudaGetLastError();
}

template <int WIDTH>
cudaError_t launch(const Job &job, bool reverse, cudaStream_t stream) {
  if (job.p.dtype == LINATTN_FLOAT32) return reverse ? launch<WIDTH, true, true>(job, stream) : launch<WIDTH, false, true>(job, stream);
  return reverse ? launch<WIDTH, true, false>(job, stream) : launch<WIDTH, false, false>(job, stream);
}

}  // namespace

int slope_shared_bytes(const linattn_problem &problem) {
  const int width = problem.value_dim > problem.head_dim ? problem.value_dim : problem.head_dim;
  return static_cast<int>(width <= 64    ? shared_bytes<64>(problem.head_dim, problem.value_dim)
                          : width <= 128 ? shared_bytes<128>(problem.head_dim, problem.value_dim)
                                         : shared_bytes<256>(problem.head_dim, problem.value_dim));
}

cudaError_t launch_slope(const Job &job, bool reverse, cudaStream_t stream) {
  const int width = job.p.value_dim > job.p.head_dim ? job.p.value_dim : job.p.head_dim;
  if (width <= 64) return launch<64>(job, reverse, stream);
  if (width <= 128) return launch<128>(job, reverse, stream);
  return launch<256>(job, reverse, stream);
}

}  // namespace linattn
