// architectures: sm_80 compute_80 sm_90
// Rows gather columns by the gradient of the weights: dq for queries, dk for keys, and the sums that the coefficients and the decay need.
#include "generic/span.cuh"

namespace linattn {
namespace {

template <int WIDTH>
size_t shared_bytes(int dim, int width) {
  using S = Shape<WIDTH>;
  return sizeof(float) * (S::ROWS * (left_stride(dim) + left_stride(width) + S::PAIR_STRIDE) + S::RIGHT + 4 * S::ROWS + S::COLUMN_WARPS * S::ROWS + 3 * TILE);
}

// The work of a block. Every step is made part of `run`, and every member is a register; sums are handed from step to step.
template <int WIDTH, bool REVERSE, bool PRECISE>
struct Slope {
  using S = Shape<WIDTH>;
  using Sums = float[S::PARTS][4];
  using PairSums = float[S::PAIR_PARTS][4];
  static constexpr int ROWS = S::ROWS;
  static constexpr bool AHEAD = !PRECISE;  // fetch each slice during the product before it; precise products leave no registers for that

  // Of dA exp(..) s^k over the columns, for a thread's two rows: its share.
  struct Totals {
    float sum0[2] = {}, sum1[2] = {}, sum2[2] = {};
  };

  const Job &job;
  const linattn_problem &p;
  const int dim, width, x_stride, u_stride;
  float *const x_rows;     // [ROWS][x_stride]: q or k
  float *const u_rows;     // [ROWS][u_stride]: w or v
  float *const pairs;      // [ROWS][PAIR_STRIDE]
  float *const right;      // a slice of the columns' vectors or of the state
  float *const row_decay, *const row_carry, *const row_ones;
  float *const row_last;   // the last column beside u: e or 1
  float *const scratch, *const column_decay, *const column_last;
  int *const column_run;
  const int tid;
  const Place at;
  const Span<WIDTH, REVERSE> span;
  const float *const x_own, *const u_own;

  __device__ __forceinline__ Slope(const Job &job, int64_t row_tiles, float *shared)
      : job(job), p(job.p), dim(p.head_dim), width(p.value_dim), x_stride(left_stride(dim)), u_stride(left_stride(width)), x_rows(shared), u_rows(x_rows + ROWS * x_stride),
        pairs(u_rows + ROWS * u_stride), right(pairs + ROWS * S::PAIR_STRIDE), row_decay(right + S::RIGHT), row_carry(row_decay + ROWS), row_ones(row_carry + ROWS),
        row_last(row_ones + ROWS), scratch(row_last + ROWS), column_decay(scratch + S::COLUMN_WARPS * ROWS), column_last(column_decay + TILE),
        column_run(reinterpret_cast<int *>(column_last + TILE)), tid(threadIdx.x), at(S::ROW_WARPS), span(job, row_tiles), x_own(x_rows + at.warp_row * 16 * x_stride),
        u_own(u_rows + at.warp_row * 16 * u_stride) {}

  __device__ __forceinline__ void run() const {
    const Rows x = REVERSE ? unit_keys(job, span.b, span.row_head) : unit_queries(job, span.b, span.row_head);
    const Rows u = REVERSE ? values(job, span.b, span.row_head) : upstream(job, span.b, span.row_head);
    stage<PRECISE>(x_rows, x_stride, x, span.first_row, ROWS, 0, x_stride);
    stage<PRECISE>(u_rows, u_stride, u, span.first_row, ROWS, 0, u_stride);
    if (tid < ROWS) {
      const int64_t n = span.first_row + tid;
      row_last[tid] = !u.real(n) ? 0.0f : REVERSE ? 1.0f : job.row_term[span.bh * p.length + n];
    }
    int row_run[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) row_run[half] = span.run_of(span.first_row + at.row(half));
    Sums acc = {};
    Totals totals;
    for (int index = 0; index < span.states(); ++index) {
      const int state_head = span.first_state() + index;
      const int64_t bs = static_cast<int64_t>(span.b) * p.state_heads + state_head;
      const double *tiles = span.decay_tiles(bs);
      float total[2] = {};  // of A dA
      __syncthreads();
      if (tid < ROWS) span.carry(row_decay[tid], row_carry[tid], bs, tiles, span.first_row + tid);
      __syncthreads();
      if (span.meets_state()) add_state(acc, totals, total, span.state(bs));
      for (int r_index = 0; r_index < span.query_heads(); ++r_index) add_pairs(acc, totals, total, row_run, span.query_head(state_head, r_index), bs, tiles);
      if (REVERSE && job.column_sums != nullptr) put_column_sums(total, bs);
    }
    if (!REVERSE) put_coefficients(totals);
    put(acc, row_run, x);
  }

  // Where (pair, j) lies in the state, behind the linear rows and the row of ones. Pair -1 is the linear rows: as if vectors began with a 1.
  __device__ __forceinline__ const float *row_of_pair(const float *state, int pair, int j) const {
    return state + static_cast<int64_t>(dim + (pair < 0 ? 0 : 1) + pair_start(min(pair, j), dim) + abs(pair - j)) * (width + 1);
  }

  __device__ __forceinline__ void add_state(Sums &acc, Totals &totals, float (&total)[2], const float *state) const {
    const Coefficients f = REVERSE ? Coefficients{1.0f, 1.0f, 1.0f} : coefficients_of(p, span.row_head);
    put_ones(state);
    __syncthreads();
    const int last_pair = p.degree == 2 ? dim - 1 : -1;
#pragma unroll 1
    for (int pair = -1; pair <= last_pair; ++pair) {
      Sums part_sum;
      multiply_pair(part_sum, state, pair);
      add_pair(acc, totals, total, part_sum, f, pair);
    }
  }

  // [u, last] . the state's row of ones.
  __device__ __forceinline__ void put_ones(const float *state) const {
    float ones = 0.0f;
    const int own_row = tid / S::LANES;
    const float *ones_row = state + static_cast<int64_t>(dim) * (width + 1);
    for (int m = tid % S::LANES; m < width; m += S::LANES) ones = fmaf(u_rows[own_row * u_stride + m], ones_row[m], ones);
    if (tid % S::LANES == 0) ones = fmaf(row_last[own_row], ones_row[width], ones);
    for (int step = S::LANES / 2; step > 0; step /= 2) ones += __shfl_xor_sync(0xffffffffu, ones, step);
    if (tid % S::LANES == 0) row_ones[own_row] = ones;
  }

  // [row][j]: [u, last] . state row of (pair, j).
  __device__ __forceinline__ void multiply_pair(Sums &part_sum, const float *state, int pair) const {
#pragma unroll
    for (int part = 0; part < S::PARTS; ++part) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int j = column_of<WIDTH>(at, part, i % 2);
        part_sum[part][i] = j < dim ? row_last[at.row(i / 2)] * row_of_pair(state, pair, j)[width] : 0.0f;
      }
    }
#pragma unroll 1
    for (int slice = 0; slice < S::SLICES && slice * S::SLICE < dim; ++slice) {
      for (int k = 0; k < width; k += TILE) {
        for (int index = tid; index < S::SLICE * TILE; index += THREADS) {
          const int j = slice * S::SLICE + index / TILE, m = k + index % TILE;
          right[index / TILE * (TILE + 8) + index % TILE] = kept<PRECISE>(j < dim && m < width ? row_of_pair(state, pair, j)[m] : 0.0f);
        }
        __syncthreads();
        multiply_slice<WIDTH, PRECISE, true>(part_sum, slice, u_own + k, u_stride, right + at.warp_column * (S::SLICE_PARTS * 8) * (TILE + 8), TILE + 8,
                                             min(TILE, (width - k + 7) / 8 * 8));
        __syncthreads();
      }
    }
  }

  // The state holds each pair once; R holds it with both orders in it, and its diagonal counts twice in a derivative.
  __device__ __forceinline__ void add_pair(Sums &acc, Totals &totals, float (&total)[2], const Sums &part_sum, const Coefficients &f, int pair) const {
    const bool linear = pair < 0;
    const float weight = linear ? f.b : REVERSE ? 1.0f : 2.0f * f.c, share = linear ? 1.0f : 0.5f;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = at.row(half);
      const float carry = row_carry[row], factor = linear ? carry : carry * x_rows[row * x_stride + pair];
      if (linear && at.warp_column == 0 && at.place == 0) {
        totals.sum0[half] = fmaf(carry, row_ones[row], totals.sum0[half]);
        if (REVERSE) total[half] = fmaf(carry, row_ones[row], total[half]);
      }
      float sum = linear ? totals.sum1[half] : totals.sum2[half];
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
      (linear ? totals.sum1 : totals.sum2)[half] = sum;
    }
  }

  // The columns of one query head, tile by tile.
  __device__ __forceinline__ void add_pairs(Sums &acc, Totals &totals, float (&total)[2], const int (&row_run)[2], int query_head, int64_t bs, const double *tiles) const {
    const Coefficients f = coefficients_of(p, query_head);
    const Rows y = REVERSE ? unit_queries(job, span.b, query_head) : unit_keys(job, span.b, span.row_head / job.group);
    const Rows z = REVERSE ? upstream(job, span.b, query_head) : values(job, span.b, span.row_head / job.group);
    const int64_t last_tile = span.last_tile();
    int64_t tile = span.following(span.first_tile(), last_tile);
    Slice<PRECISE, S::SLICE> slice_on_its_way;
    if (AHEAD && tile <= last_tile) slice_on_its_way.fetch(z, tile * TILE, 0);
    while (tile <= last_tile) {
      const int64_t first_column = tile * TILE, after = span.following(tile + 1, last_tile);
      if (tid < TILE) put_column(first_column + tid, query_head, bs, tiles);
      PairSums s = {}, grad = {};
      multiply_upstream(grad, slice_on_its_way, y, z, first_column);
      multiply_columns(s, slice_on_its_way, y, first_column);
      weigh_pairs(s, grad, totals, total, row_run, f, tile, tiles);
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

  __device__ __forceinline__ void put_column(int64_t n, int query_head, int64_t bs, const double *tiles) const {
    const bool inside = n < p.length;
    column_decay[tid] = inside && tiles != nullptr ? job.decay[bs * p.length + n] : 0.0f;
    column_last[tid] = REVERSE && inside ? job.row_term[(static_cast<int64_t>(span.b) * p.query_heads + query_head) * p.length + n] : 0.0f;
    column_run[tid] = inside ? (span.column_segments == nullptr ? 1 : span.column_segments[n]) : -1;
  }

  // grad = u z^T.
  __device__ __forceinline__ void multiply_upstream(PairSums &grad, Slice<PRECISE, S::SLICE> &slice_on_its_way, const Rows &y, const Rows &z, int64_t first_column) const {
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
  }

  // s = x y^T.
  __device__ __forceinline__ void multiply_columns(PairSums &s, Slice<PRECISE, S::SLICE> &slice_on_its_way, const Rows &y, int64_t first_column) const {
    for (int k = 0; k < dim; k += S::SLICE) {
      if (!AHEAD) slice_on_its_way.fetch(y, first_column, k);
      slice_on_its_way.put(right, S::SLICE + 8, y, first_column, k);
      __syncthreads();
      if (AHEAD && S::SLICES > 1) slice_on_its_way.fetch(y, first_column, k + S::SLICE < dim ? k + S::SLICE : 0);
      multiply<PRECISE, true, true, S::PAIR_PARTS>(s, x_own + k, x_stride, right + at.warp_column * (S::PAIR_PARTS * 8) * (S::SLICE + 8), S::SLICE + 8,
                                                   min(S::SLICE, (dim - k + 7) / 8 * 8));
      __syncthreads();
    }
  }

  // What the pairs' weights gather by, f'(s) exp(..) dA, and the sums beside it.
  __device__ __forceinline__ void weigh_pairs(const PairSums &s, const PairSums &grad, Totals &totals, float (&total)[2], const int (&row_run)[2], const Coefficients &f,
                                              int64_t tile, const double *tiles) const {
    const float gap = span.gap(tiles, tile);
    const bool inner = !p.causal || tile != span.own_tile;  // no row of the tile is beside a column it may not see for its place
#pragma unroll
    for (int part = 0; part < S::PAIR_PARTS; ++part) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float2 slopes;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int at_column = pair_column_of<WIDTH>(at, part, i);
          const int distance = static_cast<int>(span.first_row - tile * TILE) + at.row(half) - at_column;  // of two tokens of one tile
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
            totals.sum0[half] += gradient;
            totals.sum1[half] = fmaf(gradient, score, totals.sum1[half]);
            totals.sum2[half] = fmaf(gradient * score, score, totals.sum2[half]);
          }
          (i == 0 ? slopes.x : slopes.y) = kept<PRECISE>(gradient * f.slope(score));
        }
        *reinterpret_cast<float2 *>(&pairs[at.row(half) * S::PAIR_STRIDE + pair_column_of<WIDTH>(at, part, 0)]) = slopes;
      }
    }
  }

  __device__ __forceinline__ void put_column_sums(float (&total)[2], int64_t bs) const {
    row_totals<WIDTH>(total, scratch, at);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t n = span.first_row + at.row(half);
      if (at.warp_column == 0 && at.place == 0 && n < p.length) job.column_sums[bs * p.length + n] = total[half];
    }
  }

  // The block's part in the gradients of a, b and c, and each row's sum of A dA.
  __device__ __forceinline__ void put_coefficients(Totals &totals) const {
    row_totals<WIDTH>(totals.sum0, scratch, at);
    row_totals<WIDTH>(totals.sum1, scratch, at);
    row_totals<WIDTH>(totals.sum2, scratch, at);
    float *const sums = pairs;  // [3][ROWS]
    if (at.warp_column == 0 && at.place == 0) {
      const Coefficients f = coefficients_of(p, span.row_head);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = at.row(half);
        const int64_t n = span.first_row + row;
        sums[row] = totals.sum0[half];
        sums[ROWS + row] = totals.sum1[half];
        sums[2 * ROWS + row] = totals.sum2[half];
        if (job.row_sums != nullptr && n < p.length) job.row_sums[span.bh * p.length + n] = f.a * totals.sum0[half] + f.b * totals.sum1[half] + f.c * totals.sum2[half];
      }
    }
    __syncthreads();
    if (tid < 3) {
      float sum = 0.0f;
      for (int row = 0; row < ROWS; ++row) sum += sums[tid * ROWS + row];
      job.coefficient_parts[(span.bh * span.row_tiles + span.row_tile) * 3 + tid] = sum;
    }
  }

  // The gradient, without its part along the unit vector, which normalisation takes away.
  __device__ __forceinline__ void put(const Sums &acc, const int (&row_run)[2], const Rows &x) const {
    float along[2] = {};
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
      const int64_t n = span.first_row + row;
      if (n >= p.length) continue;
      const bool real = row_run[half] > 0;
      const float scale = real ? x.factor(n) : 0.0f;
      const int64_t to = offset_of(target, span.b, span.row_head, n);
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
};

template <int WIDTH, bool REVERSE, bool PRECISE>
__global__ void __launch_bounds__(THREADS, 2) slope(const __grid_constant__ Job job, int64_t row_tiles) {
  extern __shared__ __align__(16) float shared[];
  Slope<WIDTH, REVERSE, PRECISE>(job, row_tiles, shared).run();
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
