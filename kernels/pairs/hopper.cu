// architectures: sm_90a
// Pairs of tokens by wgmma: two warpgroups a block, 64 queries each. Every pair; or those of a chunk, what lies before it being in a state,
// against which a query's features q_a q_b, made in registers, are multiplied.
#include "pairs/hopper.cuh"
#include "pairs/key_tiles.cuh"

namespace linattn_pairs {
namespace {

// What the state before the chunk adds to a warp's 16 rows: a sum v + beta q^ . (sum k v) + gamma sum q^_a q^_b (sum k_a k_b v), and the masses.
// q: their rounded unit vectors; scales: what made them such. The state passes through the tiles of keys, two stages of rows.
template <typename T, int D> struct StateReader {
  using S = State<D>;
  using E = Element<T>;
  static constexpr int BLOCKS = S::BLOCKS, ITEMS = 8;  // of a stage
  static constexpr int STAGE = 16 * ITEMS * D * 2;
  static_assert(kStages * STAGE <= kKeyStages * OutputShape<D, D, NO_GATES>::STAGE && 2 * D <= 16 * ITEMS, "the stages fit where the keys will be");
  const T *rows;         // rounded
  const float *columns;  // sum k, sum v
  uint32_t stages;
  int thread, next_row = 0, next_stage = 0;

  __device__ __forceinline__ StateReader(const unsigned char *state, uint32_t stages, int thread)
      : rows(reinterpret_cast<const T *>(state)), columns(reinterpret_cast<const float *>(state + S::ROUNDED_ROWS * D * 2)), stages(stages), thread(thread) {}

  __device__ __forceinline__ void fetch(int count) {
    copy_tile<D, 16 * ITEMS, kGroupThreads>(stages + next_stage * STAGE, rows + static_cast<int64_t>(next_row) * D, D, count, thread);
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

// Into the sums, in the unit that the rows' weights are in.
template <typename T, int D, typename Rows> __device__ __forceinline__ void add_state(Rows &rows, StateReader<T, D> state, const float (&scale)[2], float count, int head) {
  using E = Element<T>;
  const float *const of_head = rows.p.coefficients + head;
  const int heads = rows.p.query_heads;
  const float temperature = of_head[3 * heads];
  rows.load_queries();
#pragma unroll
  for (int block = 0; block < D / 16; ++block)
#pragma unroll
    for (int i = 0; i < 4; ++i) rows.q[block][i] = E::pack(E::low(rows.q[block][i]) * scale[i % 2], E::high(rows.q[block][i]) * scale[i % 2]);
  state.add(rows.acc, rows.mass, rows.q, rows.shared, 16 * rows.warp + rows.group, scale, of_head[0] * rows.shrink, of_head[heads] * temperature * rows.shrink,
            of_head[2 * heads] * temperature * temperature * rows.shrink, count, rows.place);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float unit = 1.f / rows.row_of(half).size;
    rows.mass[half] *= unit;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) rows.acc[n][2 * half] *= unit, rows.acc[n][2 * half + 1] *= unit;
  }
  rows.load_queries();
  rows.bring_near_one(scale);
}

template <typename T, int K, int V, Gates GATES, bool STATE>
__global__ void __launch_bounds__(kGroupThreads, OutputShape<K, V, GATES>::MIN_BLOCKS) groups_kernel(const __grid_constant__ Arguments args, const __grid_constant__ KeyMaps maps) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using S = OutputShape<K, V, GATES>;
  extern __shared__ __align__(1024) unsigned char shared[];
  const linattn_problem &p = args.problem;
  const int thread = threadIdx.x;
  const uint32_t row_tile = shared_address(shared);

  const Place own(args);
  const int64_t chunk = STATE ? own.begin / State<K>::CHUNK : 0;
  const int of_chunk = static_cast<int>((STATE ? chunk * State<K>::CHUNK : own.begin < args.chunk ? 0 : own.begin / args.chunk * args.chunk) / kKeys);
  const KeyStream<K, V, GATES> keys(args, maps, own, shared);
  if (thread == 0) keys.make_barriers(own.rows > kRows / 2 ? 8 : 4), keys.ask_for_queries(p, own);
  const RateReader queries(args.gates, p, true, own.batch, args.by_state.of(own.head), own.begin + kRows / 2 * (thread / (kGroupThreads / 2)) - 1);
  OutputWalk<T, K, V, GATES> walk{keys, p, of_chunk, own.tiles, of_chunk};
  const bool by_state = STATE && chunk > 0;
  OutputRows<T, K, V, GATES> rows(p, own, shared);
  const Numbers numbers(p, own.head);
  if constexpr (GATES != NO_GATES) {
    wait_for_kernel_before();
    OwnTokens<GATES> tokens(queries, own.begin);
    walk.look(own, tokens, numbers, thread);
    if (thread == 0) walk.start();
    rows.set_gates(tokens);
    __syncthreads();
    keys.wait_for_queries();
    if constexpr (GATES == RUNS) rows.zero_padding(tokens);
  } else {
    if (thread == 0 && !by_state) walk.start();
    __syncthreads();
    keys.wait_for_queries();
  }
  float scale[2];
  rows.load_queries();
  rows.set_weights(numbers, scale);
  if constexpr (STATE)
    if (by_state) {
      const int64_t record = (static_cast<int64_t>(own.batch) * p.key_heads + own.key_head) * args.chunks + chunk;
      add_state<T, K>(rows, StateReader<T, K>(args.states + record * State<K>::BYTES, row_tile + S::ROW_TILE, thread), scale, static_cast<float>(chunk * State<K>::CHUNK),
                      own.head);
      if (thread == 0) walk.start();
    }

  const int mine = rows.group_begin >= p.length ? walk.first : p.causal ? min(walk.end, rows.own_tile + 1) : walk.end;
  if constexpr (Element<T>::kNarrow) {
    walk.template go<false>(rows, mine);
  } else {
    if (rows.weight.squares) walk.template go<true>(rows, mine);
    else walk.template go<false>(rows, mine);
  }
  if constexpr (K < V) __syncthreads();  // rows of results are wider than queries, and lie over those of others
  rows.store(args, own);
#endif
}

template <typename T, int K, int V, Gates GATES, bool STATE = false> cudaError_t launch(const Arguments &args, cudaStream_t stream) {
  constexpr int kShared = OutputShape<K, V, GATES>::SHARED;
  const linattn_problem &p = args.problem;
  KeyMaps maps;
  if (const cudaError_t failed = map_tensor<K>(maps.keys, p.key, p.batch, p.key_heads, p.length, p.head_dim)) return failed;
  if (const cudaError_t failed = map_tensor<V>(maps.values, p.value, p.batch, p.key_heads, p.length, p.value_dim)) return failed;
  if (const cudaError_t failed = map_tensor<K>(maps.queries, p.query, p.batch, p.query_heads, p.length, p.head_dim)) return failed;
  const auto output = groups_kernel<T, K, V, GATES, STATE>;
  const int blocks = p.batch * p.query_heads * args.row_tiles;
  if (const cudaError_t failed = cudaFuncSetAttribute(output, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared)) return failed;
  if constexpr (GATES == NO_GATES) {  // it asks for queries at once, and the kernel before may be the one that makes them
    output<<<blocks, kGroupThreads, kShared, stream>>>(args, maps);
    return cudaPeekAtLastError();
  } else {
    if (const cudaError_t failed = launch_key_tiles<T, K>(args, stream)) return failed;
    return launch_early(output, blocks, kGroupThreads, kShared, stream, args, maps);
  }
}

// `call` with the widths of the tiles and what multiplies weights, as constants.
template <typename Call> auto with_tiles(const linattn_problem &problem, Call call) {
  using std::integral_constant;
  return with_gated_tiles(tiles_of(problem), [&](auto key, auto value) {
    if (problem.key_segments) return call(key, value, integral_constant<Gates, RUNS>());
    if (problem.log_decay) return call(key, value, integral_constant<Gates, DECAY>());
    return call(key, value, integral_constant<Gates, NO_GATES>());
  });
}

}  // namespace

// Bulk copies take no rows that all lie in the same place.
bool hopper_takes(const linattn_problem &problem) {
  const TileDims tiles = tiles_of(problem);
  const bool rows = problem.query.token_stride && problem.key.token_stride && problem.value.token_stride;
  return linattn::card(cudaDevAttrComputeCapabilityMajor) == 9 && rows && (tiles.key == 16 || tiles.key == 32 || tiles.key == 64 || tiles.key == 128);
}

int hopper_shared_bytes(const linattn_problem &problem) {
  return with_tiles(problem, [](auto key, auto value, auto gates) -> int { return OutputShape<key(), value(), gates()>::SHARED; });
}

int64_t key_gates_bytes(const linattn_problem &problem) {
  const int64_t bytes = static_cast<int64_t>(problem.batch) * problem.state_heads * ((problem.length + kKeys - 1) / kKeys) * sizeof(KeyGates);
  return is_gated(problem) && hopper_takes(problem) ? (bytes + 255) / 256 * 256 : 0;
}

cudaError_t hopper_launch(const Arguments &args, cudaStream_t stream) {
  const int dim = args.problem.head_dim;
  if (args.chunks > 1) return dim == 32 ? launch<__nv_bfloat16, 32, 32, NO_GATES, true>(args, stream) : launch<__nv_bfloat16, 64, 64, NO_GATES, true>(args, stream);
  if (args.problem.dtype == LINATTN_BFLOAT16)
    return with_tiles(args.problem, [&](auto key, auto value, auto gates) { return launch<__nv_bfloat16, key(), value(), gates()>(args, stream); });
  switch (dim) {
    case 32: return launch<__half, 32, 32, NO_GATES>(args, stream);
    case 64: return launch<__half, 64, 64, NO_GATES>(args, stream);
    case 128: return launch<__half, 128, 128, NO_GATES>(args, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace linattn_pairs
