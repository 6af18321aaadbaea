// The second degree's gradients, every pair of tokens formed twice, by mma.sync. With w_i = dL/do_i, s_in = (q_i . k_n) r_n, and 1 / g_i, e_i and 1 / |q_i|
// from the first kernel:
//   dA_in = (w_i . v_n) / g_i + e_i,   e_i = dL/dg_i - (w_i . o_i) / g_i,   slope_in = beta_i + 2 gamma_i s_in
//   dv_n = sum_i (P_in / g_i) w_i,   dk^_n = sum_i dA_in slope_in q_i,   dq_i = sum_n dA_in slope_in r_n k_n
// The rows kernel owns 128 queries and walks over the keys, the columns kernel owns 128 keys and walks over the queries of all heads that read them.
#include <algorithm>

#include "pairs/pairs.cuh"
#include "plan.h"

namespace linattn_pairs {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;  // a warp: 16 of the block's rows
constexpr int kNumbers = 3;                            // of a query: 1 / g, e, 1 / |q|

struct Gradients {
  linattn_problem problem;
  linattn_tensor out, grad_out, grad_query, grad_key, grad_value;
  const float *mass, *grad_mass;
  float *grad_coefficients;
  float *key_scale;      // (batch, key_heads, padded)
  float *query_numbers;  // (batch, query_heads, kNumbers, padded)
  float *partials;       // (batch, query_heads, row_tiles, 3): sums of dA, dA s, dA s^2 with s of unit vectors
  int64_t padded;        // tokens, a multiple of kRows
  int32_t row_tiles;
};

template <int D> struct Shape {
  static constexpr int BLOCKS = D / 16, OWN = kRows * D * 2, TILE = kKeys * D * 2;
  static constexpr bool KEEPS_ROWS = D <= 64;  // as fragments in registers
  static constexpr int MIN_BLOCKS = D <= 64 ? 2 : 1;
  static constexpr int ROWS_SHARED = 2 * OWN + kStages * (2 * TILE + kKeys * 4) + kWarps * 3 * 4;
  static constexpr int COLUMNS_SHARED = 2 * OWN + kStages * (2 * TILE + kNumbers * kKeys * 4);
  static_assert(ROWS_SHARED <= COLUMNS_SHARED, "shared_bytes is that of the columns kernel");
};

// Four threads a token: 1 / |k|, or the numbers of a query; nothing behind the last token.
template <typename T, bool KEYS> __global__ void __launch_bounds__(kThreads) numbers_kernel(const __grid_constant__ Gradients args) {
  using E = Element<T>;
  const linattn_problem &p = args.problem;
  const int64_t number = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 4, head = number / args.padded, token = number % args.padded;
  const int heads = KEYS ? p.key_heads : p.query_heads, part = threadIdx.x % 4;
  float square = 0.f, dot = 0.f;
  if (token < p.length) {
    const linattn_tensor &x = KEYS ? p.key : p.query;
    const T *const row = head_of<const T>(x, head / heads, head % heads) + token * x.token_stride;
    const T *const out = KEYS ? nullptr : head_of<const T>(args.out, head / heads, head % heads) + token * args.out.token_stride;
    const T *const grad = KEYS ? nullptr : head_of<const T>(args.grad_out, head / heads, head % heads) + token * args.grad_out.token_stride;
    for (int i = 2 * part; i < p.head_dim; i += 8) {
      const uint32_t two = *reinterpret_cast<const uint32_t *>(row + i);
      square += E::low(two) * E::low(two) + E::high(two) * E::high(two);
      if constexpr (!KEYS) {
        const uint32_t o = *reinterpret_cast<const uint32_t *>(out + i), w = *reinterpret_cast<const uint32_t *>(grad + i);
        dot += E::low(o) * E::low(w) + E::high(o) * E::high(w);
      }
    }
  }
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    square += __shfl_xor_sync(0xffffffffu, square, step);
    dot += __shfl_xor_sync(0xffffffffu, dot, step);
  }
  if (part != 0) return;
  const float scale = token >= p.length ? 0.f : p.normalize_qk ? inverse_norm(square) : 1.f;
  if constexpr (KEYS) {
    args.key_scale[number] = scale;
  } else {
    const float mass = token < p.length ? args.mass[head * p.length + token] : 0.f, inverse = mass == 0.f ? 0.f : 1.f / mass;
    float *const numbers = args.query_numbers + head * kNumbers * args.padded + token;
    numbers[0] = inverse;
    numbers[args.padded] = token < p.length ? (args.grad_mass ? args.grad_mass[head * p.length + token] : 0.f) - dot * inverse : 0.f;
    numbers[2 * args.padded] = scale;
  }
}

struct Coefficients {
  float a, beta, gamma;  // of unit vectors
  __device__ __forceinline__ Coefficients(const linattn_problem &p, int head)
      : a(p.coefficients[head]), beta(p.coefficients[p.query_heads + head] * p.coefficients[3 * p.query_heads + head]),
        gamma(p.coefficients[2 * p.query_heads + head] * p.coefficients[3 * p.query_heads + head] * p.coefficients[3 * p.query_heads + head]) {}
};

// Takes the part along x away from the gradient of x / |x|; `scale` undoes |x|, or nothing where vectors are used as they are.
template <typename T, int BLOCKS>
__device__ __forceinline__ void project(float (&acc)[2 * BLOCKS][4], const Blocks<16 * BLOCKS> &x, uint32_t offset, const float (&scale)[2]) {
  using E = Element<T>;
  float along[2] = {0.f, 0.f};
#pragma unroll
  for (int pass = 0; pass < 2; ++pass) {
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) {
      uint32_t two[4];
      ldmatrix(two, x.at(0, block) + offset);
#pragma unroll
      for (int t = 0; t < 2; ++t)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float &left = acc[2 * block + t][2 * half], &right = acc[2 * block + t][2 * half + 1];
          if (pass == 0) along[half] += E::low(two[2 * t + half]) * left + E::high(two[2 * t + half]) * right;
          else left -= E::low(two[2 * t + half]) * along[half], right -= E::high(two[2 * t + half]) * along[half];
        }
    }
    if (pass == 0)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        along[half] += __shfl_xor_sync(0xffffffffu, along[half], 1);
        along[half] += __shfl_xor_sync(0xffffffffu, along[half], 2);
        along[half] *= scale[half] * scale[half];
      }
  }
}

// 16 rows of results, staged at `offset` of a tile that nobody but this warp reads there.
template <typename T, int D>
__device__ __forceinline__ void store_rows(const linattn_tensor &tensor, T *rows, unsigned char *tile, const Blocks<D> &blocks, uint32_t offset, const float (&acc)[D / 8][4],
                                           float scale0, float scale1, int count, int warp, int lane) {
  __syncwarp();
#pragma unroll
  for (int block = 0; block < D / 16; ++block) store_block<T, D>(blocks.at(0, block) + offset, acc[2 * block], acc[2 * block + 1], scale0, scale1, lane);
  __syncwarp();
  for (int index = lane; index < 16 * (D / 8); index += 32) {
    const int local = 16 * warp + index / (D / 8), piece = index % (D / 8);
    if (local < count) *reinterpret_cast<uint4 *>(rows + local * tensor.token_stride + piece * 8) = *reinterpret_cast<const uint4 *>(tile + Tile<D>::at(local, piece));
  }
}

template <typename T, int D> __global__ void __launch_bounds__(kThreads, Shape<D>::MIN_BLOCKS) rows_kernel(const __grid_constant__ Gradients args) {
  using S = Shape<D>;
  using E = Element<T>;
  constexpr int BLOCKS = S::BLOCKS;
  extern __shared__ __align__(1024) unsigned char shared[];
  const linattn_problem &p = args.problem;
  const int thread = threadIdx.x, lane_id = thread & 31, warp = warp_number(), group = lane_id >> 2, place = lane_id & 3;
  const uint32_t query_tile = shared_address(shared), grad_tile = query_tile + S::OWN, stages = grad_tile + S::OWN;
  const float *const scales = reinterpret_cast<const float *>(shared + 2 * S::OWN + kStages * 2 * S::TILE);
  float *const totals = reinterpret_cast<float *>(shared + S::ROWS_SHARED - kWarps * 3 * 4);

  const int pair = blockIdx.x / args.row_tiles, tile_number = args.row_tiles - 1 - blockIdx.x % args.row_tiles;  // long rows first
  const int batch = pair / p.query_heads, head = pair % p.query_heads, key_head = head / (p.query_heads / p.key_heads);
  const int64_t begin = static_cast<int64_t>(tile_number) * kRows;
  const int rows = static_cast<int>(min(p.length - begin, static_cast<int64_t>(kRows)));
  const int tiles = static_cast<int>(((p.causal ? begin + rows : p.length) + kKeys - 1) / kKeys);
  const T *const keys = head_of<const T>(p.key, batch, key_head), *const values = head_of<const T>(p.value, batch, key_head);
  const float *const key_scale = args.key_scale + (static_cast<int64_t>(batch) * p.key_heads + key_head) * args.padded;
  const auto fetch = [&](int tile) {
    const int64_t first = static_cast<int64_t>(tile) * kKeys;
    const int stage = tile % kStages, count = static_cast<int>(min(p.length - first, static_cast<int64_t>(kKeys)));
    copy_tile<D, kKeys, kThreads>(stages + stage * 2 * S::TILE, keys + first * p.key.token_stride, p.key.token_stride, count, thread);
    copy_tile<D, kKeys, kThreads>(stages + stage * 2 * S::TILE + S::TILE, values + first * p.value.token_stride, p.value.token_stride, count, thread);
    if (thread < kKeys / 4) copy_async(stages + kStages * 2 * S::TILE + stage * kKeys * 4 + thread * 16, key_scale + first + thread * 4, true);
    copy_commit();
  };
  copy_tile<D, kRows, kThreads>(query_tile, head_of<const T>(p.query, batch, head) + begin * p.query.token_stride, p.query.token_stride, rows, thread);
  copy_tile<D, kRows, kThreads>(grad_tile, head_of<const T>(args.grad_out, batch, head) + begin * args.grad_out.token_stride, args.grad_out.token_stride, rows, thread);
  fetch(0);
  copy_wait<0>();
  __syncthreads();

  const Coefficients f(p, head);
  const float *const numbers = args.query_numbers + static_cast<int64_t>(pair) * kNumbers * args.padded + begin + 16 * warp + group;
  const uint32_t down = lane_down<D>(lane_id), across = lane_across<D>(lane_id), stripe = Tile<D>::rows_at(warp);
  const Blocks<D> q_blocks(query_tile, down), w_blocks(grad_tile, down);
  float inverse[2], error[2], scale[2], beta[2], gamma[2], sums[3][2] = {}, acc[2 * BLOCKS][4];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    inverse[half] = numbers[8 * half], error[half] = numbers[args.padded + 8 * half], scale[half] = numbers[2 * args.padded + 8 * half];
    beta[half] = f.beta * scale[half], gamma[half] = f.gamma * scale[half] * scale[half];
  }
  uint32_t kept[2][S::KEEPS_ROWS ? BLOCKS : 1][4];
  if constexpr (S::KEEPS_ROWS) {
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) ldmatrix(kept[0][block], q_blocks.at(0, block) + stripe), ldmatrix(kept[1][block], w_blocks.at(0, block) + stripe);
  }
#pragma unroll
  for (int n = 0; n < 2 * BLOCKS; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[n][i] = 0.f;

  const int64_t row = begin + 16 * warp + group, seen = p.causal ? min(p.length, begin + 16 * warp + 16) : p.length;
  for (int tile = 0; tile < tiles; ++tile) {
    if (tile > 0) {
      copy_wait<0>();
      __syncthreads();  // the tile is here, and nobody reads the one that the next copies overwrite
    }
    if (tile + 1 < tiles) fetch(tile + 1);
    const int stage = tile % kStages;
    const uint32_t key_tile = stages + stage * 2 * S::TILE;
    const Blocks<D> k_across(key_tile, across), v_across(key_tile + S::TILE, across), k_down(key_tile, down);
#pragma unroll 1
    for (int step = 0; step < kKeys / 16; ++step) {
      const int64_t key = static_cast<int64_t>(tile) * kKeys + 16 * step;
      if (key >= seen) break;
      float s[2][4] = {}, d[2][4] = {};
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block) {
        uint32_t loaded[2][4], k[4], v[4];
        if constexpr (!S::KEEPS_ROWS) ldmatrix(loaded[0], q_blocks.at(0, block) + stripe), ldmatrix(loaded[1], w_blocks.at(0, block) + stripe);
        const uint32_t (&q)[4] = S::KEEPS_ROWS ? kept[0][S::KEEPS_ROWS ? block : 0] : loaded[0];
        const uint32_t (&w)[4] = S::KEEPS_ROWS ? kept[1][S::KEEPS_ROWS ? block : 0] : loaded[1];
        ldmatrix(k, k_across.at(0, block) + step * Tile<D>::kBlockBytes);
        ldmatrix(v, v_across.at(0, block) + step * Tile<D>::kBlockBytes);
        E::mma(s[0], q, k[0], k[1]), E::mma(s[1], q, k[2], k[3]);
        E::mma(d[0], w, v[0], v[1]), E::mma(d[1], w, v[2], v[3]);
      }
      const bool whole = key + 16 <= p.length && (!p.causal || key + 15 <= begin + 16 * warp);
      uint32_t weights[4];
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const int column = 8 * side + 2 * place;
        const float2 factor = *reinterpret_cast<const float2 *>(scales + stage * kKeys + 16 * step + column);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int half = i >> 1;
          const float r = i & 1 ? factor.y : factor.x, t = s[side][i] * r;
          float slope = fmaf(d[side][i], inverse[half], error[half]);
          const int64_t number = key + column + (i & 1);
          if (!whole && (number >= p.length || (p.causal && number > row + 8 * half))) slope = 0.f;
          sums[0][half] += slope, sums[1][half] = fmaf(slope, t, sums[1][half]), sums[2][half] = fmaf(slope * t, t, sums[2][half]);
          s[side][i] = slope * fmaf(2.f * gamma[half], t, beta[half]) * r;
        }
        weights[2 * side] = E::pack(s[side][0], s[side][1]), weights[2 * side + 1] = E::pack(s[side][2], s[side][3]);
      }
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block) {
        uint32_t k[4];
        ldmatrix_transposed(k, k_down.at(0, block) + step * Tile<D>::kBlockBytes);
        E::mma(acc[2 * block], weights, k[0], k[1]), E::mma(acc[2 * block + 1], weights, k[2], k[3]);
      }
    }
  }

  if (p.normalize_qk) project<T, BLOCKS>(acc, q_blocks, stripe, scale);
  store_rows<T, D>(args.grad_query, head_of<T>(args.grad_query, batch, head) + begin * args.grad_query.token_stride, shared, q_blocks, stripe, acc, 1.f, 1.f, rows, warp, lane_id);
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    float sum = i == 0 ? sums[0][0] + sums[0][1] : i == 1 ? sums[1][0] * scale[0] + sums[1][1] * scale[1] : sums[2][0] * scale[0] * scale[0] + sums[2][1] * scale[1] * scale[1];
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (lane_id == 0) totals[3 * warp + i] = sum;
  }
  __syncthreads();
  if (thread < 3) {
    float sum = 0.f;
    for (int w = 0; w < kWarps; ++w) sum += totals[3 * w + thread];
    args.partials[(static_cast<int64_t>(pair) * args.row_tiles + tile_number) * 3 + thread] = sum;
  }
}

template <typename T, int D> __global__ void __launch_bounds__(kThreads, Shape<D>::MIN_BLOCKS) columns_kernel(const __grid_constant__ Gradients args) {
  using S = Shape<D>;
  using E = Element<T>;
  constexpr int BLOCKS = S::BLOCKS;
  extern __shared__ __align__(1024) unsigned char shared[];
  const linattn_problem &p = args.problem;
  const int thread = threadIdx.x, lane_id = thread & 31, warp = warp_number(), group = lane_id >> 2, place = lane_id & 3;
  const uint32_t key_tile = shared_address(shared), value_tile = key_tile + S::OWN, stages = value_tile + S::OWN;
  const float *const staged_numbers = reinterpret_cast<const float *>(shared + 2 * S::OWN + kStages * 2 * S::TILE);

  const int pair = blockIdx.x / args.row_tiles, tile_number = blockIdx.x % args.row_tiles;  // long columns first
  const int batch = pair / p.key_heads, key_head = pair % p.key_heads, heads = p.query_heads / p.key_heads;
  const int64_t begin = static_cast<int64_t>(tile_number) * kRows;
  const int rows = static_cast<int>(min(p.length - begin, static_cast<int64_t>(kRows)));
  const int first_tile = p.causal ? static_cast<int>(begin / kKeys) : 0, tiles = static_cast<int>((p.length + kKeys - 1) / kKeys) - first_tile, iterations = tiles * heads;
  const auto fetch = [&](int iteration) {
    const int head = key_head * heads + iteration / tiles, stage = iteration % kStages;
    const int64_t first = static_cast<int64_t>(first_tile + iteration % tiles) * kKeys;
    const int count = static_cast<int>(min(p.length - first, static_cast<int64_t>(kKeys)));
    const uint32_t target = stages + stage * 2 * S::TILE;
    copy_tile<D, kKeys, kThreads>(target, head_of<const T>(p.query, batch, head) + first * p.query.token_stride, p.query.token_stride, count, thread);
    copy_tile<D, kKeys, kThreads>(target + S::TILE, head_of<const T>(args.grad_out, batch, head) + first * args.grad_out.token_stride, args.grad_out.token_stride, count, thread);
    if (thread < kNumbers * kKeys / 4) {
      const int which = thread / (kKeys / 4), four = thread % (kKeys / 4) * 4;
      const float *const numbers = args.query_numbers + ((static_cast<int64_t>(batch) * p.query_heads + head) * kNumbers + which) * args.padded + first + four;
      copy_async(stages + kStages * 2 * S::TILE + (stage * kNumbers * kKeys + which * kKeys + four) * 4, numbers, true);
    }
    copy_commit();
  };
  copy_tile<D, kRows, kThreads>(key_tile, head_of<const T>(p.key, batch, key_head) + begin * p.key.token_stride, p.key.token_stride, rows, thread);
  copy_tile<D, kRows, kThreads>(value_tile, head_of<const T>(p.value, batch, key_head) + begin * p.value.token_stride, p.value.token_stride, rows, thread);
  fetch(0);
  copy_wait<0>();
  __syncthreads();

  const uint32_t down = lane_down<D>(lane_id), across = lane_across<D>(lane_id), stripe = Tile<D>::rows_at(warp);
  const Blocks<D> k_blocks(key_tile, down), v_blocks(value_tile, down);
  const float *const key_scale = args.key_scale + static_cast<int64_t>(pair) * args.padded + begin + 16 * warp + group;
  const float scale[2] = {key_scale[0], key_scale[8]};
  uint32_t kept[2][S::KEEPS_ROWS ? BLOCKS : 1][4];
  if constexpr (S::KEEPS_ROWS) {
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) ldmatrix(kept[0][block], k_blocks.at(0, block) + stripe), ldmatrix(kept[1][block], v_blocks.at(0, block) + stripe);
  }
  float key_sums[2 * BLOCKS][4], value_sums[2 * BLOCKS][4];
#pragma unroll
  for (int n = 0; n < 2 * BLOCKS; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) key_sums[n][i] = value_sums[n][i] = 0.f;

  const int64_t first_key = begin + 16 * warp, key = first_key + group;
  for (int iteration = 0; iteration < iterations; ++iteration) {
    if (iteration > 0) {
      copy_wait<0>();
      __syncthreads();  // the tile is here, and nobody reads the one that the next copies overwrite
    }
    if (iteration + 1 < iterations) fetch(iteration + 1);
    const int stage = iteration % kStages;
    const uint32_t query_tile = stages + stage * 2 * S::TILE;
    const float *const numbers = staged_numbers + stage * kNumbers * kKeys;
    const Blocks<D> q_across(query_tile, across), w_across(query_tile + S::TILE, across), q_down(query_tile, down), w_down(query_tile + S::TILE, down);
    const Coefficients f(p, key_head * heads + iteration / tiles);
#pragma unroll 1
    for (int step = 0; step < kKeys / 16; ++step) {
      const int64_t query = static_cast<int64_t>(first_tile + iteration % tiles) * kKeys + 16 * step;
      if (query >= p.length) break;
      if (p.causal && query + 15 < first_key) continue;
      float s[2][4] = {}, d[2][4] = {};
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block) {
        uint32_t loaded[2][4], q[4], w[4];
        if constexpr (!S::KEEPS_ROWS) ldmatrix(loaded[0], k_blocks.at(0, block) + stripe), ldmatrix(loaded[1], v_blocks.at(0, block) + stripe);
        const uint32_t (&k)[4] = S::KEEPS_ROWS ? kept[0][S::KEEPS_ROWS ? block : 0] : loaded[0];
        const uint32_t (&v)[4] = S::KEEPS_ROWS ? kept[1][S::KEEPS_ROWS ? block : 0] : loaded[1];
        ldmatrix(q, q_across.at(0, block) + step * Tile<D>::kBlockBytes);
        ldmatrix(w, w_across.at(0, block) + step * Tile<D>::kBlockBytes);
        E::mma(s[0], k, q[0], q[1]), E::mma(s[1], k, q[2], q[3]);
        E::mma(d[0], v, w[0], w[1]), E::mma(d[1], v, w[2], w[3]);
      }
      const bool whole = query + 16 <= p.length && (!p.causal || query >= first_key + 15);
      uint32_t slopes[4], weights[4];
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const int column = 16 * step + 8 * side + 2 * place;
        const float2 inverse = *reinterpret_cast<const float2 *>(numbers + column), error = *reinterpret_cast<const float2 *>(numbers + kKeys + column);
        const float2 unit = *reinterpret_cast<const float2 *>(numbers + 2 * kKeys + column);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float r = i & 1 ? unit.y : unit.x, inverse_mass = i & 1 ? inverse.y : inverse.x, t = s[side][i] * scale[i >> 1];
          const float beta = f.beta * r, gamma = f.gamma * r * r;
          float slope = fmaf(d[side][i], inverse_mass, i & 1 ? error.y : error.x) * fmaf(2.f * gamma, t, beta);
          float weight = fmaf(fmaf(gamma, t, beta), t, f.a) * inverse_mass;
          const int64_t number = static_cast<int64_t>(first_tile + iteration % tiles) * kKeys + column + (i & 1);
          if (!whole && (number >= p.length || (p.causal && number < key + 8 * (i >> 1)))) slope = weight = 0.f;
          s[side][i] = slope, d[side][i] = weight;
        }
        slopes[2 * side] = E::pack(s[side][0], s[side][1]), slopes[2 * side + 1] = E::pack(s[side][2], s[side][3]);
        weights[2 * side] = E::pack(d[side][0], d[side][1]), weights[2 * side + 1] = E::pack(d[side][2], d[side][3]);
      }
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block) {
        uint32_t q[4], w[4];
        ldmatrix_transposed(q, q_down.at(0, block) + step * Tile<D>::kBlockBytes);
        E::mma(key_sums[2 * block], slopes, q[0], q[1]), E::mma(key_sums[2 * block + 1], slopes, q[2], q[3]);
        ldmatrix_transposed(w, w_down.at(0, block) + step * Tile<D>::kBlockBytes);
        E::mma(value_sums[2 * block], weights, w[0], w[1]), E::mma(value_sums[2 * block + 1], weights, w[2], w[3]);
      }
    }
  }

  if (p.normalize_qk) project<T, BLOCKS>(key_sums, k_blocks, stripe, scale);
  store_rows<T, D>(args.grad_key, head_of<T>(args.grad_key, batch, key_head) + begin * args.grad_key.token_stride, shared, k_blocks, stripe, key_sums, scale[0], scale[1], rows,
                   warp, lane_id);
  store_rows<T, D>(args.grad_value, head_of<T>(args.grad_value, batch, key_head) + begin * args.grad_value.token_stride, shared + S::OWN, v_blocks, stripe, value_sums, 1.f, 1.f,
                   rows, warp, lane_id);
}

// One block a head; sums in an order that never changes.
__global__ void __launch_bounds__(32) coefficients_kernel(const __grid_constant__ Gradients args) {
  const linattn_problem &p = args.problem;
  const int head = blockIdx.x;
  double sums[3] = {0.0, 0.0, 0.0};
  for (int64_t part = threadIdx.x; part < static_cast<int64_t>(p.batch) * args.row_tiles; part += 32) {
    const float *const x = args.partials + ((part / args.row_tiles * p.query_heads + head) * args.row_tiles + part % args.row_tiles) * 3;
    for (int i = 0; i < 3; ++i) sums[i] += x[i];
  }
  for (int i = 0; i < 3; ++i)
    for (int step = 16; step > 0; step /= 2) sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], step);
  if (threadIdx.x != 0) return;
  const double b = p.coefficients[p.query_heads + head], c = p.coefficients[2 * p.query_heads + head], temperature = p.coefficients[3 * p.query_heads + head];
  args.grad_coefficients[head] = static_cast<float>(sums[0]);
  args.grad_coefficients[p.query_heads + head] = static_cast<float>(temperature * sums[1]);
  args.grad_coefficients[2 * p.query_heads + head] = static_cast<float>(temperature * temperature * sums[2]);
  args.grad_coefficients[3 * p.query_heads + head] = static_cast<float>(b * sums[1] + 2.0 * c * temperature * sums[2]);
}

int64_t padded_length(const linattn_problem &problem) { return (problem.length + kRows - 1) / kRows * kRows; }

template <int D> cudaError_t launch(const Gradients &args, cudaStream_t stream) {
  using T = __nv_bfloat16;
  const linattn_problem &p = args.problem;
  const int64_t queries = static_cast<int64_t>(p.batch) * p.query_heads * args.padded, keys = static_cast<int64_t>(p.batch) * p.key_heads * args.padded;
  numbers_kernel<T, true><<<static_cast<unsigned>(keys * 4 / kThreads), kThreads, 0, stream>>>(args);
  numbers_kernel<T, false><<<static_cast<unsigned>(queries * 4 / kThreads), kThreads, 0, stream>>>(args);
  if (const cudaError_t failed = cudaFuncSetAttribute(rows_kernel<T, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape<D>::ROWS_SHARED)) return failed;
  rows_kernel<T, D><<<static_cast<unsigned>(p.batch * p.query_heads * args.row_tiles), kThreads, Shape<D>::ROWS_SHARED, stream>>>(args);
  if (const cudaError_t failed = cudaFuncSetAttribute(columns_kernel<T, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape<D>::COLUMNS_SHARED)) return failed;
  columns_kernel<T, D><<<static_cast<unsigned>(p.batch * p.key_heads * args.row_tiles), kThreads, Shape<D>::COLUMNS_SHARED, stream>>>(args);
  coefficients_kernel<<<static_cast<unsigned>(p.query_heads), 32, 0, stream>>>(args);
  return cudaPeekAtLastError();
}

// Of the kernel that takes more.
int shared_bytes(int dim) {
  switch (dim) {
    case 32: return Shape<32>::COLUMNS_SHARED;
    case 64: return Shape<64>::COLUMNS_SHARED;
    case 80: return Shape<80>::COLUMNS_SHARED;
    case 96: return Shape<96>::COLUMNS_SHARED;
    default: return Shape<128>::COLUMNS_SHARED;
  }
}

int64_t round_up(int64_t bytes) { return (bytes + 255) / 256 * 256; }

}  // namespace
}  // namespace linattn_pairs

namespace linattn {

using namespace linattn_pairs;

// Not in float16, whose factors would have to be kept in range: P / g is about 1 / N. Nor a gradient of the state.
bool pairs_plan_backward(const linattn_problem &problem, const linattn_backward_data &data, linattn_plan &plan) {
  const bool whole_rows = aligned(data.out) && aligned(data.grad_out) && aligned(data.grad_query) && aligned(data.grad_key) && aligned(data.grad_value);
  if (problem.dtype != LINATTN_BFLOAT16 || !pairs_take(problem) || !pairs_cost_less(problem) || data.grad_state || !whole_rows) return false;
  const int64_t padded = padded_length(problem), queries = static_cast<int64_t>(problem.batch) * problem.query_heads * padded;
  plan.chunk = plan.segment_length = problem.length, plan.segments = 1, plan.row_tiles = static_cast<int32_t>(padded / kRows);
  plan.shared_bytes = shared_bytes(problem.head_dim);
  plan.workspace_bytes = round_up(4 * static_cast<int64_t>(problem.batch) * problem.key_heads * padded) + round_up(4 * kNumbers * queries) + 12 * queries / kRows;
  return true;
}

cudaError_t pairs_backward(const linattn_problem &problem, const linattn_backward_data &data, const linattn_plan &plan) {
  Gradients args{problem, data.out, data.grad_out, data.grad_query, data.grad_key, data.grad_value, data.mass, data.grad_mass, data.grad_coefficients};
  args.padded = padded_length(problem), args.row_tiles = plan.row_tiles;
  char *workspace = static_cast<char *>(problem.workspace);
  args.key_scale = reinterpret_cast<float *>(workspace);
  workspace += round_up(4 * static_cast<int64_t>(problem.batch) * problem.key_heads * args.padded);
  args.query_numbers = reinterpret_cast<float *>(workspace);
  args.partials = reinterpret_cast<float *>(workspace + round_up(4 * kNumbers * static_cast<int64_t>(problem.batch) * problem.query_heads * args.padded));
  const cudaStream_t stream = static_cast<cudaStream_t>(problem.stream);
  switch (problem.head_dim) {
    case 32: return launch<32>(args, stream);
    case 64: return launch<64>(args, stream);
    case 80: return launch<80>(args, stream);
    case 96: return launch<96>(args, stream);
    case 128: return launch<128>(args, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace linattn
