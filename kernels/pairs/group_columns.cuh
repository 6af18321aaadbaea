// The gradients of keys and values by warpgroups, and the columns' sums for that of the decay: a block owns 64 or 128 keys and walks over the queries of all heads that read them.
#pragma once
#include "pairs/group_gradients.cuh"

namespace linattn_pairs {

// A warp's 16 keys.
template <int K, int V, bool GATED> struct GroupColumns {
  using T = __nv_bfloat16;
  using S = GroupShape<K, V, GATED>;
  using E = Element<T>;
  static constexpr int KEY_BLOCKS = K / 16, VALUE_BLOCKS = V / 16;
  static constexpr bool kGated = GATED, KEEPS = S::KEEPS_ROWS;
  static constexpr int BUFFERS = S::COLUMNS_BUFFERS;

  const linattn_problem &p;
  const OtherNumbers &others;
  const int lane, warp, group, place;
  const int begin, group_begin, key;
  const uint32_t tiles, key_stripe, value_stripe;
  const Blocks<K> k_blocks;
  const Blocks<V> v_blocks;
  const float scale[2];
  float key_sums[2 * KEY_BLOCKS][4], value_sums[2 * VALUE_BLOCKS][4], decay_sums[2] = {};
  float s[BUFFERS][kStep / 8][4], d[BUFFERS][kStep / 8][4];
  uint32_t own_k[KEEPS ? KEY_BLOCKS : 1][4], own_v[KEEPS ? VALUE_BLOCKS : 1][4], slopes[BUFFERS][kStep / 16][4], weights[BUFFERS][kStep / 16][4];
  const int column_bytes;
  float4 ahead[2];
  OwnGates<1> gates;

  __device__ __forceinline__ GroupColumns(const Gradients &args, const OtherNumbers &others, int pair, int begin, uint32_t key_tile)
      : p(args.problem), others(others), lane(threadIdx.x & 31), warp(warp_number()), group(lane >> 2), place(lane & 3), begin(begin), group_begin(begin + kGroup * (warp / 4)),
        key(begin + 16 * warp + group), tiles(key_tile + S::OWN), key_stripe(Tile<K>::rows_at(warp)), value_stripe(Tile<V>::rows_at(warp)), k_blocks(key_tile, lane_down<K>(lane)),
        v_blocks(key_tile + S::OWN_KEY, lane_down<V>(lane)),
        scale{args.key_scale[static_cast<int64_t>(pair) * args.padded + key], args.key_scale[static_cast<int64_t>(pair) * args.padded + key + 8]},
        column_bytes(remade(2 * place * static_cast<int>(sizeof(float4)))) {
    clear(s), clear(d);
    if constexpr (KEEPS) {
#pragma unroll
      for (int block = 0; block < KEY_BLOCKS; ++block) ldmatrix(own_k[block], k_blocks.at(0, block) + key_stripe);
#pragma unroll
      for (int block = 0; block < VALUE_BLOCKS; ++block) ldmatrix(own_v[block], v_blocks.at(0, block) + value_stripe);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int n = 0; n < 2 * KEY_BLOCKS; ++n) key_sums[n][i] = 0.f;
#pragma unroll
      for (int n = 0; n < 2 * VALUE_BLOCKS; ++n) value_sums[n][i] = 0.f;
    }
  }

  __device__ __forceinline__ void keep_sums() { warpgroup_keep(key_sums), warpgroup_keep(value_sums), warpgroup_keep(s[BUFFERS - 1]), warpgroup_keep(d[BUFFERS - 1]); }

  // Whether none of the tile's queries sees one of the warpgroup's keys.
  __device__ __forceinline__ bool passes(int first) const { return p.causal && first + kKeys <= group_begin; }

  // s = k q^T and d = v w^T of a step's queries.
  template <int STEP> __device__ __forceinline__ void multiply(int stage) {
    const uint32_t tile = tiles + stage * S::STAGE, own = tiles - S::OWN + Tile<K>::rows_at(4 * (warp / 4)), own_across = tiles - S::OWN_VALUE + Tile<V>::rows_at(4 * (warp / 4));
    warpgroup_keep(s[STEP % BUFFERS]), warpgroup_keep(d[STEP % BUFFERS]);
    warpgroup_begin();
    multiply_step<K, KEEPS>(s[STEP % BUFFERS], own_k, own, tile, STEP);
    multiply_step<V, KEEPS>(d[STEP % BUFFERS], own_v, own_across, tile + S::TILE, STEP);
    warpgroup_commit();
  }

  // The numbers of a step's first queries, before its products are waited for.
  __device__ __forceinline__ const float4 *numbers_of(int stage, int column) const {
    return reinterpret_cast<const float4 *>(reinterpret_cast<const char *>(others.numbers[stage] + column) + column_bytes);
  }
  template <int STEP> __device__ __forceinline__ void look(int stage) {
    if constexpr (S::LOOKS_AHEAD) ahead[0] = numbers_of(stage, kStep * STEP)[0], ahead[1] = numbers_of(stage, kStep * STEP)[1];
  }

  template <Pairs PAIRS, int STEP> __device__ __forceinline__ void weigh_pairs(int first, int stage) {
    constexpr bool NEAR = PAIRS != FAR;
    const int earliest = p.causal ? key - first : -kKeys;  // query of the tile that sees the first key
#pragma unroll
    for (int n = 0; n < kStep / 8; ++n) {
      const int column = kStep * STEP + 8 * n + 2 * place;
      const bool here = S::LOOKS_AHEAD && n == 0;
      const float4 *const numbers = numbers_of(stage, kStep * STEP + 8 * n);
      const float4 of[2] = {here ? ahead[0] : numbers[0], here ? ahead[1] : numbers[1]};
      float x[4], y[4];  // not in their place: nothing but products may define what products add to
      float2 exponent = {};
      int2 run = {};
      if constexpr (PAIRS == GATED_EACH) exponent = *reinterpret_cast<const float2 *>(others.exponent[stage] + column);
      if constexpr (GATED && NEAR) run = *reinterpret_cast<const int2 *>(others.run[stage] + column);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int half = i >> 1;
        const float4 &c = of[i & 1];
        const float unit = s[STEP % BUFFERS][n][i] * scale[half], linear = fmaf(c.z, unit, c.y), change = d[STEP % BUFFERS][n][i] + c.w;
        float weight = fmaf(linear, unit, c.x), slope = fmaf(c.z, unit, linear);
        if constexpr (NEAR) {
          const bool seen = column + (i & 1) >= earliest + 8 * half && (!GATED || (i & 1 ? run.y : run.x) == gates.run[0][half]);
          if constexpr (PAIRS == GATED_EACH) {
            const float gate = exp2_fast((i & 1 ? exponent.y : exponent.x) + gates.exponent[0][half]);
            weight *= gate, slope *= gate;
          }
          weight = seen ? weight : 0.f, slope = seen ? slope : 0.f;
        }
        if constexpr (GATED) decay_sums[half] = fmaf(weight, change, decay_sums[half]);
        x[i] = change * slope, y[i] = weight;
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        slopes[STEP % BUFFERS][n / 2][n % 2 * 2 + half] = E::pack(x[2 * half], x[2 * half + 1]);
        weights[STEP % BUFFERS][n / 2][n % 2 * 2 + half] = E::pack(y[2 * half], y[2 * half + 1]);
      }
    }
  }

  // Products into the queries' weights in dk and dv, once they are there.
  template <int STEP> __device__ __forceinline__ void weigh(const TileNote &at, int stage) {
    warpgroup_keep(s[STEP % BUFFERS]), warpgroup_keep(d[STEP % BUFFERS]);
    const bool mixed = GATED && at.mixed();
    const bool whole = !p.causal || at.first() + kStep * STEP >= group_begin + kGroup - 1;
    if (GATED && at.near()) weigh_pairs<GATED ? GATED_EACH : FAR, STEP>(at.first(), stage);
    else if (mixed || !whole) weigh_pairs<MASKED, STEP>(at.first(), stage);
    else weigh_pairs<FAR, STEP>(at.first(), stage);
  }

  template <int STEP> __device__ __forceinline__ void add(int stage) {
    const uint32_t tile = tiles + stage * S::STAGE;
    warpgroup_keep(key_sums), warpgroup_keep(value_sums);
    warpgroup_begin();
    add_step<V>(value_sums, weights[STEP % BUFFERS], tile + S::TILE, STEP);
    add_step<K>(key_sums, slopes[STEP % BUFFERS], tile, STEP);
    warpgroup_commit();
  }

  // What the sums hold, of queries behind the block's keys, takes these keys' factors.
  __device__ __forceinline__ void take_own_factors() {
    warpgroup_wait<0>();
    warpgroup_keep(key_sums), warpgroup_keep(value_sums);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float own = gates.is_padding(0, half) ? 0.f : exp2_fast(fminf(gates.exponent[0][half], 0.f));  // not held in registers until here
      decay_sums[half] *= own;
#pragma unroll
      for (int n = 0; n < 2 * KEY_BLOCKS; ++n) key_sums[n][2 * half] *= own, key_sums[n][2 * half + 1] *= own;
#pragma unroll
      for (int n = 0; n < 2 * VALUE_BLOCKS; ++n) value_sums[n][2 * half] *= own, value_sums[n][2 * half + 1] *= own;
    }
  }

  __device__ __forceinline__ void store_decay_sums(float *column_sums, bool more) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = decay_sums[half];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      if (place == 0 && key + 8 * half < p.length) column_sums[key + 8 * half] = more ? column_sums[key + 8 * half] + sum : sum;
    }
  }

  __device__ __forceinline__ void store(const Gradients &args, unsigned char *shared, int batch, int key_head, int rows, bool has_state) {
    if (p.normalize_qk) project<T, KEY_BLOCKS>(key_sums, k_blocks, key_stripe, scale);
    T *const keys = head_of<T>(args.grad_key, batch, key_head) + static_cast<int64_t>(begin) * args.grad_key.token_stride;
    T *const values = head_of<T>(args.grad_value, batch, key_head) + static_cast<int64_t>(begin) * args.grad_value.token_stride;
#pragma unroll
    for (int n = 0; n < 2 * KEY_BLOCKS; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) key_sums[n][i] *= scale[i >> 1];
    if (has_state) {
      add_stored<T, K>(key_sums, keys, args.grad_key.token_stride, 16 * warp + group, rows, place, pieces_of<K, V>(p));
      add_stored<T, V>(value_sums, values, args.grad_value.token_stride, 16 * warp + group, rows, place);
    }
    store_rows<T, K>(args.grad_key, keys, shared, k_blocks, key_stripe, key_sums, 1.f, 1.f, rows, warp, lane, pieces_of<K, V>(p));
    store_rows<T, V>(args.grad_value, values, shared + S::OWN_KEY, v_blocks, value_stripe, value_sums, 1.f, 1.f, rows, warp, lane);
  }
};

// The numbers of a tile's queries on their way, two queries a lane.
struct QueriesOnWay {
  float inverse[2], error[2], unit[2];
  __device__ __forceinline__ void load(const Gradients &args, int64_t row_head, int64_t token) {
    const float *const numbers = args.query_numbers + row_head * kNumbers * args.padded + token;
#pragma unroll
    for (int half = 0; half < 2; ++half) inverse[half] = numbers[32 * half], error[half] = numbers[args.padded + 32 * half], unit[half] = numbers[2 * args.padded + 32 * half];
  }
  // factor: of all that the query adds.
  __device__ __forceinline__ float4 of(const Coefficients &f, int half, float factor) const {
    const float share = share_of(inverse[half], error[half]), scaled = share * factor;
    return make_float4(f.a * scaled, f.beta * unit[half] * scaled, f.gamma * unit[half] * unit[half] * scaled, share == 0.f ? 0.f : error[half] / share);
  }
};

// A block's work, the block being number `block` of those of its kind.
template <int K, int V, bool GATED> __device__ __forceinline__ void group_columns(const Gradients &args, unsigned char *shared, int block) {
  using T = __nv_bfloat16;
  using S = GroupShape<K, V, GATED>;
  const linattn_problem &p = args.problem;
  const int thread = threadIdx.x;
  const uint32_t key_tile = shared_address(shared), stages = key_tile + S::OWN;
  OtherNumbers &others = *reinterpret_cast<OtherNumbers *>(shared + S::NUMBERS_AT);

  const int pair = block / args.row_tiles, tile_number = block % args.row_tiles;  // long columns first
  const int batch = pair / p.key_heads, key_head = pair % p.key_heads, heads = p.query_heads / p.key_heads, first_head = key_head * heads, pieces = pieces_of<K, V>(p);
  const int64_t begin = static_cast<int64_t>(tile_number) * S::TOKENS;
  const int rows = static_cast<int>(min(p.length - begin, static_cast<int64_t>(S::TOKENS)));
  const int64_t seen = min(p.length, (begin / args.chunk + 1) * args.chunk);  // queries up to there, of the tokens' own chunk
  const bool has_state = seen < p.length;                                     // of the queries behind
  const GateReader key_gates(args.gates, p, false, batch, first_head, begin + rows - 1), query_gates(args.gates, p, true, batch, first_head, begin + rows - 1);

  int tile_begin = p.causal ? static_cast<int>(begin / kKeys) : 0, tile_end = static_cast<int>((seen + kKeys - 1) / kKeys);
  const int behind = p.causal ? min(tile_end, static_cast<int>((begin + S::TOKENS) / kKeys)) : tile_begin;
  int32_t low = 0, high = 0;
  auto reach = queries_in_reach(p, query_gates, first_head, heads, begin + rows - 1, behind, tile_end);
  if constexpr (GATED) {
    find_runs<S::THREADS>(others, key_gates, query_gates, begin, rows, tile_begin, tile_end, low, high, thread);
    tile_end = min(tile_end, reach.find());
  }
  const Walk walk{max(behind, tile_begin), tile_end, tile_begin, behind, heads};

  if (thread >= S::OWNERS) {
    give_registers<S::BRINGER_REGISTERS>();
    const int lane = thread & 31, stage = warp_number() - S::OWNERS / 32;
    const double edge = GATED ? query_gates.edge() : 0.0;
    const bool fast = GATED && query_gates.sum_of(begin) - edge > kFast * S::TOKENS;
    const uint32_t target = stages + stage * S::STAGE;
    TileGates gates;
    QueriesOnWay on_way;
    bring_tiles<S>(
        walk, stage,
        [&](const Cursor &at) {
          gates.load(query_gates, at.first(), lane);
          on_way.load(args, static_cast<int64_t>(batch) * p.query_heads + first_head + at.head, at.first() + lane);
        },
        [&](const Cursor &at) {
          const int64_t first = at.first(), head = first_head + at.head;
          copy_others<K>(target, head_of<const T>(p.query, batch, head) + first * p.query.token_stride, p.query.token_stride, gates.real, lane, pieces);
          copy_others<V>(target + S::TILE, head_of<const T>(args.grad_out, batch, head) + first * args.grad_out.token_stride, args.grad_out.token_stride, gates.real, lane, V / 8);
        },
        [&](const Cursor &at) {
          const Coefficients f(p, first_head + at.head);
#pragma unroll
          for (int half = 0; half < 2; ++half)
            others.numbers[stage][32 * half + lane] =
                on_way.of(f, half, GATED && !(at.near && fast) ? exp2_fast(fminf(gates.exponent(half, true, edge), at.near ? kFast * S::TOKENS : 0.f)) : 1.f);
          if constexpr (GATED) gates.store(others, true, edge, stage, lane);
          const bool mixed = GATED && gates.is_mixed(low, high);
          if (lane == 0) others.told[stage] = TileNote::of(at, GATED ? at.near && fast : at.near, mixed);
        });
    return;
  }
  take_registers<S::OWNER_REGISTERS>();
  const int64_t group_begin = begin + thread / kGroupThreads * kGroup;
  copy_own<S, K, V>(key_tile, head_of<const T>(p.key, batch, key_head) + group_begin * p.key.token_stride, p.key.token_stride,
                    head_of<const T>(p.value, batch, key_head) + group_begin * p.value.token_stride, p.value.token_stride, real_tokens(key_gates, group_begin, thread & 31), thread,
                    pieces);
  GroupColumns<K, V, GATED> work(args, others, pair, begin, key_tile);
  if constexpr (GATED) work.gates.load(key_gates, work.key);
  walk_tiles(work, walk);
  if (GATED && args.column_sums) work.store_decay_sums(args.column_sums + (static_cast<int64_t>(batch) * p.state_heads + key_head) * p.length, has_state);
  if (!S::KEEPS_ROWS) barrier_sync<kGroupThreads>(kAmongOwners + thread / kGroupThreads);  // results are staged over the warpgroup's own tokens
  work.store(args, shared, batch, key_head, rows, has_state);
}

}  // namespace linattn_pairs
