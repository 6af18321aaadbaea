// architectures: sm_80 compute_80 sm_90
// Rows gather values by the weights f(s): out and the mass g for queries, or the gradient of the values for keys.
#include "generic/tile.cuh"

namespace linattn {
namespace {

template <int WIDTH>
size_t shared_bytes(int dim) {
  using S = Shape<WIDTH>;
  return sizeof(float) * (S::ROWS * left_stride(dim) + S::ROWS * S::PAIR_STRIDE + S::RIGHT + TILE + 3 * S::ROWS + S::COLUMN_WARPS * S::ROWS + 2 * TILE);
}

template <int WIDTH, bool REVERSE, bool PRECISE>
__global__ void __launch_bounds__(THREADS, 2) apply(const __grid_constant__ Job job, int64_t row_tiles) {
  using S = Shape<WIDTH>;
  constexpr int ROWS = S::ROWS;
  constexpr bool AHEAD = !PRECISE;  // fetch each slice during the product before it; precise products leave no registers for that
  const linattn_problem &p = job.p;
  const int x_stride = left_stride(p.head_dim);
  extern __shared__ __align__(16) float shared[];
  float *x_rows = shared;                          // [ROWS][x_stride]: the row vectors
  float *pairs = x_rows + ROWS * x_stride;         // [ROWS][PAIR_STRIDE]: weights, or features of the rows
  float *right = pairs + ROWS * S::PAIR_STRIDE;    // a slice of the columns' vectors, of their values, or of the state
  float *right_last = right + S::RIGHT;            // [TILE]: the last column of the state
  float *row_decay = right_last + TILE, *row_carry = row_decay + ROWS, *row_mass = row_carry + ROWS;
  float *scratch = row_mass + ROWS;
  float *column_decay = scratch + S::COLUMN_WARPS * ROWS;
  int *column_run = reinterpret_cast<int *>(column_decay + TILE);

  const int tid = threadIdx.x;
  const Place at(S::ROW_WARPS);
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
  const float *x_own = x_rows + at.warp_row * 16 * x_stride, *pairs_own = pairs + at.warp_row * 16 * S::PAIR_STRIDE;

  const Rows x = REVERSE ? unit_keys(job, b, row_head) : unit_queries(job, b, row_head);
  stage<PRECISE>(x_rows, x_stride, x, first_row, ROWS, 0, x_stride);
  int row_run[2];  // 0 past the end and in padding
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t n = first_row + at.row(half);
    row_run[half] = n >= p.length ? 0 : row_segments == nullptr ? 1 : max(row_segments[n], 0);
  }

  float acc[S::PARTS][4] = {};
  float mass[2] = {};
  if (tid < ROWS) row_mass[tid] = 0.0f;
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
    const bool nothing_carried = p.causal && (REVERSE ? chunk == job.chunks - 1 && job.grad_state == nullptr : chunk == 0 && p.initial_state == nullptr);
    if ((REVERSE ? job.has_reverse : job.has_state) && !nothing_carried) {
      const float *state = job.states + (bs * job.chunks + (p.causal ? chunk : 0)) * job.features * (width + 1);
      const Coefficients f = REVERSE ? Coefficients{1.0f, 1.0f, 1.0f} : coefficients_of(p, row_head);
      float sum[S::PARTS][4] = {};
      float last = 0.0f;  // of row tid / LANES, this thread's share
      constexpr int COUNT = TILE * S::SLICE / THREADS;
      float on_its_way[COUNT];  // a slice of up to TILE rows of the state
      // The state's rows come in blocks: first the linear ones, then, behind the row of ones, those of pairs.
      const int pairs_count = p.degree == 2 ? dim * (dim + 1) / 2 : 0, linear_blocks = (dim + TILE - 1) / TILE;
      const int blocks = linear_blocks + (pairs_count + TILE - 1) / TILE;
      auto row_of_block = [&](int block) { return block < linear_blocks ? block * TILE : dim + 1 + (block - linear_blocks) * TILE; };
      auto rows_in_block = [&](int block) { return min(TILE, (block < linear_blocks ? dim : dim + 1 + pairs_count) - row_of_block(block)); };
      auto fetch = [&](int block, int slice) {
        const int column = slice * S::SLICE + tid % S::SLICE, count = rows_in_block(block);
        const float *from = state + static_cast<int64_t>(row_of_block(block)) * (width + 1) + column;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
          const int k = tid / S::SLICE + i * (THREADS / S::SLICE);
          on_its_way[i] = k < count && column < width ? from[k * (width + 1)] : 0.0f;
        }
      };
      if (AHEAD) fetch(0, 0);
#pragma unroll 1
      for (int block = 0; block < blocks; ++block) {
        const bool linear = block < linear_blocks;
        const int count = rows_in_block(block);
        if (!linear) {
          const int t = tid % TILE, number = (block - linear_blocks) * TILE + t;
          const int2 pair = pair_of(min(number, pairs_count - 1), dim);
          const float scale = number >= pairs_count ? 0.0f : !REVERSE && pair.x != pair.y ? 2.0f * f.c : f.c;
          for (int r = tid / TILE; r < ROWS; r += THREADS / TILE)
            pairs[r * S::PAIR_STRIDE + t] = kept<PRECISE>(scale * x_rows[r * x_stride + pair.x] * x_rows[r * x_stride + pair.y]);
        }
        const float *left = linear ? x_rows + block * TILE : pairs;
        const int left_stride = linear ? x_stride : S::PAIR_STRIDE;
#pragma unroll 1
        for (int slice = 0; slice < S::SLICES && slice * S::SLICE < width; ++slice) {
          if (!AHEAD) fetch(block, slice);
#pragma unroll
          for (int i = 0; i < COUNT; ++i) right[(tid / S::SLICE + i * (THREADS / S::SLICE)) * (S::SLICE + 4) + tid % S::SLICE] = kept<PRECISE>(on_its_way[i]);
          if (!REVERSE && slice == 0 && tid < TILE) right_last[tid] = tid < count ? state[static_cast<int64_t>(row_of_block(block) + tid) * (width + 1) + width] : 0.0f;
          __syncthreads();
          if (AHEAD) {
            const bool more = (slice + 1) * S::SLICE < width;
            if (more || block + 1 < blocks) fetch(more ? block : block + 1, more ? slice + 1 : 0);
          }
          multiply_slice<WIDTH, PRECISE, false>(sum, slice, left + at.warp_row * 16 * left_stride, left_stride, right + at.warp_column * (S::SLICE_PARTS * 8), S::SLICE + 4,
                                                (count + 7) / 8 * 8);
          if (!REVERSE && slice == 0) {
            for (int k = tid % S::LANES; k < count; k += S::LANES) last = fmaf(left[tid / S::LANES * left_stride + k], right_last[k], last);
          }
          __syncthreads();
        }
        if (block + 1 == linear_blocks) {
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
    if (!job.direct) continue;

    // ---- the pairs
    const int64_t first_tile = p.causal ? (REVERSE ? own_tile : start / TILE) : 0;
    const int64_t last_tile = p.causal ? (REVERSE ? (stop - 1) / TILE : own_tile) : job.tiles - 1;
    const int query_heads = REVERSE ? job.state_group : 1;
    auto following = [&](int64_t tile) { return next_tile(tile, last_tile, row_segments, column_segments, first_row, smaller(first_row + ROWS, p.length) - 1, p.length); };
    for (int r_index = 0; r_index < query_heads; ++r_index) {
      const int query_head = REVERSE ? state_head * job.state_group + r_index : row_head;
      const Coefficients f = coefficients_of(p, query_head);
      const Rows y = REVERSE ? unit_queries(job, b, query_head) : unit_keys(job, b, row_head / job.group);
      const Rows z = REVERSE ? upstream(job, b, query_head) : values(job, b, row_head / job.group);
      int64_t tile = following(first_tile);
      Slice<PRECISE, S::SLICE> slice_on_its_way;
      if (AHEAD && tile <= last_tile) slice_on_its_way.fetch(y, tile * TILE, 0);
      while (tile <= last_tile) {
        const int64_t first_column = tile * TILE, after = following(tile + 1);
        if (tid < TILE) {
          const int64_t n = first_column + tid;
          column_decay[tid] = n < p.length && tiles != nullptr ? job.decay[bs * p.length + n] : 0.0f;
          column_run[tid] = n < p.length ? (column_segments == nullptr ? 1 : column_segments[n]) : -1;
        }
        float s[S::PAIR_PARTS][4] = {};
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
        const float gap = tiles == nullptr ? 0.0f : static_cast<float>(REVERSE ? tiles[tile] - tiles[own_tile] : tiles[own_tile] - tiles[tile]);
        const bool inner = !p.causal || tile != own_tile;  // no row of the tile is beside a column it may not see for its place
#pragma unroll
        for (int part = 0; part < S::PAIR_PARTS; ++part) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float2 weights;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const int at_column = pair_column_of<WIDTH>(at, part, i);
              const int distance = static_cast<int>(first_row - first_column) + at.row(half) - at_column;  // of two tokens of one tile
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
  }

  if (!REVERSE) row_totals<WIDTH>(mass, scratch, at);
  const linattn_tensor target = REVERSE ? job.grad_value : job.out;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = at.row(half);
    const int64_t n = first_row + row;
    if (n >= p.length) continue;
    const bool real = row_run[half] > 0;
    const float g = REVERSE ? 1.0f : mass[half] + row_mass[row];
    const float inverse = !real ? 0.0f : g == 0.0f ? 1.0f : 1.0f / g;
    const int64_t to = offset_of(target, b, row_head, n);
#pragma unroll
    for (int part = 0; part < S::PARTS; ++part) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int m = column_of<WIDTH>(at, part, i);
        if (m >= width) continue;
        float value = acc[part][half * 2 + i] * inverse;
        if (!REVERSE && p.dropout_p != nullptr) value *= noise({p.dropout_p, p.seed}, b * p.query_heads + row_head, n, m);
        store(target.data, p.dtype, to + m, value);
      }
    }
    if (!REVERSE && at.warp_column == 0 && at.place == 0) job.mass_out[bh * p.length + n] = real ? g : 0.0f;
  }
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
