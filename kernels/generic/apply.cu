// architectures: sm_80 compute_80 sm_90
// Rows gather values by the weights f(s): out and the mass g for queries, or the gradient of the values for keys.
#include "generic/span.cuh"

namespace linattn {
namespace {

template <int WIDTH>
size_t shared_bytes(int dim) {
  using S = Shape<WIDTH>;
  return sizeof(float) * (S::ROWS * left_stride(dim) + S::ROWS * S::PAIR_STRIDE + S::RIGHT + TILE + 3 * S::ROWS + S::COLUMN_WARPS * S::ROWS + 2 * TILE);
}

// The work of a block. Every step is made part of `run`, and every member is a register; sums are handed from step to step.
template <int WIDTH, bool REVERSE, bool PRECISE>
struct Apply {
  using S = Shape<WIDTH>;
  using Sums = float[S::PARTS][4];
  static constexpr int ROWS = S::ROWS;
  static constexpr bool AHEAD = !PRECISE;  // fetch each slice during the product before it; precise products leave no registers for that
  static constexpr int COUNT = TILE * S::SLICE / THREADS;

  const Job &job;
  const linattn_problem &p;
  const int x_stride;
  float *const x_rows;      // [ROWS][x_stride]: the row vectors
  float *const pairs;       // [ROWS][PAIR_STRIDE]: weights, or features of the rows
  float *const right;       // a slice of the columns' vectors, of their values, or of the state
  float *const right_last;  // [TILE]: the last column of the state
  float *const row_decay, *const row_carry, *const row_mass, *const scratch, *const column_decay;
  int *const column_run;
  const int tid;
  const Place at;
  const int dim, width;
  const Span<WIDTH, REVERSE> span;
  const float *const x_own, *const pairs_own;

  __device__ __forceinline__ Apply(const Job &job, int64_t row_tiles, float *shared)
      : job(job), p(job.p), x_stride(left_stride(p.head_dim)), x_rows(shared), pairs(x_rows + ROWS * x_stride), right(pairs + ROWS * S::PAIR_STRIDE), right_last(right + S::RIGHT),
        row_decay(right_last + TILE), row_carry(row_decay + ROWS), row_mass(row_carry + ROWS), scratch(row_mass + ROWS), column_decay(scratch + S::COLUMN_WARPS * ROWS),
        column_run(reinterpret_cast<int *>(column_decay + TILE)), tid(threadIdx.x), at(S::ROW_WARPS), dim(p.head_dim), width(p.value_dim), span(job, row_tiles),
        x_own(x_rows + at.warp_row * 16 * x_stride), pairs_own(pairs + at.warp_row * 16 * S::PAIR_STRIDE) {}

  __device__ __forceinline__ void run() const {
    const Rows x = REVERSE ? unit_keys(job, span.b, span.row_head) : unit_queries(job, span.b, span.row_head);
    stage<PRECISE>(x_rows, x_stride, x, span.first_row, ROWS, 0, x_stride);
    int row_run[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) row_run[half] = span.run_of(span.first_row + at.row(half));
    Sums acc = {};
    float mass[2] = {};
    if (tid < ROWS) row_mass[tid] = 0.0f;
    for (int index = 0; index < span.states(); ++index) {
      const int state_head = span.first_state() + index;
      const int64_t bs = static_cast<int64_t>(span.b) * p.state_heads + state_head;
      const double *tiles = span.decay_tiles(bs);
      __syncthreads();
      if (tid < ROWS) span.carry(row_decay[tid], row_carry[tid], bs, tiles, span.first_row + tid);
      __syncthreads();
      if (span.meets_state()) add_state(acc, span.state(bs));
      if (!job.direct) continue;
      for (int r_index = 0; r_index < span.query_heads(); ++r_index) add_pairs(acc, mass, row_run, span.query_head(state_head, r_index), bs, tiles);
    }
    put(acc, mass, row_run);
  }

  // The state's rows come in blocks: first the linear ones, then, behind the row of ones, those of pairs.
  struct Blocks {
    int dim, pairs_count, linear, all;
    __device__ __forceinline__ Blocks(int degree, int dim)
        : dim(dim), pairs_count(degree == 2 ? dim * (dim + 1) / 2 : 0), linear((dim + TILE - 1) / TILE), all(linear + (pairs_count + TILE - 1) / TILE) {}
    __device__ __forceinline__ int first(int block) const { return block < linear ? block * TILE : dim + 1 + (block - linear) * TILE; }
    __device__ __forceinline__ int count(int block) const { return min(TILE, (block < linear ? dim : dim + 1 + pairs_count) - first(block)); }
  };

  __device__ __forceinline__ void add_state(Sums &acc, const float *state) const {
    const Coefficients f = REVERSE ? Coefficients{1.0f, 1.0f, 1.0f} : coefficients_of(p, span.row_head);
    Sums sum = {};
    float last = 0.0f;  // of row tid / LANES, this thread's share
    float on_its_way[COUNT];
    const Blocks blocks(p.degree, dim);
    if (AHEAD) fetch(on_its_way, state, blocks, 0, 0);
#pragma unroll 1
    for (int block = 0; block < blocks.all; ++block) {
      if (block >= blocks.linear) put_features(blocks, block, f.c);
      add_block(sum, last, on_its_way, state, blocks, block);
      if (block + 1 == blocks.linear) weigh_linear(sum, last, state, f);
    }
#pragma unroll
    for (int part = 0; part < S::PARTS; ++part) {
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[part][i] = fmaf(row_carry[at.row(i / 2)], sum[part][i], acc[part][i]);
    }
    if (!REVERSE) {
      for (int step = S::LANES / 2; step > 0; step /= 2) last += __shfl_xor_sync(0xffffffffu, last, step);
      if (tid % S::LANES == 0) row_mass[tid / S::LANES] = last * row_carry[tid / S::LANES];
    }
  }

  // A slice of up to TILE rows of the state.
  __device__ __forceinline__ void fetch(float (&on_its_way)[COUNT], const float *state, const Blocks &blocks, int block, int slice) const {
    const int column = slice * S::SLICE + tid % S::SLICE, count = blocks.count(block);
    const float *from = state + static_cast<int64_t>(blocks.first(block)) * (width + 1) + column;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const int k = tid / S::SLICE + i * (THREADS / S::SLICE);
      on_its_way[i] = k < count && column < width ? from[k * (width + 1)] : 0.0f;
    }
  }

  // The rows' features of a block's pairs.
  __device__ __forceinline__ void put_features(const Blocks &blocks, int block, float c) const {
    const int t = tid % TILE, number = (block - blocks.linear) * TILE + t;
    const int2 pair = pair_of(min(number, blocks.pairs_count - 1), dim);
    const float scale = number >= blocks.pairs_count ? 0.0f : !REVERSE && pair.x != pair.y ? 2.0f * c : c;
    for (int r = tid / TILE; r < ROWS; r += THREADS / TILE) pairs[r * S::PAIR_STRIDE + t] = kept<PRECISE>(scale * x_rows[r * x_stride + pair.x] * x_rows[r * x_stride + pair.y]);
  }

  __device__ __forceinline__ void add_block(Sums &sum, float &last, float (&on_its_way)[COUNT], const float *state, const Blocks &blocks, int block) const {
    const bool linear = block < blocks.linear;
    const int count = blocks.count(block);
    const float *left = linear ? x_rows + block * TILE : pairs;
    const int left_stride = linear ? x_stride : S::PAIR_STRIDE;
#pragma unroll 1
    for (int slice = 0; slice < S::SLICES && slice * S::SLICE < width; ++slice) {
      if (!AHEAD) fetch(on_its_way, state, blocks, block, slice);
#pragma unroll
      for (int i = 0; i < COUNT; ++i) right[(tid / S::SLICE + i * (THREADS / S::SLICE)) * (S::SLICE + 4) + tid % S::SLICE] = kept<PRECISE>(on_its_way[i]);
      if (!REVERSE && slice == 0 && tid < TILE) right_last[tid] = tid < count ? state[static_cast<int64_t>(blocks.first(block) + tid) * (width + 1) + width] : 0.0f;
      __syncthreads();
      if (AHEAD) {
        const bool more = (slice + 1) * S::SLICE < width;
        if (more || block + 1 < blocks.all) fetch(on_its_way, state, blocks, more ? block : block + 1, more ? slice + 1 : 0);
      }
      multiply_slice<WIDTH, PRECISE, false>(sum, slice, left + at.warp_row * 16 * left_stride, left_stride, right + at.warp_column * (S::SLICE_PARTS * 8), S::SLICE + 4,
                                            (count + 7) / 8 * 8);
      if (!REVERSE && slice == 0) {
        for (int k = tid % S::LANES; k < count; k += S::LANES) last = fmaf(left[tid / S::LANES * left_stride + k], right_last[k], last);
      }
      __syncthreads();
    }
  }

  // The linear rows are summed: they count b, and the row of ones a.
  __device__ __forceinline__ void weigh_linear(Sums &sum, float &last, const float *state, const Coefficients &f) const {
    const float *ones = state + static_cast<int64_t>(dim) * (width + 1);
#pragma unroll
    for (int part = 0; part < S::PARTS; ++part) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int m = column_of<WIDTH>(at, part, i % 2);
        sum[part][i] = fmaf(f.b, sum[part][i], m < width ? f.a * ones[m] : 0.0f);
      }
    }
    last *= f.b;
    if (tid % S::LANES == 0) last += f.a * ones[width];
  }

  // The columns of one query head, tile by tile.
  __device__ __forceinline__ void add_pairs(Sums &acc, float (&mass)[2], const int (&row_run)[2], int query_head, int64_t bs, const double *tiles) const {
    const Coefficients f = coefficients_of(p, query_head);
    const Rows y = REVERSE ? unit_queries(job, span.b, query_head) : unit_keys(job, span.b, span.row_head / job.group);
    const Rows z = REVERSE ? upstream(job, span.b, query_head) : values(job, span.b, span.row_head / job.group);
    const int64_t last_tile = span.last_tile();
    int64_t tile = span.following(span.first_tile(), last_tile);
    Slice<PRECISE, S::SLICE> slice_on_its_way;
    if (AHEAD && tile <= last_tile) slice_on_its_way.fetch(y, tile * TILE, 0);
    while (tile <= last_tile) {
      const int64_t first_column = tile * TILE, after = span.following(tile + 1, last_tile);
      if (tid < TILE) put_column(first_column + tid, bs, tiles);
      float s[S::PAIR_PARTS][4] = {};
      multiply_columns(s, slice_on_its_way, y, z, first_column);
      weigh_pairs(s, mass, row_run, f, tile, tiles);
#pragma unroll 1
      for (int slice = 0; slice < S::SLICES && slice * S::SLICE < width; ++slice) {
        if (!AHEAD) slice_on_its_way.fetch(z, first_column, slice * S::SLICE);
        slice_on_its_way.put(right, S::SLICE + 4, z, first_column, slice * S::SLICE);
        __syncthreads();
        if (AHEAD) {
          if ((slice + 1) * S::SLICE < width) slice_on_its_way.fetch(z, first_column, (slice + 1) * S::SLICE);
          else if (after <= last_tile) slice_on_its_way.fetch(y, after * TILE, 0);
        }
        multiply_slice<WIDTH, PRECISE, false>(acc, slice, pairs_own, S::PAIR_STRIDE, right + at.warp_column * (S::SLICE_PARTS * 8), S::SLICE + 4, TILE);
        __syncthreads();
      }
      tile = after;
    }
  }

  __device__ __forceinline__ void put_column(int64_t n, int64_t bs, const double *tiles) const {
    column_decay[tid] = n < p.length && tiles != nullptr ? job.decay[bs * p.length + n] : 0.0f;
    column_run[tid] = n < p.length ? (span.column_segments == nullptr ? 1 : span.column_segments[n]) : -1;
  }

  // s = x y^T.
  __device__ __forceinline__ void multiply_columns(float (&s)[S::PAIR_PARTS][4], Slice<PRECISE, S::SLICE> &slice_on_its_way, const Rows &y, const Rows &z,
                                                   int64_t first_column) const {
    for (int k = 0; k < dim; k += S::SLICE) {
      if (!AHEAD) slice_on_its_way.fetch(y, first_column, k);
      slice_on_its_way.put(right, S::SLICE + 8, y, first_column, k);
      __syncthreads();
      if (AHEAD) {
        if (k + S::SLICE < dim) slice_on_its_way.fetch(y, first_column, k + S::SLICE);
        else slice_on_its_way.fetch(z, first_column, 0);
      }
      multiply<PRECISE, true, true, S::PAIR_PARTS>(s, x_own + k, x_stride, right + at.warp_column * (S::PAIR_PARTS * 8) * (S::SLICE + 8), S::SLICE + 8,
                                                   min(S::SLICE, (dim - k + 7) / 8 * 8));
      __syncthreads();
    }
  }

  // The weights of the pairs, and their sums.
  __device__ __forceinline__ void weigh_pairs(const float (&s)[S::PAIR_PARTS][4], float (&mass)[2], const int (&row_run)[2], const Coefficients &f, int64_t tile,
                                              const double *tiles) const {
    const float gap = span.gap(tiles, tile);
    const bool inner = !p.causal || tile != span.own_tile;  // no row of the tile is beside a column it may not see for its place
#pragma unroll
    for (int part = 0; part < S::PAIR_PARTS; ++part) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float2 weights;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int at_column = pair_column_of<WIDTH>(at, part, i);
          const int distance = static_cast<int>(span.first_row - tile * TILE) + at.row(half) - at_column;  // of two tokens of one tile
          const bool seen = row_run[half] == column_run[at_column] && (inner || (REVERSE ? distance <= 0 : distance >= 0));
          float weight = seen ? f.weight(s[part][half * 2 + i]) : 0.0f;
          if (seen && tiles != nullptr) {
            const float own = row_decay[at.row(half)], other = column_decay[at_column];
            weight *= expf(fminf(gap + (REVERSE ? other - own : own - other), 0.0f));
          }
          weight = kept<PRECISE>(weight);
          mass[half] += weight;
          (i == 0 ? weights.x : weights.y) = weight;
        }
        *reinterpret_cast<float2 *>(&pairs[at.row(half) * S::PAIR_STRIDE + pair_column_of<WIDTH>(at, part, 0)]) = weights;
      }
    }
  }

  __device__ __forceinline__ void put(const Sums &acc, float (&mass)[2], const int (&row_run)[2]) const {
    if (!REVERSE) row_totals<WIDTH>(mass, scratch, at);
    const linattn_tensor target = REVERSE ? job.grad_value : job.out;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = at.row(half);
      const int64_t n = span.first_row + row;
      if (n >= p.length) continue;
      const bool real = row_run[half] > 0;
      const float g = REVERSE ? 1.0f : mass[half] + row_mass[row];
      const float inverse = !real ? 0.0f : g == 0.0f ? 1.0f : 1.0f / g;
      const int64_t to = offset_of(target, span.b, span.row_head, n);
#pragma unroll
      for (int part = 0; part < S::PARTS; ++part) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int m = column_of<WIDTH>(at, part, i);
          if (m >= width) continue;
          float value = acc[part][half * 2 + i] * inverse;
          if (!REVERSE && p.dropout_p != nullptr) value *= noise({p.dropout_p, p.seed}, span.b * p.query_heads + span.row_head, n, m);
          store(target.data, p.dtype, to + m, value);
        }
      }
      if (!REVERSE && at.warp_column == 0 && at.place == 0) job.mass_out[span.bh * p.length + n] = real ? g : 0.0f;
    }
  }
};

template <int WIDTH, bool REVERSE, bool PRECISE>
__global__ void __launch_bounds__(THREADS, 2) apply(const __grid_constant__ Job job, int64_t row_tiles) {
  extern __shared__ __align__(16) float shared[];
  Apply<WIDTH, REVERSE, PRECISE>(job, row_tiles, shared).run();
}

template <int WIDTH, bool REVERSE, bool PRECISE>
cudaError_t launch(const Job &job, cudaStream_t stream) {
  const linattn_problem &p = job.p;
  const int64_t row_tiles = (p.length + Shape<WIDTH>::ROWS - 1) / Shape<WIDTH>::ROWS;
  const int64_t heads = static_cast<int64_t>(p.batch) * (REVERSE ? p.key_heads : p.query_heads);
  const int bytes = static_cast<int>(shared_bytes<WIDTH>(p.head_dim));
  const auto kernel = apply<WIDTH, REVERSE, PRECISE>;
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

int apply_shared_bytes(const linattn_problem &problem) {
  const int width = problem.value_dim > problem.head_dim ? problem.value_dim : problem.head_dim;
  return static_cast<int>(width <= 64 ? shared_bytes<64>(problem.head_dim) : width <= 128 ? shared_bytes<128>(problem.head_dim) : shared_bytes<256>(problem.head_dim));
}

cudaError_t launch_apply(const Job &job, bool reverse, cudaStream_t stream) {
  const int width = job.p.value_dim > job.p.head_dim ? job.p.value_dim : job.p.head_dim;
  if (width <= 64) return launch<64>(job, reverse, stream);
  if (width <= 128) return launch<128>(job, reverse, stream);
  return launch<256>(job, reverse, stream);
}

}  // namespace linattn
