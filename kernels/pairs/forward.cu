// Every pair of tokens by mma.sync, a warp 32 of a block's queries; which problems take this form, and the steps around it.
#include <algorithm>

#include "pairs/pairs.cuh"
#include "plan.h"

namespace linattn_pairs {
namespace {

constexpr int kThreads = 128;
constexpr int kStep = 32;                   // keys whose weights a warp holds at once
constexpr int kShortest = 32;               // tokens: below, a launch costs more than its work
constexpr int64_t kCachedBytes = 16 << 20;  // keys and values that neighbouring blocks share through the cache

template <int D> struct Shape {
  static constexpr int BLOCKS = D / 16;
  static constexpr bool KEEPS_QUERIES = D <= 96;  // in registers
  static constexpr int ROW_TILE = kRows * D * 2, KEY_TILE = kKeys * D * 2;
  static constexpr int SHARED = ROW_TILE + kStages * (2 * KEY_TILE + kKeys * 4);
  static constexpr int MIN_BLOCKS = D <= 64 ? 3 : 2;
};

// 1 / |k| of every key; 1 where keys are used as they are.
template <typename T> __global__ void key_scale_kernel(const __grid_constant__ Arguments args, float *result) {
  const linattn_problem &p = args.problem;
  const int64_t number = static_cast<int64_t>(blockIdx.x) * (kThreads / 4) + threadIdx.x / 4;
  const int64_t head = number / args.padded, token = number % args.padded;  // the padded length is a multiple of a block's share
  float square = 0.f;
  if (token < p.length && p.normalize_qk) {
    const T *const row = head_of<const T>(p.key, head / p.key_heads, head % p.key_heads) + token * p.key.token_stride;
    for (int piece = threadIdx.x % 4; piece < p.head_dim / 8; piece += 4) {
      const uint4 eight = *reinterpret_cast<const uint4 *>(row + piece * 8);
      for (const uint32_t two : {eight.x, eight.y, eight.z, eight.w}) {
        const float low = Element<T>::low(two), high = Element<T>::high(two);
        square += low * low + high * high;
      }
    }
  }
  square += __shfl_xor_sync(0xffffffffu, square, 1);
  square += __shfl_xor_sync(0xffffffffu, square, 2);
  if (threadIdx.x % 4 == 0) result[number] = p.normalize_qk ? inverse_norm(square) : 1.f;
}

template <typename T, int D> __global__ void __launch_bounds__(kThreads, Shape<D>::MIN_BLOCKS) forward_kernel(const __grid_constant__ Arguments args) {
  using S = Shape<D>;
  using E = Element<T>;
  constexpr int BLOCKS = S::BLOCKS, HALVES = kStep / 16;
  extern __shared__ __align__(1024) unsigned char shared[];
  const linattn_problem &p = args.problem;
  const int thread = threadIdx.x, lane_id = thread & 31, warp = warp_number(), group = lane_id >> 2, place = lane_id & 3;
  const uint32_t row_tile = shared_address(shared), key_tiles = row_tile + S::ROW_TILE;
  const float *const scales = reinterpret_cast<const float *>(shared + S::ROW_TILE + kStages * 2 * S::KEY_TILE);
  const uint32_t down = lane_down<D>(lane_id), across = lane_across<D>(lane_id);

  const Place own(args);
  const int batch = own.batch, head = own.head, rows = own.rows;
  const int64_t begin = own.begin;
  const KeyCopy<T, D, kThreads> copy(args, own, key_tiles);
  copy_tile<D, kRows, kThreads>(row_tile, head_of<const T>(p.query, batch, head) + begin * p.query.token_stride, p.query.token_stride, rows, thread);
  copy.start(0, thread);
  copy_commit();
  copy_wait<0>();
  __syncthreads();

  const float temperature = p.coefficients[3 * p.query_heads + head], b = p.coefficients[p.query_heads + head], c = p.coefficients[2 * p.query_heads + head];
  const float shrink = weight_scale<T>(p.coefficients[head], b, c, temperature), a = p.coefficients[head] * shrink;
  const Blocks<D> q_blocks(row_tile, down), q_across(row_tile, across);
  uint32_t q[2][S::KEEPS_QUERIES ? BLOCKS : 1][4];
  float beta[2][2], gamma[2][2], mass[2][2], acc[2][2 * BLOCKS][4];
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    const uint32_t offset = Tile<D>::rows_at(2 * warp + m);
    uint32_t fragments[BLOCKS][4];
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) ldmatrix(fragments[block], q_blocks.at(0, block) + offset);
    float scale[2] = {1.f, 1.f};
    if (p.normalize_qk) {
      row_products<T>(scale[0], scale[1], fragments, q_across, offset, lane_id);
      scale[0] = inverse_norm(scale[0]), scale[1] = inverse_norm(scale[1]);
    }
    if constexpr (S::KEEPS_QUERIES) {
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block)
#pragma unroll
        for (int i = 0; i < 4; ++i) q[m][block][i] = fragments[block][i];
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float factor = temperature * scale[half];
      beta[m][half] = b * factor * shrink, gamma[m][half] = c * factor * factor * shrink, mass[m][half] = 0.f;
    }
#pragma unroll
    for (int block = 0; block < 2 * BLOCKS; ++block)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[m][block][i] = 0.f;
  }

  const int64_t warp_begin = begin + 32 * warp;
  for (int tile = 0; tile < own.tiles; ++tile) {
    if (tile > 0) {
      copy_wait<0>();
      __syncthreads();  // the tile is here, and nobody reads the one that the next copies overwrite
    }
    if (tile + 1 < own.tiles) {
      copy.start(tile + 1, thread);
      copy_commit();
    }
    const int stage = tile % kStages;
    const uint32_t key_tile = key_tiles + stage * 2 * S::KEY_TILE;
    const Blocks<D> k_blocks(key_tile, across), v_blocks(key_tile + S::KEY_TILE, down);
    const int64_t first_key = static_cast<int64_t>(tile) * kKeys;
#pragma unroll
    for (int step = 0; step < kKeys / kStep; ++step) {
      const int64_t key = first_key + step * kStep;
      if (key >= (p.causal ? min(p.length, warp_begin + 32) : p.length)) break;
      float s[2][2 * HALVES][4];
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int n = 0; n < 2 * HALVES; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) s[m][n][i] = 0.f;
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block) {
        uint32_t loaded[2][4];
        if constexpr (!S::KEEPS_QUERIES) {
#pragma unroll
          for (int m = 0; m < 2; ++m) ldmatrix(loaded[m], q_blocks.at(0, block) + Tile<D>::rows_at(2 * warp + m));
        }
#pragma unroll
        for (int half = 0; half < HALVES; ++half) {
          uint32_t k[4];
          ldmatrix(k, k_blocks.at(step * HALVES + half, block));
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            const uint32_t (&x)[4] = S::KEEPS_QUERIES ? q[m][S::KEEPS_QUERIES ? block : 0] : loaded[m];
            E::mma(s[m][2 * half], x, k[0], k[1]);
            E::mma(s[m][2 * half + 1], x, k[2], k[3]);
          }
        }
      }
      const bool whole = key + kStep <= p.length && (!p.causal || key + kStep - 1 <= warp_begin);
      uint32_t weights[2][HALVES][4];
#pragma unroll
      for (int half = 0; half < HALVES; ++half)
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          const int column = step * kStep + half * 16 + side * 8 + 2 * place;
          const float2 scale = *reinterpret_cast<const float2 *>(scales + stage * kKeys + column);
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            float (&x)[4] = s[m][2 * half + side];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const float t = x[i] * (i & 1 ? scale.y : scale.x);
              x[i] = fmaf(fmaf(gamma[m][i >> 1], t, beta[m][i >> 1]), t, a);
            }
            if (!whole) {
              const int64_t row = warp_begin + 16 * m + group;
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                const int64_t n = first_key + column + (i & 1);
                if (n >= p.length || (p.causal && n > row + (i >> 1) * 8)) x[i] = 0.f;
              }
            }
            mass[m][0] += x[0] + x[1], mass[m][1] += x[2] + x[3];
            weights[m][half][2 * side] = E::pack(x[0], x[1]), weights[m][half][2 * side + 1] = E::pack(x[2], x[3]);
          }
        }
#pragma unroll
      for (int half = 0; half < HALVES; ++half)
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block) {
          uint32_t v[4];
          ldmatrix_transposed(v, v_blocks.at(step * HALVES + half, block));
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            E::mma(acc[m][2 * block], weights[m][half], v[0], v[1]);
            E::mma(acc[m][2 * block + 1], weights[m][half], v[2], v[3]);
          }
        }
    }
  }

  // A warp stages its results over its own queries.
  float *const mass_rows = args.mass + (static_cast<int64_t>(batch) * p.query_heads + head) * p.length + begin;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      mass[m][half] += __shfl_xor_sync(0xffffffffu, mass[m][half], 1);
      mass[m][half] += __shfl_xor_sync(0xffffffffu, mass[m][half], 2);
      const int row = 32 * warp + 16 * m + 8 * half + group;
      if (place == 0 && row < rows) mass_rows[row] = mass[m][half] / shrink;
    }
    const float finish0 = 1.f / mass[m][0], finish1 = 1.f / mass[m][1];
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block)
      store_block<T, D>(q_blocks.at(0, block) + Tile<D>::rows_at(2 * warp + m), acc[m][2 * block], acc[m][2 * block + 1], finish0, finish1, lane_id);
  }
  __syncwarp();
  T *const results = head_of<T>(args.out, batch, head) + begin * args.out.token_stride;
  for (int index = lane_id; index < 32 * (D / 8); index += 32) {
    const int row = 32 * warp + index / (D / 8), piece = index % (D / 8);
    if (row < rows) *reinterpret_cast<uint4 *>(results + row * args.out.token_stride + piece * 8) = *reinterpret_cast<const uint4 *>(shared + Tile<D>::at(row, piece));
  }
}

int64_t padded_length(const linattn_problem &problem) { return (problem.length + kKeys - 1) / kKeys * kKeys; }

int64_t scale_bytes(const linattn_problem &problem) { return 4 * static_cast<int64_t>(problem.batch) * problem.key_heads * padded_length(problem); }

int64_t row_tiles_of(const linattn_problem &problem) { return (problem.length + kRows - 1) / kRows; }

template <typename T, int D> cudaError_t launch(const Arguments &args, cudaStream_t stream) {
  const linattn_problem &p = args.problem;
  const int64_t numbers = static_cast<int64_t>(p.batch) * p.key_heads * args.padded;
  key_scale_kernel<T><<<static_cast<int>(numbers / (kThreads / 4)), kThreads, 0, stream>>>(args, args.key_scale);
  if (const cudaError_t failed = cudaPeekAtLastError()) return failed;
  if (args.chunks > 1)
    if (const cudaError_t failed = state_launch(args, stream)) return failed;
  if (args.warpgroups) return hopper_launch(args, stream);
  if (const cudaError_t failed = cudaFuncSetAttribute(forward_kernel<T, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape<D>::SHARED)) return failed;
  forward_kernel<T, D><<<p.batch * p.query_heads * args.row_tiles, kThreads, Shape<D>::SHARED, stream>>>(args);
  return cudaPeekAtLastError();
}

template <typename T> cudaError_t launch_by_dim(const Arguments &args, cudaStream_t stream) {
  switch (args.problem.head_dim) {
    case 32: return launch<T, 32>(args, stream);
    case 64: return launch<T, 64>(args, stream);
    case 80: return launch<T, 80>(args, stream);
    case 96: return launch<T, 96>(args, stream);
    case 128: return launch<T, 128>(args, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

// float16 holds the weights of unit vectors, not those of vectors of any length.
bool pairs_take(const linattn_problem &problem) {
  const int d = problem.head_dim;
  const bool dtype = problem.dtype == LINATTN_BFLOAT16 || (problem.dtype == LINATTN_FLOAT16 && problem.normalize_qk);
  const bool dim = d == problem.value_dim && (d == 32 || d == 64 || d == 80 || d == 96 || d == 128);
  const bool plain = !problem.log_decay && !problem.key_segments && !problem.initial_state && !problem.dropout_p;
  const int64_t heads = static_cast<int64_t>(problem.batch) * problem.query_heads;
  return problem.degree == 2 && dtype && dim && plain && problem.length >= kShortest && heads < (1 << 20) && heads * row_tiles_of(problem) < (1 << 30) &&
         heads * padded_length(problem) / (kThreads / 4) < (int64_t{1} << 31) && aligned(problem.query) && aligned(problem.key) && aligned(problem.value);
}
bool pairs_cost_less(const linattn_problem &problem) { return problem.length <= int64_t{8} * problem.head_dim * problem.head_dim; }

}  // namespace linattn_pairs

namespace linattn {

using namespace linattn_pairs;

namespace {

int shared_bytes(int dim) {
  switch (dim) {
    case 32: return Shape<32>::SHARED;
    case 64: return Shape<64>::SHARED;
    case 80: return Shape<80>::SHARED;
    case 96: return Shape<96>::SHARED;
    default: return Shape<128>::SHARED;
  }
}

}  // namespace

// The scales of keys, then the chunks' sums and states. A state asked for where none is formed is not to be had here.
bool pairs_plan_forward(const linattn_problem &problem, const linattn_forward_result &result, linattn_plan &plan) {
  const bool by_state = state_takes(problem);
  if (!pairs_take(problem) || !(by_state || (pairs_cost_less(problem) && !result.state)) || !aligned(result.out)) return false;
  plan.states = by_state, plan.warpgroups = hopper_takes(problem), plan.row_tiles = static_cast<int32_t>(row_tiles_of(problem));
  plan.segments = by_state ? static_cast<int32_t>(state_chunks(problem)) : 1, plan.segment_length = plan.chunk = by_state ? kChunk * problem.head_dim : problem.length;
  plan.shared_bytes = plan.warpgroups ? hopper_shared_bytes(problem) : shared_bytes(problem.head_dim);
  plan.workspace_bytes = scale_bytes(problem) + (by_state ? states_bytes(problem) + sums_bytes(problem) + unit_key_bytes(problem) : 0);
  return true;
}

cudaError_t pairs_forward(const linattn_problem &problem, const linattn_forward_result &result, const linattn_plan &plan) {
  const int64_t bytes = problem.length * problem.head_dim * 4, heads = static_cast<int64_t>(problem.batch) * problem.query_heads;
  const int64_t together = std::min(heads, std::max<int64_t>(1, kCachedBytes / bytes) * (problem.query_heads / problem.key_heads));
  Arguments args{problem,
                 result.out,
                 result.mass,
                 result.state,
                 static_cast<float *>(problem.workspace),
                 padded_length(problem),
                 plan.row_tiles,
                 static_cast<int32_t>(together),
                 plan.segments,
                 nullptr,
                 nullptr,
                 nullptr,
                 plan.warpgroups != 0};
  if (plan.states) {
    args.states = static_cast<unsigned char *>(problem.workspace) + scale_bytes(problem);
    args.unit_keys = args.states + states_bytes(problem);
    args.sums = reinterpret_cast<float *>(args.unit_keys + unit_key_bytes(problem));
  }
  const cudaStream_t stream = static_cast<cudaStream_t>(problem.stream);
  return problem.dtype == LINATTN_BFLOAT16 ? launch_by_dim<__nv_bfloat16>(args, stream) : launch_by_dim<__half>(args, stream);
}

}  // namespace linattn
