// architectures: sm_90a
// Pairs of tokens by wgmma: two warpgroups a block, 64 queries each. Every pair; or those of a chunk, what lies before it being in a state,
// against which a query's features q_a q_b, made in registers, are multiplied.
#include "tile/warpgroup.cuh"
#include "pairs/pairs.cuh"

namespace linattn_pairs {
namespace {

constexpr int kThreads = 256;

template <int D> struct Shape {
  static constexpr int BLOCKS = D / 16;
  static constexpr int ROW_TILE = kRows * D * 2;
  template <typename T> static constexpr int SHARED = ROW_TILE + KeyCopy<T, D, D, kThreads>::BYTES;
  static constexpr int MIN_BLOCKS = D <= 64 ? 2 : 1;
};

// What the state before the chunk adds to a warp's 16 rows: a sum v + beta q^ . (sum k v) + gamma sum q^_a q^_b (sum k_a k_b v), and the masses.
// q: their rounded unit vectors; scales: what made them such. The state passes through the tiles of keys, two stages of rows.
template <typename T, int D> struct StateReader {
  using S = State<D>;
  using E = Element<T>;
  static constexpr int BLOCKS = S::BLOCKS, ITEMS = 8;  // of a stage
  static constexpr int STAGE = 16 * ITEMS * D * 2;
  static_assert(kStages * STAGE <= KeyCopy<T, D, D, kThreads>::BYTES && 2 * D <= 16 * ITEMS, "the stages fit where the keys will be");
  const T *rows;         // rounded
  const float *columns;  // sum k, sum v
  uint32_t stages;
  int thread, next_row = 0, next_stage = 0;

  __device__ __forceinline__ StateReader(const unsigned char *state, uint32_t stages, int thread)
      : rows(reinterpret_cast<const T *>(state)), columns(reinterpret_cast<const float *>(state + S::ROUNDED_ROWS * D * 2)), stages(stages), thread(thread) {}

  __device__ __forceinline__ void fetch(int count) {
    copy_tile<D, 16 * ITEMS, kThreads>(stages + next_stage * STAGE, rows + static_cast<int64_t>(next_row) * D, D, count, thread);
    copy_commit();
    next_row += count, next_stage ^= 1;
  }
  // The stage fetched last is here; the next one is on its way.
  __device__ __forceinline__ uint32_t turn(int next_count) {
    copy_wait<0>();
    warpgroup_publish();
    __syncthreads();
    const uint32_t here = stages + (next_stage ^ 1) * STAGE;
    if (next_count > 0) fetch(next_count);
    return here;
  }

  // own: the query tile in shared memory, row: the lane's first row in it.
  __device__ __forceinline__ void add(float (&acc)[2 * BLOCKS][4], float (&mass)[2], const uint32_t (&q)[BLOCKS][4], const unsigned char *own, int row, const float (&scale)[2],
                                      float a, float beta, float gamma, float count, int place) {
    const auto stage_of = [](int block) { return ITEMS / (BLOCKS - block) == 4 ? 4 : ITEMS / (BLOCKS - block) >= 8 ? 8 : 2; };  // values of a in a stage
    const auto items_of = [&](int block) { return 16 * stage_of(block) * (BLOCKS - block); };                                    // rows of a stage
    fetch(2 * D);
    uint32_t here = turn(items_of(0));
    warpgroup_keep(acc);
    warpgroup_begin();
#pragma unroll
    for (int block = 0; block < 2 * BLOCKS; ++block) WarpgroupProduct<T, D, true>::run(acc, q[block % BLOCKS], warpgroup_operand<D>(here + Tile<D>::rows_at(block)), block > 0);
    warpgroup_commit();
    warpgroup_wait<0>();
    warpgroup_keep(acc);
    if (place == 0) mass[0] += a * count, mass[1] += a * count;
#pragma unroll
    for (int n = 0; n < 2 * BLOCKS; ++n) {
      const float2 line = *reinterpret_cast<const float2 *>(columns + 8 * n + 2 * place);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t two = q[n / 2][n % 2 * 2 + half];
        mass[half] += E::low(two) * (gamma * acc[n][2 * half] + beta * line.x) + E::high(two) * (gamma * acc[n][2 * half + 1] + beta * line.y);
      }
    }

#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) {
      const int each = stage_of(block), next_block = block + 1;
#pragma unroll 1
      for (int first = 0; first < 16; first += each) {
        here = turn(first + each < 16 ? items_of(block) : next_block < BLOCKS ? items_of(next_block < BLOCKS ? next_block : 0) : D);
        uint32_t features[ITEMS][4];
#pragma unroll
        for (int i = 0; i < each; ++i) {
          uint32_t factor[2];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int at = first + i;
            const float x = static_cast<float>(*reinterpret_cast<const T *>(own + Tile<D>::at(row + 8 * half, 2 * block + at / 8) + at % 8 * 2)) * scale[half];
            factor[half] = E::pack(x, x);
          }
#pragma unroll
          for (int other = block; other < BLOCKS; ++other)
#pragma unroll
            for (int k = 0; k < 4; ++k) features[i * (BLOCKS - block) + other - block][k] = multiply_two(q[other][k], factor[k % 2]);
        }
        warpgroup_keep(acc);
        warpgroup_begin();
#pragma unroll
        for (int item = 0; item < each * (BLOCKS - block); ++item)
          WarpgroupProduct<T, D, true>::run(acc, features[item], warpgroup_operand<D>(here + Tile<D>::rows_at(item)), block > 0 || first > 0 || item > 0);
        warpgroup_commit();
        warpgroup_wait<0>();
        warpgroup_keep(acc);
      }
    }

    here = turn(0);
    uint32_t linear[BLOCKS][4];
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block)
#pragma unroll
      for (int k = 0; k < 4; ++k) linear[block][k] = E::pack(E::low(q[block][k]) * beta, E::high(q[block][k]) * beta);
#pragma unroll
    for (int n = 0; n < 2 * BLOCKS; ++n) {
      const float2 line = *reinterpret_cast<const float2 *>(columns + D + 8 * n + 2 * place);
#pragma unroll
      for (int half = 0; half < 2; ++half) acc[n][2 * half] = gamma * acc[n][2 * half] + a * line.x, acc[n][2 * half + 1] = gamma * acc[n][2 * half + 1] + a * line.y;
    }
    warpgroup_keep(acc);
    warpgroup_begin();
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) WarpgroupProduct<T, D, true>::run(acc, linear[block], warpgroup_operand<D>(here + Tile<D>::rows_at(block)), true);
    warpgroup_commit();
    warpgroup_wait<0>();
    warpgroup_keep(acc);
    __syncthreads();  // nobody reads the stages any more
  }
};

template <typename T, int D, bool STATE> __global__ void __launch_bounds__(kThreads, Shape<D>::MIN_BLOCKS) groups_kernel(const __grid_constant__ Arguments args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using S = Shape<D>;
  using E = Element<T>;
  using Copy = KeyCopy<T, D, D, kThreads>;
  constexpr int BLOCKS = S::BLOCKS, KEY_BLOCKS = kKeys / 16;
  extern __shared__ __align__(1024) unsigned char shared[];
  const linattn_problem &p = args.problem;
  const int thread = threadIdx.x, lane_id = thread & 31, warp = warp_number(), group = lane_id >> 2, place = lane_id & 3;
  const uint32_t row_tile = shared_address(shared), key_tiles = row_tile + S::ROW_TILE;
  const float *const scales = reinterpret_cast<const float *>(shared + S::ROW_TILE + kStages * Copy::STAGE);

  const Place own(args);
  const Copy copy(args, own, key_tiles);
  copy_tile<D, kRows, kThreads>(row_tile, head_of<const T>(p.query, own.batch, own.head) + own.begin * p.query.token_stride, p.query.token_stride, own.rows, thread);
  const int64_t chunk = STATE ? own.begin / State<D>::CHUNK : 0;
  const int first_tile = STATE ? static_cast<int>(chunk * State<D>::CHUNK / kKeys) : 0;
  if (chunk == 0) copy.start(0, thread);
  copy_commit();
  copy_wait<0>();
  warpgroup_publish();
  __syncthreads();

  const float temperature = p.coefficients[3 * p.query_heads + own.head], b = p.coefficients[p.query_heads + own.head], c = p.coefficients[2 * p.query_heads + own.head];
  const float shrink = weight_scale<T>(p.coefficients[own.head], b, c, temperature), a = p.coefficients[own.head] * shrink;
  const Blocks<D> q_blocks(row_tile, lane_down<D>(lane_id)), q_across(row_tile, lane_across<D>(lane_id));
  const uint32_t stripe = Tile<D>::rows_at(warp);
  uint32_t q[BLOCKS][4];
  float beta[2], gamma[2], mass[2] = {0.f, 0.f}, acc[2 * BLOCKS][4];
#pragma unroll
  for (int block = 0; block < BLOCKS; ++block) ldmatrix(q[block], q_blocks.at(0, block) + stripe);
  float scale[2] = {1.f, 1.f};
  if (p.normalize_qk) {
    row_products<T>(scale[0], scale[1], q, q_across, stripe, lane_id);
    scale[0] = inverse_norm(scale[0]), scale[1] = inverse_norm(scale[1]);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float factor = temperature * scale[half];
    beta[half] = b * factor * shrink, gamma[half] = c * factor * factor * shrink;
  }
#pragma unroll
  for (int block = 0; block < 2 * BLOCKS; ++block)
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[block][i] = 0.f;
  if constexpr (STATE)
    if (chunk > 0) {
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block)
#pragma unroll
        for (int i = 0; i < 4; ++i) q[block][i] = E::pack(E::low(q[block][i]) * scale[i % 2], E::high(q[block][i]) * scale[i % 2]);
      const int64_t record = (static_cast<int64_t>(own.batch) * p.key_heads + own.key_head) * args.chunks + chunk;
      StateReader<T, D> state(args.states + record * State<D>::BYTES, key_tiles, thread);
      state.add(acc, mass, q, shared, 16 * warp + group, scale, a, b * temperature * shrink, c * temperature * temperature * shrink, static_cast<float>(chunk * State<D>::CHUNK),
                place);
      copy.start(first_tile, thread);
      copy_commit();
      copy_wait<0>();
      warpgroup_publish();
      __syncthreads();
    }

  const int64_t group_begin = own.begin + 64 * (warp / 4), seen = p.causal ? min(p.length, group_begin + 64) : p.length;
  const int64_t row = own.begin + 16 * warp + group;
  for (int tile = first_tile; tile < own.tiles; ++tile) {
    if (tile > first_tile) {
      copy_wait<0>();
      warpgroup_publish();
      __syncthreads();  // the tile is here, and nobody reads the one that the next copies overwrite
    }
    if (tile + 1 < own.tiles) {
      copy.start(tile + 1, thread);
      copy_commit();
    }
    const int stage = tile % kStages;
    const uint32_t key_tile = key_tiles + stage * Copy::STAGE;
    const int64_t key = static_cast<int64_t>(tile) * kKeys;
    if (key >= seen) continue;

    float s[2 * KEY_BLOCKS][4];
    warpgroup_keep(s);
    warpgroup_begin();
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block)
      WarpgroupProduct<T, kKeys, false>::run(s, warpgroup_operand<D>(row_tile + Tile<D>::rows_at(4 * (warp / 4)) + Tile<D>::columns_at(2 * block)),
                                             warpgroup_operand<D>(key_tile + Tile<D>::columns_at(2 * block)), block > 0);
    warpgroup_commit();
    warpgroup_wait<0>();
    warpgroup_keep(s);

    const bool whole = key + kKeys <= p.length && (!p.causal || key + kKeys - 1 <= group_begin);
    uint32_t weights[KEY_BLOCKS][4];
#pragma unroll
    for (int n = 0; n < 2 * KEY_BLOCKS; ++n) {
      const int column = 8 * n + 2 * place;
      const float2 factor = *reinterpret_cast<const float2 *>(scales + stage * kKeys + column);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float t = s[n][i] * (i & 1 ? factor.y : factor.x);
        s[n][i] = fmaf(fmaf(gamma[i >> 1], t, beta[i >> 1]), t, a);
      }
      if (!whole) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int64_t number = key + column + (i & 1);
          if (number >= p.length || (p.causal && number > row + (i >> 1) * 8)) s[n][i] = 0.f;
        }
      }
      mass[0] += s[n][0] + s[n][1], mass[1] += s[n][2] + s[n][3];
      weights[n / 2][n % 2 * 2] = E::pack(s[n][0], s[n][1]), weights[n / 2][n % 2 * 2 + 1] = E::pack(s[n][2], s[n][3]);
    }

    warpgroup_keep(acc);
    warpgroup_begin();
#pragma unroll
    for (int block = 0; block < KEY_BLOCKS; ++block)
      WarpgroupProduct<T, D, true>::run(acc, weights[block], warpgroup_operand<D>(key_tile + Copy::TILE + Tile<D>::rows_at(block), Tile<D>::kPanelBytes), true);
    warpgroup_commit();
    warpgroup_wait<0>();
    warpgroup_keep(acc);
  }

  // A warp stages its results over its own queries, which its whole warpgroup has read.
  if (own.tiles > 0) __syncthreads();
  float *const mass_rows = args.mass + (static_cast<int64_t>(own.batch) * p.query_heads + own.head) * p.length + own.begin;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    mass[half] += __shfl_xor_sync(0xffffffffu, mass[half], 1);
    mass[half] += __shfl_xor_sync(0xffffffffu, mass[half], 2);
    const int local = 16 * warp + 8 * half + group;
    if (place == 0 && local < own.rows) mass_rows[local] = mass[half] / shrink;
  }
#pragma unroll
  for (int block = 0; block < BLOCKS; ++block) store_block<T, D>(q_blocks.at(0, block) + stripe, acc[2 * block], acc[2 * block + 1], 1.f / mass[0], 1.f / mass[1], lane_id);
  __syncwarp();
  T *const results = head_of<T>(args.out, own.batch, own.head) + own.begin * args.out.token_stride;
  for (int index = lane_id; index < 16 * (D / 8); index += 32) {
    const int local = 16 * warp + index / (D / 8), piece = index % (D / 8);
    if (local < own.rows) *reinterpret_cast<uint4 *>(results + local * args.out.token_stride + piece * 8) = *reinterpret_cast<const uint4 *>(shared + Tile<D>::at(local, piece));
  }
#endif
}

template <typename T, int D, bool STATE = false> cudaError_t launch(const Arguments &args, cudaStream_t stream) {
  constexpr int kShared = Shape<D>::template SHARED<T>;
  if (const cudaError_t failed = cudaFuncSetAttribute(groups_kernel<T, D, STATE>, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared)) return failed;
  groups_kernel<T, D, STATE><<<args.problem.batch * args.problem.query_heads * args.row_tiles, kThreads, kShared, stream>>>(args);
  return cudaPeekAtLastError();
}

template <typename T> cudaError_t launch_by_dim(const Arguments &args, cudaStream_t stream) {
  switch (args.problem.head_dim) {
    case 32: return launch<T, 32>(args, stream);
    case 64: return launch<T, 64>(args, stream);
    case 128: return launch<T, 128>(args, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

bool hopper_takes(const linattn_problem &problem) {
  const int d = problem.head_dim;
  return linattn::card(cudaDevAttrComputeCapabilityMajor) == 9 && (d == 32 || d == 64 || d == 128);
}

int hopper_shared_bytes(const linattn_problem &problem) {
  switch (problem.head_dim) {
    case 32: return Shape<32>::template SHARED<__nv_bfloat16>;
    case 64: return Shape<64>::template SHARED<__nv_bfloat16>;
    default: return Shape<128>::template SHARED<__nv_bfloat16>;
  }
}

cudaError_t hopper_launch(const Arguments &args, cudaStream_t stream) {
  if (args.chunks > 1) return args.problem.head_dim == 32 ? launch<__nv_bfloat16, 32, true>(args, stream) : launch<__nv_bfloat16, 64, true>(args, stream);
  return args.problem.dtype == LINATTN_BFLOAT16 ? launch_by_dim<__nv_bfloat16>(args, stream) : launch_by_dim<__half>(args, stream);
}

}  // namespace linattn_pairs
