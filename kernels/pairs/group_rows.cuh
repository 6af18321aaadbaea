// The gradient of the queries by warpgroups, of f's coefficients, and the rows' sums for that of the decay: a block owns 64 or 128 queries and walks over the keys.
#pragma once
#include "pairs/group_gradients.cuh"

namespace linattn_pairs {

// A warp's 16 queries.
template <int K, int V, bool GATED> struct GroupRows {
  using T = __nv_bfloat16;
  using S = GroupShape<K, V, GATED>;
  using E = Element<T>;
  static constexpr int KEY_BLOCKS = K / 16, VALUE_BLOCKS = V / 16;
  static constexpr bool kGated = GATED, KEEPS = S::KEEPS_ROWS;
  static constexpr int BUFFERS = S::ROWS_BUFFERS;

  const linattn_problem &p;
  const OtherNumbers &others;
  const int lane, warp, group, place;
  const int begin, group_begin, row;
  const uint32_t tiles, query_stripe;
  const Blocks<K> q_blocks;
  float share[2], error[2], scale[2], beta[2], twice_gamma[2], sums[3][2] = {}, acc[2 * KEY_BLOCKS][4];
  float s[BUFFERS][kStep / 8][4], d[BUFFERS][kStep / 8][4];
  uint32_t own_q[KEEPS ? KEY_BLOCKS : 1][4], own_w[KEEPS ? VALUE_BLOCKS : 1][4], weights[BUFFERS][kStep / 16][4];
  const int column_bytes;
  float4 ahead[2];
  OwnGates<1> gates;

  __device__ __forceinline__ GroupRows(const Gradients &args, const OtherNumbers &others, const Coefficients &f, int pair, int begin, uint32_t query_tile)
      : p(args.problem), others(others), lane(threadIdx.x & 31), warp(warp_number()), group(lane >> 2), place(lane & 3), begin(begin), group_begin(begin + kGroup * (warp / 4)),
        row(begin + 16 * warp + group), tiles(query_tile + S::OWN), query_stripe(Tile<K>::rows_at(warp)), q_blocks(query_tile, lane_down<K>(lane)),
        column_bytes(remade(2 * place * static_cast<int>(sizeof(float4)))) {
    const float *const numbers = args.query_numbers + static_cast<int64_t>(pair) * kNumbers * args.padded + row;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      share[half] = share_of(numbers[8 * half], numbers[args.padded + 8 * half]), error[half] = share[half] == 0.f ? 0.f : numbers[args.padded + 8 * half] / share[half];
      scale[half] = numbers[2 * args.padded + 8 * half];
      beta[half] = f.beta * scale[half] * share[half], twice_gamma[half] = 2.f * f.gamma * scale[half] * scale[half] * share[half];
    }
    clear(s), clear(d);
    const Blocks<V> w_blocks(query_tile + S::OWN_KEY, lane_down<V>(lane));
    if constexpr (KEEPS) {
#pragma unroll
      for (int block = 0; block < KEY_BLOCKS; ++block) ldmatrix(own_q[block], q_blocks.at(0, block) + query_stripe);
#pragma unroll
      for (int block = 0; block < VALUE_BLOCKS; ++block) ldmatrix(own_w[block], w_blocks.at(0, block) + Tile<V>::rows_at(warp));
    }
#pragma unroll
    for (int n = 0; n < 2 * KEY_BLOCKS; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[n][i] = 0.f;
  }

  __device__ __forceinline__ void keep_sums() { warpgroup_keep(acc), warpgroup_keep(s[BUFFERS - 1]), warpgroup_keep(d[BUFFERS - 1]); }

  // Whether the warpgroup's queries see none of the tile's keys.
  __device__ __forceinline__ bool passes(int first) const { return p.causal && first >= group_begin + kGroup; }

  // s = q k^T and d = w v^T of a step's keys.
  template <int STEP> __device__ __forceinline__ void multiply(int stage) {
    const uint32_t tile = tiles + stage * S::STAGE, own = tiles - S::OWN + Tile<K>::rows_at(4 * (warp / 4)), own_across = tiles - S::OWN_VALUE + Tile<V>::rows_at(4 * (warp / 4));
    warpgroup_keep(s[STEP % BUFFERS]), warpgroup_keep(d[STEP % BUFFERS]);
    warpgroup_begin();
    multiply_step<K, KEEPS>(s[STEP % BUFFERS], own_q, own, tile, STEP);
    multiply_step<V, KEEPS>(d[STEP % BUFFERS], own_w, own_across, tile + S::TILE, STEP);
    warpgroup_commit();
  }

  // The numbers of a step's first keys, before its products are waited for.
  __device__ __forceinline__ const float4 *numbers_of(int stage, int column) const {
    return reinterpret_cast<const float4 *>(reinterpret_cast<const char *>(others.numbers[stage] + column) + column_bytes);
  }
  template <int STEP> __device__ __forceinline__ void look(int stage) {
    if constexpr (S::LOOKS_AHEAD) ahead[0] = numbers_of(stage, kStep * STEP)[0], ahead[1] = numbers_of(stage, kStep * STEP)[1];
  }

  template <Pairs PAIRS, int STEP> __device__ __forceinline__ void weigh_pairs(int first, int stage) {
    constexpr bool NEAR = PAIRS != FAR;
    const int end = static_cast<int>(p.length) - 1 - first;
    const int last = p.causal ? min(end, row - first) : end, second_last = p.causal ? min(end, row + 8 - first) : end;  // keys of the tile that the lane's rows see
#pragma unroll
    for (int n = 0; n < kStep / 8; ++n) {
      const int column = kStep * STEP + 8 * n + 2 * place;
      const bool here = S::LOOKS_AHEAD && n == 0;
      const float4 *const numbers = numbers_of(stage, kStep * STEP + 8 * n);
      const float4 of[2] = {here ? ahead[0] : numbers[0], here ? ahead[1] : numbers[1]};
      float x[4];  // not in their place: nothing but products may define what products add to
      float2 exponent = {};
      int2 run = {};
      if constexpr (PAIRS == GATED_EACH) exponent = *reinterpret_cast<const float2 *>(others.exponent[stage] + column);
      if constexpr (GATED && NEAR) run = *reinterpret_cast<const int2 *>(others.run[stage] + column);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int half = i >> 1;
        const float unit = of[i & 1].x, t = s[STEP % BUFFERS][n][i] * unit, change = d[STEP % BUFFERS][n][i] + error[half];
        float counted = change, scaled = change * (GATED ? of[i & 1].y : unit);
        if constexpr (NEAR) {
          const bool seen = column + (i & 1) <= (half ? second_last : last);
          if constexpr (PAIRS == GATED_EACH) counted = gates.times(change, 0, half, i & 1 ? exponent.y : exponent.x, i & 1 ? run.y : run.x, seen, true);
          else if constexpr (GATED) counted = seen && (i & 1 ? run.y : run.x) == gates.run[0][half] ? change * of[i & 1].z : 0.f;
          else counted = seen ? change : 0.f;
          scaled = counted * unit;
        }
        if constexpr (GATED && !NEAR) sums[0][half] = fmaf(change, of[i & 1].z, sums[0][half]);
        else sums[0][half] += counted;
        const float product = scaled * s[STEP % BUFFERS][n][i];
        sums[1][half] += product, sums[2][half] = fmaf(product, t, sums[2][half]);
        x[i] = scaled * fmaf(twice_gamma[half], t, beta[half]);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) weights[STEP % BUFFERS][n / 2][n % 2 * 2 + half] = E::pack(x[2 * half], x[2 * half + 1]);
    }
  }

  // Products into the keys' weights in dq, once they are there.
  template <int STEP> __device__ __forceinline__ void weigh(const TileNote &at, int stage) {
    warpgroup_keep(s[STEP % BUFFERS]), warpgroup_keep(d[STEP % BUFFERS]);
    const int key = at.first() + kStep * STEP;
    const bool mixed = GATED && at.mixed();
    const bool whole = key + kStep <= p.length && (!p.causal || key + kStep - 1 <= group_begin);
    if (GATED && at.near()) weigh_pairs<GATED ? GATED_EACH : FAR, STEP>(at.first(), stage);
    else if (mixed || !whole) weigh_pairs<MASKED, STEP>(at.first(), stage);
    else weigh_pairs<FAR, STEP>(at.first(), stage);
  }

  template <int STEP> __device__ __forceinline__ void add(int stage) {
    warpgroup_keep(acc);
    warpgroup_begin();
    add_step<K>(acc, weights[STEP % BUFFERS], tiles + stage * S::STAGE, STEP);
    warpgroup_commit();
  }

  // What the sums hold, of keys before the block's queries, takes these queries' factors.
  __device__ __forceinline__ void take_own_factors() {
    warpgroup_wait<0>();
    warpgroup_keep(acc);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float own = gates.is_padding(0, half) ? 0.f : exp2_fast(fminf(gates.exponent[0][half], 0.f));  // not held in registers until here
#pragma unroll
      for (int i = 0; i < 3; ++i) sums[i][half] *= own;
#pragma unroll
      for (int n = 0; n < 2 * KEY_BLOCKS; ++n) acc[n][2 * half] *= own, acc[n][2 * half + 1] *= own;
    }
  }

  // sum_n A dA of a row is a sum of what the coefficients' gradients are made of.
  __device__ __forceinline__ void store_row_sums(const Coefficients &f, float *row_sums, bool more) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = f.a * share[half] * sums[0][half] + beta[half] * sums[1][half] + 0.5f * twice_gamma[half] * sums[2][half];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      if (place == 0 && row + 8 * half < p.length) row_sums[row + 8 * half] = more ? row_sums[row + 8 * half] + sum : sum;
    }
  }

  __device__ __forceinline__ void store(const Gradients &args, unsigned char *shared, int batch, int head, int rows, float *totals) {
    if (p.normalize_qk) project<T, KEY_BLOCKS>(acc, q_blocks, query_stripe, scale);
    T *const results = head_of<T>(args.grad_query, batch, head) + static_cast<int64_t>(begin) * args.grad_query.token_stride;
    if (begin >= args.chunk) add_stored<T, K>(acc, results, args.grad_query.token_stride, 16 * warp + group, rows, place, pieces_of<K, V>(p));
    store_rows<T, K>(args.grad_query, results, shared, q_blocks, query_stripe, acc, 1.f, 1.f, rows, warp, lane, pieces_of<K, V>(p));
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      float sum = 0.f;
#pragma unroll
      for (int half = 0; half < 2; ++half) sum += sums[i][half] * share[half] * (i == 0 ? 1.f : i == 1 ? scale[half] : scale[half] * scale[half]);
#pragma unroll
      for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
      if (lane == 0) totals[3 * warp + i] = sum;
    }
  }
};

// A block's work, the block being number `block` of those of its kind.
template <int K, int V, bool GATED> __device__ __forceinline__ void group_rows(const Gradients &args, unsigned char *shared, int block) {
  using T = __nv_bfloat16;
  using S = GroupShape<K, V, GATED>;
  const linattn_problem &p = args.problem;
  const int thread = threadIdx.x;
  const uint32_t query_tile = shared_address(shared), stages = query_tile + S::OWN;
  OtherNumbers &others = *reinterpret_cast<OtherNumbers *>(shared + S::NUMBERS_AT);
  float *const totals = reinterpret_cast<float *>(shared + S::TOTALS_AT);

  const int pair = block / args.row_tiles, tile_number = args.row_tiles - 1 - block % args.row_tiles;  // long rows first
  const int batch = pair / p.query_heads, head = pair % p.query_heads, key_head = head / (p.query_heads / p.key_heads), pieces = pieces_of<K, V>(p);
  const int64_t begin = static_cast<int64_t>(tile_number) * S::TOKENS;
  const int rows = static_cast<int>(min(p.length - begin, static_cast<int64_t>(S::TOKENS)));
  const GateReader query_gates(args.gates, p, true, batch, head, begin - 1), key_gates(args.gates, p, false, batch, head, begin - 1);

  int tile_begin = static_cast<int>(begin / args.chunk * args.chunk / kKeys), tile_end = static_cast<int>(((p.causal ? begin + rows : p.length) + kKeys - 1) / kKeys);
  int32_t low = 0, high = 0;
  auto reach = keys_in_reach(p, key_gates, head, begin, tile_begin);
  if constexpr (GATED) find_runs<S::THREADS>(others, query_gates, key_gates, begin, rows, tile_begin, tile_end, low, high, thread);
  if constexpr (GATED) tile_begin = max(tile_begin, reach.find());
  const int before = p.causal ? max(tile_begin, static_cast<int>(begin / kKeys)) : tile_end;
  const Walk walk{tile_begin, min(before, tile_end), before, tile_end, 1};

  if (thread >= S::OWNERS) {
    give_registers<S::BRINGER_REGISTERS>();
    const int lane = thread & 31, stage = warp_number() - S::OWNERS / 32;
    const T *const keys = head_of<const T>(p.key, batch, key_head), *const values = head_of<const T>(p.value, batch, key_head);
    const float *const units = args.key_scale + (static_cast<int64_t>(batch) * p.key_heads + key_head) * args.padded;
    const double edge = GATED ? key_gates.edge() : 0.0;
    const bool fast = GATED && edge - key_gates.sum_of(begin + rows - 1) > kFast * S::TOKENS;
    const uint32_t target = stages + stage * S::STAGE;
    TileGates gates;
    float unit[2];
    bring_tiles<S>(
        walk, stage,
        [&](const Cursor &at) {
          gates.load(key_gates, at.first(), lane);
#pragma unroll
          for (int half = 0; half < 2; ++half) unit[half] = units[at.first() + 32 * half + lane];
        },
        [&](const Cursor &at) {
          const int64_t first = at.first();
          copy_others<K>(target, keys + first * p.key.token_stride, p.key.token_stride, gates.real, lane, pieces);
          copy_others<V>(target + S::TILE, values + first * p.value.token_stride, p.value.token_stride, gates.real, lane, V / 8);
        },
        [&](const Cursor &at) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float factor = GATED && !(at.near && fast) ? exp2_fast(fminf(gates.exponent(half, false, edge), at.near ? kFast * S::TOKENS : 0.f)) : 1.f;
            others.numbers[stage][32 * half + lane] = make_float4(unit[half], unit[half] * factor, factor, 0.f);
          }
          if constexpr (GATED) gates.store(others, false, edge, stage, lane);
          const bool mixed = GATED && gates.is_mixed(low, high);
          if (lane == 0) others.told[stage] = TileNote::of(at, GATED ? at.near && fast : at.near, mixed);
        });
  } else {
    take_registers<S::OWNER_REGISTERS>();
    const int64_t group_begin = begin + thread / kGroupThreads * kGroup;
    copy_own<S, K, V>(query_tile, head_of<const T>(p.query, batch, head) + group_begin * p.query.token_stride, p.query.token_stride,
                      head_of<const T>(args.grad_out, batch, head) + group_begin * args.grad_out.token_stride, args.grad_out.token_stride,
                      real_tokens(query_gates, group_begin, thread & 31), thread, pieces);
    const Coefficients f(p, head);
    GroupRows<K, V, GATED> work(args, others, f, pair, begin, query_tile);
    if constexpr (GATED) work.gates.load(query_gates, work.row);
    walk_tiles(work, walk);
    if (GATED && args.row_sums) work.store_row_sums(f, args.row_sums + static_cast<int64_t>(pair) * p.length, begin >= args.chunk);
    if (!S::KEEPS_ROWS) barrier_sync<kGroupThreads>(kAmongOwners + thread / kGroupThreads);  // results are staged over the warpgroup's own tokens
    work.store(args, shared, batch, head, rows, totals);
  }
  __syncthreads();
  if (thread < 3) {
    float sum = 0.f;
    for (int w = 0; w < S::OWNERS / 32; ++w) sum += totals[3 * w + thread];
    args.partials[(static_cast<int64_t>(pair) * args.parts + tile_number) * 3 + thread] = sum;
  }
}

}  // namespace linattn_pairs
