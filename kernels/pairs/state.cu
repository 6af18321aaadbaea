// architectures: sm_90a
// The second degree beyond some thousands of tokens: the sums of each chunk by wgmma, and from them the state before every chunk. Pairs are
// then formed inside chunks only (hopper.cu), and time grows with N, not with its square.
//
// sum_n k_a k_b v_n is a product over the tokens: its rows are the features k_a k_b, made in registers from a block of K^T and one row of it,
// its columns those of V in shared memory.
#include "tile/warpgroup.cuh"
#include "pairs/pairs.cuh"

namespace linattn_pairs {
namespace {

using T = __nv_bfloat16;

constexpr int kGroups = 2, kThreads = 128 * kGroups, kTilesOfGroup = 5;  // a tile: 64 rows of sums, 16 a warp
constexpr int kSteps = 3;            // of kKeys tokens, in shared memory
constexpr int64_t kShortest = 112;  // tokens, times the head dim: up to there all pairs cost less
constexpr int kScanThreads = 256, kAhead = 4;

template <int D> struct Shape {
  using S = State<D>;
  static constexpr int KEYS = D * kKeys * 2, VALUES = kKeys * D * 2, STEP = KEYS + VALUES + 1024;  // K^T, V, and a row of ones and one of zeros
  static constexpr int PAIR_TILES = S::ITEMS / 4, TILES = PAIR_TILES + 1;
  static constexpr int PARTS = (TILES + kTilesOfGroup - 1) / kTilesOfGroup / kGroups + 1;  // blocks a chunk; the last warpgroup has no tiles
};

// Unit keys, rounded: D rows of 64 tokens for every 64 tokens, zero behind the last.
template <int D> __global__ void __launch_bounds__(kKeys * 2) unit_keys_kernel(const __grid_constant__ Arguments args) {
  using E = Element<T>;
  __shared__ __align__(16) uint16_t across[D][kKeys + 8];
  const linattn_problem &p = args.problem;
  const int thread = threadIdx.x, place = thread % kKeys, head_pair = blockIdx.y;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kKeys + place;
  const bool real = token < p.length;
  const T *const row = head_of<const T>(p.key, head_pair / p.key_heads, head_pair % p.key_heads) + (real ? token : 0) * p.key.token_stride;
  const float scale = real ? args.key_scale[head_pair * args.padded + token] : 0.f;
  for (int piece = thread / kKeys; piece < D / 8; piece += 2) {
    const uint4 eight = real ? *reinterpret_cast<const uint4 *>(row + 8 * piece) : make_uint4(0, 0, 0, 0);
    const uint32_t words[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t two = E::pack(E::low(words[i]) * scale, E::high(words[i]) * scale);
      across[8 * piece + 2 * i][place] = static_cast<uint16_t>(two), across[8 * piece + 2 * i + 1][place] = static_cast<uint16_t>(two >> 16);
    }
  }
  __syncthreads();
  uint4 *const target = reinterpret_cast<uint4 *>(args.unit_keys + (head_pair * args.padded + static_cast<int64_t>(blockIdx.x) * kKeys) * D * 2);
  for (int index = thread; index < D * kKeys / 8; index += kKeys * 2) target[index] = *reinterpret_cast<const uint4 *>(&across[index / (kKeys / 8)][index % (kKeys / 8) * 8]);
}

// What the 16 rows of tile `tile` are that warp `worker` of a warpgroup makes: row `factor` of K^T times block `block` of its rows, and where
// they go among the sums (-1: nowhere). Behind the tiles of pairs comes that of sum k v, whose factor is one.
template <int D> struct Rows {
  int factor, block, target;
  __device__ __forceinline__ Rows(int tile, int worker) {
    using S = State<D>;
    if (tile < Shape<D>::PAIR_TILES) {
      int first = 0, rest = tile;
      for (; rest >= 4 * (S::BLOCKS - first); ++first) rest -= 4 * (S::BLOCKS - first);
      const int inside = rest / (S::BLOCKS - first) * 4 + worker, above = rest % (S::BLOCKS - first);
      factor = 16 * first + inside, block = first + above;
      target = 16 * (S::first_item(first) + inside * (S::BLOCKS - first) + above);
    } else {
      const bool real = worker < S::BLOCKS;
      factor = real ? D : D + 1, block = real ? worker : 0;
      target = !real || tile >= Shape<D>::TILES ? -1 : S::LINEAR + 16 * worker;
    }
  }
};

template <int D> __global__ void __launch_bounds__(kThreads, 1) sums_kernel(const __grid_constant__ Arguments args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using S = State<D>;
  using H = Shape<D>;
  constexpr int BLOCKS = S::BLOCKS;
  extern __shared__ __align__(1024) unsigned char shared[];
  const linattn_problem &p = args.problem;
  const int thread = threadIdx.x, lane_id = thread & 31, warp = warp_number(), group = lane_id >> 2, place = lane_id & 3;
  const int number = blockIdx.x / H::PARTS, warpgroup = blockIdx.x % H::PARTS * kGroups + warp / 4, worker = warp % 4;
  const int head_pair = number / static_cast<int>(args.chunks), chunk = number % static_cast<int>(args.chunks);
  if (chunk == args.chunks - 1 && !args.final_state) return;
  const int64_t begin = chunk * S::CHUNK;
  const int tokens = static_cast<int>(min(p.length - begin, S::CHUNK)), steps = (tokens + kKeys - 1) / kKeys;
  const uint32_t base = shared_address(shared);

  const T *const keys = reinterpret_cast<const T *>(args.unit_keys) + (head_pair * args.padded + begin) * D;
  const T *const values = head_of<const T>(p.value, head_pair / p.key_heads, head_pair % p.key_heads) + begin * p.value.token_stride;
  int next_step = 0, next_stage = 0;
  const auto fetch = [&]() {
    if (next_step < steps) {
      const uint32_t stage = base + next_stage * H::STEP;
      copy_tile<64, D, kThreads>(stage, keys + static_cast<int64_t>(next_step) * kKeys * D, kKeys, D, thread);
      copy_tile<D, kKeys, kThreads>(stage + H::KEYS, values + static_cast<int64_t>(next_step) * kKeys * p.value.token_stride, p.value.token_stride, tokens - next_step * kKeys,
                                    thread);
    }
    ++next_step, next_stage = next_stage == kSteps - 1 ? 0 : next_stage + 1;
    copy_commit();
  };
#pragma unroll
  for (int i = 0; i < kSteps - 1; ++i) fetch();
  for (int i = thread; i < kSteps * 64; i += kThreads)  // two numbers each
    *reinterpret_cast<uint32_t *>(shared + i / 64 * H::STEP + H::KEYS + H::VALUES + i % 64 * 4) = i % 64 < 32 ? Element<T>::kOnes : 0u;

  uint32_t factor[kTilesOfGroup], block[kTilesOfGroup];  // where they begin in a stage
#pragma unroll
  for (int j = 0; j < kTilesOfGroup; ++j) {
    const Rows<D> rows(warpgroup * kTilesOfGroup + j, worker);
    factor[j] = rows.factor < D ? Tile<64>::at(rows.factor, 0) + 4 * place : H::KEYS + H::VALUES + (rows.factor - D) * 128 + 4 * place;
    block[j] = base + Tile<64>::rows_at(rows.block);
  }
  const bool last = warpgroup == H::PARTS * kGroups - 1;  // sum k_a k_b, sum k, sum v
  const int column = thread % 128;
  float column_sum = 0.f;
  float acc[kTilesOfGroup][2 * BLOCKS][4];
#pragma unroll
  for (int j = 0; j < kTilesOfGroup; ++j)
#pragma unroll
    for (int n = 0; n < 2 * BLOCKS; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[j][n][i] = 0.f;

  uint32_t stage = 0;
  const uint32_t down = lane_down<64>(lane_id);
  for (int step = 0; step < steps; ++step) {
    copy_wait<kSteps - 2>();
    warpgroup_publish();
    __syncthreads();  // the stage is here, and nobody reads the one that the next copies overwrite
    fetch();
    if (last) {
      uint32_t k[kKeys / 16][4];
#pragma unroll
      for (int token = 0; token < kKeys / 16; ++token) {
        ldmatrix(k[token], (base + Tile<64>::rows_at(worker % BLOCKS) + down + stage) ^ (token << 5));
        if (worker >= BLOCKS) k[token][0] = k[token][1] = k[token][2] = k[token][3] = 0u;
      }
      warpgroup_keep(acc[0]);
      warpgroup_begin();
#pragma unroll
      for (int token = 0; token < kKeys / 16; ++token) WarpgroupProduct<T, D, false>::run(acc[0], k[token], warpgroup_operand<64>(base + stage + 32 * token), true);
      warpgroup_commit();
      const unsigned char *const values_here = shared + stage + H::KEYS, *const keys_here = shared + stage;
      if (column < 2 * D)
#pragma unroll 8
        for (int token = 0; token < kKeys; ++token)
          column_sum += static_cast<float>(*reinterpret_cast<const T *>(column < D ? keys_here + Tile<64>::at(column, token / 8) + token % 8 * 2
                                                                                   : values_here + Tile<D>::at(token, (column - D) / 8) + column % 8 * 2));
      warpgroup_wait<0>();
      warpgroup_keep(acc[0]);
    } else {
      uint32_t features[2][kTilesOfGroup][4];
#pragma unroll
      for (int token = 0; token < kKeys / 16; ++token) {
        uint32_t (&x)[kTilesOfGroup][4] = features[token % 2];
        if (token >= 2) warpgroup_wait<1>();
#pragma unroll
        for (int j = 0; j < kTilesOfGroup; ++j) {
          uint32_t k[4];
          ldmatrix(k, (block[j] + down + stage) ^ (token << 5));
          const uint32_t near = *reinterpret_cast<const uint32_t *>(shared + ((factor[j] + stage) ^ (token << 5)));
          const uint32_t far = *reinterpret_cast<const uint32_t *>(shared + ((factor[j] + stage) ^ (token << 5) ^ 16));
          x[j][0] = multiply_two(k[0], near), x[j][1] = multiply_two(k[1], near), x[j][2] = multiply_two(k[2], far), x[j][3] = multiply_two(k[3], far);
        }
#pragma unroll
        for (int j = 0; j < kTilesOfGroup; ++j) warpgroup_keep(acc[j]);
        warpgroup_begin();
#pragma unroll
        for (int j = 0; j < kTilesOfGroup; ++j)  // the last tiles may be of nothing
          WarpgroupProduct<T, D, true>::run(acc[j], x[j], warpgroup_operand<D>(base + stage + H::KEYS + Tile<D>::rows_at(token)), true);
        warpgroup_commit();
      }
      warpgroup_wait<0>();
#pragma unroll
      for (int j = 0; j < kTilesOfGroup; ++j) warpgroup_keep(acc[j]);
    }
    stage = stage == (kSteps - 1) * H::STEP ? 0 : stage + H::STEP;
  }
  copy_wait<0>();

  float *const sums = args.sums + static_cast<int64_t>(number) * S::SUMS;
  if (last && column < 2 * D) sums[S::ROWS * D + column] = column_sum;
#pragma unroll
  for (int j = 0; j < kTilesOfGroup; ++j) {
    const int target = !last ? Rows<D>(warpgroup * kTilesOfGroup + j, worker).target : j == 0 && worker < BLOCKS ? S::MASSES + 16 * worker : -1;
    if (target < 0) continue;
#pragma unroll
    for (int n = 0; n < 2 * BLOCKS; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        *reinterpret_cast<float2 *>(sums + (target + group + 8 * half) * D + 8 * n + 2 * place) = make_float2(acc[j][n][2 * half], acc[j][n][2 * half + 1]);
  }
#endif
}

// Four numbers of the state, chunk after chunk: rounded before each, and to the caller behind all.
template <int D> __global__ void __launch_bounds__(kScanThreads) scan_kernel(const __grid_constant__ Arguments args) {
  using S = State<D>;
  using E = Element<T>;
  constexpr int kPieces = S::SUMS / 4;
  const int head_pair = blockIdx.y, piece = blockIdx.x * kScanThreads + threadIdx.x;
  if (piece >= kPieces) return;
  const int row = 4 * piece / D, column = 4 * piece % D;
  int a = 0, b = 0;  // of the rows of pairs
  if (row < S::LINEAR) {
    int first = 0;
    const int item = row / 16;
    while (first + 1 < S::BLOCKS && item >= S::first_item(first + 1)) ++first;
    a = 16 * first + (item - S::first_item(first)) / (S::BLOCKS - first), b = 16 * (first + (item - S::first_item(first)) % (S::BLOCKS - first)) + row % 16;
  }
  const bool masses = row >= S::MASSES && row < S::ROWS;
  const float worth = row < S::LINEAR && a / 16 != b / 16 ? 2.f : 1.f;  // both orders of a pair of blocks
  const float4 *const sums = reinterpret_cast<const float4 *>(args.sums + head_pair * args.chunks * S::SUMS) + piece;
  unsigned char *const states = args.states + head_pair * args.chunks * S::BYTES;
  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
  const int64_t last = args.final_state ? args.chunks : args.chunks - 1;
  const auto write = [&](int64_t chunk) {
    unsigned char *const state = states + chunk * S::BYTES;
    if (row >= S::ROWS) {
      reinterpret_cast<float4 *>(state + S::ROUNDED_ROWS * D * 2)[piece - S::ROWS * D / 4] = sum;
      return;
    }
    const uint2 high = make_uint2(E::pack(sum.x * worth, sum.y * worth), E::pack(sum.z * worth, sum.w * worth));
    const int target = masses ? row - S::MASSES : 2 * D + row;
    *reinterpret_cast<uint2 *>(state + (target * D + column) * 2) = high;
    if (masses) {
      const uint2 low = make_uint2(E::pack(sum.x - E::low(high.x), sum.y - E::high(high.x)), E::pack(sum.z - E::low(high.y), sum.w - E::high(high.y)));
      *reinterpret_cast<uint2 *>(state + ((target + D) * D + column) * 2) = low;
    }
  };
  for (int64_t chunk = 0; chunk < args.chunks; chunk += kAhead) {
    float4 own[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) own[i] = chunk + i < last ? sums[(chunk + i) * kPieces] : make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (chunk + i > 0 && chunk + i < args.chunks) write(chunk + i);
      sum.x += own[i].x, sum.y += own[i].y, sum.z += own[i].z, sum.w += own[i].w;
    }
  }
  if (!args.final_state) return;

  // The caller's rows: k, one, k_i k_j for i <= j; its last column is that of the masses.
  constexpr int kFeatures = D + 1 + D * (D + 1) / 2;
  float *const target = args.final_state + static_cast<int64_t>(head_pair) * kFeatures * (D + 1);
  const float four[4] = {sum.x, sum.y, sum.z, sum.w};
  const auto pair_row = [](int i, int j) { return D + 1 + i * D - i * (i - 1) / 2 + j - i; };
  if (row == S::ROWS + 1 && column == 0) target[D * (D + 1) + D] = static_cast<float>(args.problem.length);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int at = column + i;
    if (row < S::LINEAR) {
      if (a <= b) target[pair_row(a, b) * (D + 1) + at] = four[i];
    } else if (row < S::MASSES) {
      target[(row - S::LINEAR) * (D + 1) + at] = four[i];
    } else if (masses) {
      if (row - S::MASSES <= at) target[pair_row(row - S::MASSES, at) * (D + 1) + D] = four[i];
    } else if (row == S::ROWS) {
      target[at * (D + 1) + D] = four[i];
    } else {
      target[D * (D + 1) + at] = four[i];
    }
  }
}

template <int D> cudaError_t launch(const Arguments &args, cudaStream_t stream) {
  using H = Shape<D>;
  const int heads = args.problem.batch * args.problem.key_heads;
  unit_keys_kernel<D><<<dim3(static_cast<unsigned>(args.padded / kKeys), heads), 2 * kKeys, 0, stream>>>(args);
  if (const cudaError_t failed = cudaPeekAtLastError()) return failed;
  if (const cudaError_t failed = cudaFuncSetAttribute(sums_kernel<D>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSteps * H::STEP)) return failed;
  const int blocks = heads * static_cast<int>(args.chunks) * H::PARTS;
  sums_kernel<D><<<blocks, kThreads, kSteps * H::STEP, stream>>>(args);
  if (const cudaError_t failed = cudaPeekAtLastError()) return failed;
  scan_kernel<D><<<dim3((State<D>::SUMS / 4 + kScanThreads - 1) / kScanThreads, heads), kScanThreads, 0, stream>>>(args);
  return cudaPeekAtLastError();
}

int64_t records(const linattn_problem &problem) { return static_cast<int64_t>(problem.batch) * problem.key_heads * state_chunks(problem); }

}  // namespace

// bfloat16 alone: sums over many tokens leave float16's range.
bool state_takes(const linattn_problem &problem) {
  const int d = problem.head_dim;
  const int64_t heads = static_cast<int64_t>(problem.batch) * problem.key_heads;
  return problem.causal && problem.dtype == LINATTN_BFLOAT16 && (d == 32 || d == 64) && problem.length > kShortest * d && hopper_takes(problem) && heads < 65536 &&
         heads * state_chunks(problem) < (1 << 26);
}
int64_t state_chunks(const linattn_problem &problem) {
  const int64_t chunk = kChunk * problem.head_dim;
  return (problem.length + chunk - 1) / chunk;
}
int64_t unit_key_bytes(const linattn_problem &problem) {
  return static_cast<int64_t>(problem.batch) * problem.key_heads * ((problem.length + kKeys - 1) / kKeys * kKeys) * problem.head_dim * 2;
}
int64_t sums_bytes(const linattn_problem &problem) { return records(problem) * 4 * (problem.head_dim == 32 ? State<32>::SUMS : State<64>::SUMS); }
int64_t states_bytes(const linattn_problem &problem) { return records(problem) * (problem.head_dim == 32 ? State<32>::BYTES : State<64>::BYTES); }
cudaError_t state_launch(const Arguments &args, cudaStream_t stream) { return args.problem.head_dim == 32 ? launch<32>(args, stream) : launch<64>(args, stream); }

}  // namespace linattn_pairs
