// Every pair of tokens by wgmma, a warpgroup 64 of a block's queries: forward.cuh for Hopper.
//
// A tile's products with the queries and those of the tile before with the values are on their way together; while the second are, the first become
// weights. P = a + beta s + gamma s^2 is made as gamma ((s + h)^2 + e), h = beta / 2 gamma, e = a / gamma - h^2: two operations a pair, gamma once a row.
#pragma once
#include "pairs/key_stream.cuh"

namespace linattn_pairs {

constexpr float kSquares = 64.f;  // b^2 over a c up to which h^2 and e together lose no more than 4 of float32's bits

// f of a head, read while the queries are on their way.
struct Numbers {
  float a, b, c, temperature;
  __device__ __forceinline__ Numbers(const linattn_problem &p, int head)
      : a(p.coefficients[head]), b(p.coefficients[p.query_heads + head]), c(p.coefficients[2 * p.query_heads + head]), temperature(p.coefficients[3 * p.query_heads + head]) {}
};

// What makes a weight of a product, for a lane's two rows.
struct RowWeights {
  bool squares;  // of all of the head's
  float a, shift[2], rest[2];

  // f's numbers, times what float16 needs; size: the unit; factor: what makes s of q . k^, for a query of zeros anything but 0.
  __device__ __forceinline__ void set(float a_of_head, float b, float c, float temperature, const float (&factor)[2], bool narrow, float (&size)[2]) {
    a = a_of_head;
    const float least = c * temperature * temperature;  // of gammas; a query that is brought near one has four times it at most
    squares = !narrow && c > 0.f && b * b <= kSquares * a * c && least >= 0x1p-40f && least <= 0x1p38f;  // float32 holds sums of weights over gamma
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float beta = b * factor[half], gamma = c * factor[half] * factor[half];
      const float unit = reciprocal(c * factor[half]);
      if (squares) shift[half] = 0.5f * b * unit, rest[half] = a * (c * unit) * unit - shift[half] * shift[half], size[half] = gamma;
      else shift[half] = beta, rest[half] = gamma, size[half] = 1.f;
    }
  }
  template <bool SQUARES> __device__ __forceinline__ float of(float s, float key_scale, int half) const {
    if constexpr (SQUARES) {
      const float u = fmaf(s, key_scale, shift[half]);
      return fmaf(u, u, rest[half]);
    } else {
      const float t = s * key_scale;
      return fmaf(fmaf(rest[half], t, shift[half]), t, a);
    }
  }
};

// What a thread of a block beside gates reads of the block's own tokens: all of it is asked for before any of it is waited for.
template <Gates GATES> struct OwnTokens {
  static constexpr int EACH = GATES == RUNS ? kRows / 32 : 0;
  const RateReader &queries;
  const int64_t begin, row;
  double sums[4];         // of the decay: before each warpgroup's rows, and with the lane's rows
  int32_t run[EACH + 1];  // of the block's tokens, by each warp; not above 0: padding, or behind the last token
  int32_t of_row[2];      // of the lane's rows, -1 there

  __device__ __forceinline__ OwnTokens(const RateReader &queries, int64_t begin) : queries(queries), begin(begin), row(begin + 16 * warp_number() + threadIdx.x % 32 / 4) {
#pragma unroll
    for (int i = 0; i < EACH; ++i) run[i] = queries.run_at(begin + 32 * i + threadIdx.x % 32);
#pragma unroll
    for (int half = 0; half < 2; ++half) of_row[half] = queries.run_at(row + 8 * half);
    if (queries.decay) {
      sums[0] = begin > 0 ? queries.sum_of(begin - 1) : 0.0, sums[1] = queries.sum_of(last_of_first());
      sums[2] = queries.sum_of(row), sums[3] = queries.sum_of(row + 8);
    }
  }
  // What waits for memory.
  __device__ __forceinline__ void finish() {
    if (!queries.decay) {
      const double each = queries.rate();
      sums[0] = each * static_cast<double>(begin), sums[1] = each * static_cast<double>(last_of_first() + 1);
      sums[2] = each * static_cast<double>(row + 1), sums[3] = each * static_cast<double>(row + 9);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) of_row[half] = of_row[half] > 0 ? of_row[half] : -1;
  }
  __device__ __forceinline__ int64_t last_of_first() const { return min(begin + kRows / 2, queries.length) - 1; }
  __device__ __forceinline__ double before(int group) const { return sums[group]; }
  __device__ __forceinline__ double edge() const { return threadIdx.x < kGroupThreads / 2 ? sums[0] : sums[1]; }
  __device__ __forceinline__ float exponent(int half) const { return static_cast<float>(sums[2 + half] - edge()); }
};

// What a block sees of tiles of keys, of which `told` and `sum` are those of KeyGates: the ones that hold a key of its runs within a decay's reach. Each warpgroup has runs of
// its own, from the lowest to the highest: they do not fall along a sequence but for padding.
template <Gates GATES> struct Sight {
  int32_t low[2] = {1, 1}, high[2] = {1, 1};
  double before[2];  // the sums of the decay before each warpgroup's tokens
  Least least;

  __device__ __forceinline__ Sight(const linattn_problem &p, const OwnTokens<GATES> &own, const Numbers &f) : before{own.before(0), own.before(1)} {
    if (p.causal && p.log_decay) least = Least(p, f.a, f.b, f.c, f.temperature);
    if constexpr (GATES == RUNS) {
      constexpr int EACH = OwnTokens<GATES>::EACH / 2;
#pragma unroll
      for (int group = 0; group < 2; ++group) {
        low[group] = INT32_MAX, high[group] = 0;
#pragma unroll
        for (int i = group * EACH; i < (group + 1) * EACH; ++i) low[group] = min(low[group], own.run[i] > 0 ? own.run[i] : INT32_MAX), high[group] = max(high[group], own.run[i]);
        low[group] = __reduce_min_sync(0xffffffffu, low[group]), high[group] = __reduce_max_sync(0xffffffffu, high[group]);
      }
    }
  }
  __device__ __forceinline__ bool sees(const int4 &told, double sum, int group) const {
    return told.w >= low[group] && told.z <= high[group] && least.reaches(sum - before[group]);
  }
  // As KeyStages has it.
  __device__ __forceinline__ int32_t note(const int4 &told) const {
    int32_t note = (told.x << kLevelShift) | (told.y & (HOLES | FAST));
    if constexpr (GATES == RUNS)
#pragma unroll
      for (int group = 0; group < 2; ++group)
        if (told.y & (HOLES | BEHIND) || told.z != low[group] || told.w != high[group] || low[group] != high[group]) note |= NEAR_TILE << group;
    return note;
  }
};

// A warp's 16 rows.
template <typename T, int K, int V, Gates GATES> struct OutputRows {
  static constexpr bool GATED = GATES != NO_GATES;
  using S = OutputShape<K, V, GATES>;
  using E = Element<T>;
  using Stages = KeyStages<K, GATES>;
  static constexpr int KEY_BLOCKS = K / 16, VALUE_BLOCKS = V / 16, TOKEN_BLOCKS = kKeys / 16;

  const linattn_problem &p;
  unsigned char *const shared;
  Stages *const stages;
  const uint32_t row_tile, first_stage;  // the latter as operands have it, counted in 16 bytes, and a number that the compiler does not make anew at every use
  const int lane, warp, group, place;
  const int64_t group_begin;  // the first row of the warpgroup
  const int own_tile;         // with which its own tokens begin, where later ones are not seen
  float shrink, mass[2], lost[2] = {}, acc[2 * VALUE_BLOCKS][4];
  uint32_t q[KEY_BLOCKS][4];
  RowWeights weight;
  int level = 0;          // that the sums are in
  bool own_unit = false;  // or else in the rows' own unit
  bool few = true;        // no far tile is among them

  __device__ __forceinline__ OutputRows(const linattn_problem &p, const Place &own, unsigned char *shared)
      : p(p), shared(shared), stages(reinterpret_cast<Stages *>(shared + S::STAGES_AT)), row_tile(shared_address(shared)),
        first_stage(__reduce_max_sync(0xffffffffu, (row_tile + S::ROW_TILE) / 16)), lane(threadIdx.x & 31), warp(warp_number()), group(lane >> 2), place(lane & 3),
        group_begin(own.begin + 64 * (warp / 4)), own_tile(p.causal ? static_cast<int>(own.begin / kKeys) + warp / 4 : INT32_MAX) {
    mass[0] = mass[1] = 0.f;
#pragma unroll
    for (int block = 0; block < 2 * VALUE_BLOCKS; ++block)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[block][i] = 0.f;
  }

  __device__ __forceinline__ void load_queries() {
    const Blocks<K> blocks(row_tile, lane_down<K>(lane));
#pragma unroll
    for (int block = 0; block < KEY_BLOCKS; ++block) ldmatrix(q[block], blocks.at(0, block) + Tile<K>::rows_at(warp));
  }

  // scale: 1 / |q| of the lane's rows; 0 where they have no direction, or a length whose square is beyond float32.
  __device__ __forceinline__ void set_weights(const Numbers &f, float (&scale)[2]) {
    const float a = f.a, b = f.b, c = f.c, temperature = f.temperature;
    shrink = weight_scale<T>(a, b, c, temperature);
    scale[0] = scale[1] = 1.f;
    if (p.normalize_qk) {
      row_products<T>(scale[0], scale[1], q, Blocks<K>(row_tile, lane_across<K>(lane)), Tile<K>::rows_at(warp), lane);
      scale[0] = inverse_norm(scale[0]), scale[1] = inverse_norm(scale[1]);
    }
    const float factor[2] = {temperature * near_one(scale[0]), temperature * near_one(scale[1])};
    float size[2];
    weight.set(a * shrink, b * shrink, c * shrink, temperature, factor, E::kNarrow, size);
    if (place == 0) row_of(0).size = size[0], row_of(1).size = size[1];
    __syncwarp();
    bring_near_one(scale);
  }
  __device__ __forceinline__ double &edge() const { return stages->edge[warp / 4]; }
  __device__ __forceinline__ OwnRow &row_of(int half) const { return stages->rows[16 * warp + 8 * half + group]; }
  __device__ __forceinline__ void set_gates(const OwnTokens<GATES> &own) const {
    if (lane == 0 && warp % 4 == 0) edge() = own.edge();
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (place == 0) row_of(half).exponent = own.exponent(half), row_of(half).run = own.of_row[half];
  }
  // Padding among a warp's own queries reads as zero, NaN in memory or not.
  __device__ __forceinline__ void zero_padding(const OwnTokens<GATES> &own) const {
    if (!__any_sync(0xffffffffu, own.of_row[0] < 0 || own.of_row[1] < 0)) return;
    __syncwarp();
#pragma unroll 1
    for (int i = lane; i < 16 * (K / 8); i += 32) {
      const int row = 16 * warp + i / (K / 8);
      if (stages->rows[row].run < 0) *reinterpret_cast<uint4 *>(shared + Tile<K>::at(row, i % (K / 8))) = make_uint4(0, 0, 0, 0);
    }
    __syncwarp();
  }
  // A query is multiplied by a power of two, which loses nothing, so that no product with a key that float32 holds is beyond it; one whose scale is 0 becomes 0.
  static __device__ __forceinline__ float power_below(float scale) { return E::kNarrow ? 1.f : __uint_as_float(__float_as_uint(scale) & 0x7f800000u); }
  static __device__ __forceinline__ float near_one(float scale) {
    return scale == 0.f ? 1.f : E::kNarrow ? scale : __uint_as_float((__float_as_uint(scale) & 0x007fffffu) | 0x3f800000u);
  }
  __device__ __forceinline__ void bring_near_one(const float (&scale)[2]) {
    if constexpr (!E::kNarrow) {
      const uint32_t power[2] = {E::pack(power_below(scale[0]), power_below(scale[0])), E::pack(power_below(scale[1]), power_below(scale[1]))};
#pragma unroll
      for (int block = 0; block < KEY_BLOCKS; ++block)
#pragma unroll
        for (int i = 0; i < 4; ++i) q[block][i] = multiply_two(q[block][i], power[i % 2]);
    }
  }

  __device__ __forceinline__ void multiply_keys(float (&s)[2 * TOKEN_BLOCKS][4], int stage) {
    const uint64_t keys = warpgroup_operand<K>(0) | (first_stage + stage * (S::STAGE / 16));
    warpgroup_keep(s);
    warpgroup_begin();
#pragma unroll
    for (int block = 0; block < KEY_BLOCKS; ++block) WarpgroupProduct<T, kKeys, false>::run(s, q[block], warpgroup_moved(keys, Tile<K>::columns_at(2 * block)), block > 0);
    warpgroup_commit();
  }
  __device__ __forceinline__ void multiply_values(const uint32_t (&weights)[TOKEN_BLOCKS][4], int stage) {
    const uint64_t values = warpgroup_operand<V>(0, Tile<V>::kPanelBytes) | (first_stage + stage * (S::STAGE / 16) + S::KEYS / 16);
    warpgroup_keep(acc);
    warpgroup_begin();
#pragma unroll
    for (int block = 0; block < TOKEN_BLOCKS; ++block) WarpgroupProduct<T, V, true>::run(acc, weights[block], warpgroup_moved(values, Tile<V>::rows_at(block)), true);
    warpgroup_commit();
  }

  __device__ __forceinline__ bool is_diagonal(int tile) const { return tile >= own_tile; }
  // Whether not all pairs of a tile are seen, or gated alike. told: of a gated tile.
  __device__ __forceinline__ bool is_near(int tile, int32_t told) const {
    if constexpr (GATED) return is_diagonal(tile) || (GATES == RUNS && told & NEAR_TILE << warp / 4);
    return tile >= first_near();
  }
  __device__ __forceinline__ int first_near() const { return min(own_tile, static_cast<int>(p.length / kKeys)); }  // without gates
  __device__ __forceinline__ Pairs pairs_of(int tile, int32_t told) const { return !is_near(tile, told) ? FAR : GATED && is_diagonal(tile) && told & FAST ? GATED_EACH : MASKED; }

  // Of two neighbouring keys of a tile: their scales, and beside gates their factors. Block n of eight, the lane's two.
  using TwoKeys = std::conditional_t<GATED, float4, float2>;
  __device__ __forceinline__ TwoKeys two_keys(int stage, int n) const {
    if constexpr (GATED) return *reinterpret_cast<const float4 *>(stages->gates[stage].scale_and_factor[4 * n + place]);
    else return *reinterpret_cast<const float2 *>(stages->scales[stage] + 8 * n + 2 * place);
  }
  static constexpr int EARLY = 2;  // of these are read before the products are waited for, and then as many ahead
  __device__ __forceinline__ void read_early(TwoKeys (&early)[EARLY], int stage) const {
#pragma unroll
    for (int n = 0; n < EARLY; ++n) early[n] = two_keys(stage, n);
  }

  // A tile's products into its weights.
  template <bool SQUARES, Pairs PAIRS> __device__ __forceinline__ void weigh(float (&s)[2 * TOKEN_BLOCKS][4], TwoKeys (&early)[EARLY], int tile, int stage) {
    const int64_t first = static_cast<int64_t>(tile) * kKeys;
    const KeyGates &keys = stages->gates[GATED ? stage : 0];
    // Keys of the tile that there are, and the last one that the first row sees, from the lane's first column on: columns are compared with numbers that are known here,
    // since the compiler keeps each sum with a lane's column in a register.
    const int end = static_cast<int>(min(p.length - first, static_cast<int64_t>(kKeys))) - 2 * place;
    const int last = (p.causal ? static_cast<int>(group_begin - first) + 16 * (warp % 4) + group : kKeys) - 2 * place;
    constexpr bool NEAR = PAIRS != FAR;
    float own[2] = {0.f, 0.f};  // the rows' exponents from the tile's last token on
    int32_t runs[2] = {0, 0};
    if (GATED && NEAR) runs[0] = row_of(0).run, runs[1] = row_of(1).run;
    if (PAIRS == GATED_EACH) {
      const float between = static_cast<float>(edge() - keys.edge);
      own[0] = row_of(0).exponent + between, own[1] = row_of(1).exponent + between;
    }
#pragma unroll
    for (int n = 0; n < 2 * TOKEN_BLOCKS; ++n) {
      const int column = 8 * n + 2 * place;
      const TwoKeys two = early[n % EARLY];
      if (n + EARLY < 2 * TOKEN_BLOCKS) early[n % EARLY] = two_keys(stage, n + EARLY);
      const float2 scale = make_float2(two.x, two.y);
      float2 factor = scale;
      if constexpr (GATED) factor = make_float2(two.z, two.w);
#pragma unroll
      for (int i = 0; i < 4; ++i) s[n][i] = weight.template of<SQUARES>(s[n][i], i & 1 ? scale.y : scale.x, i >> 1);
      if constexpr (GATED && NEAR) {
        float2 exponent = factor;
        int2 run = make_int2(1, 1);
        if constexpr (PAIRS == GATED_EACH) exponent = *reinterpret_cast<const float2 *>(keys.exponent + column);
        if constexpr (GATES == RUNS) run = *reinterpret_cast<const int2 *>(keys.run + column);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float x = PAIRS == GATED_EACH ? exp2_fast((i & 1 ? exponent.y : exponent.x) + own[i >> 1]) : i & 1 ? factor.y : factor.x;
          s[n][i] = last >= 8 * n + (i & 1) - 8 * (i >> 1) && (i & 1 ? run.y : run.x) == runs[i >> 1] ? s[n][i] * x : 0.f;
        }
      } else if constexpr (GATED) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[n][i] *= i & 1 ? factor.y : factor.x;
      } else if constexpr (NEAR) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (end <= 8 * n + (i & 1) || last < 8 * n + (i & 1) - 8 * (i >> 1)) s[n][i] = 0.f;
      }
      if (NEAR && (PAIRS == GATED_EACH || (GATED ? few : tile == 0))) lost[0] += lost_by_rounding<T>(s[n][0], s[n][1]), lost[1] += lost_by_rounding<T>(s[n][2], s[n][3]);
      mass[0] += s[n][0] + s[n][1], mass[1] += s[n][2] + s[n][3];
    }
  }

  // What sums of earlier tiles are multiplied by where their unit changes: to that of a tile's level, or to the rows' own.
  __device__ __forceinline__ float moved(bool own, int tile_level, int half) const {
    if (!own) return exp2_fast(static_cast<float>(kLevel * (tile_level - level)));
    const double above = edge() - static_cast<double>(kLevel) * level, whole = floor(above);
    return row_of(half).run < 0 ? 0.f : exp2_fast(row_of(half).exponent + static_cast<float>(above - whole)) * exp2_fast(static_cast<float>(whole));
  }
  // At the end of a causal walk, where sums are in the unit of a level: what they are multiplied by for the masses, besides the weights' own unit, which cancels in means.
  __device__ __forceinline__ void leave_level() const {
    if (own_unit) return;
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (place == 0) row_of(half).size *= moved(true, 0, half);
    __syncwarp();
  }

  static __device__ __forceinline__ void round(uint32_t (&weights)[TOKEN_BLOCKS][4], const float (&s)[2 * TOKEN_BLOCKS][4]) {
#pragma unroll
    for (int n = 0; n < 2 * TOKEN_BLOCKS; ++n) weights[n / 2][n % 2 * 2] = E::pack(s[n][0], s[n][1]), weights[n / 2][n % 2 * 2 + 1] = E::pack(s[n][2], s[n][3]);
  }

  // The first tile's products and weights.
  template <bool SQUARES, Pairs PAIRS> __device__ __forceinline__ void begin_with(int tile, int stage, uint32_t (&weights)[TOKEN_BLOCKS][4]) {
    float s[2 * TOKEN_BLOCKS][4];
    multiply_keys(s, stage);
    TwoKeys early[EARLY];
    read_early(early, stage);
    warpgroup_wait<0>();
    warpgroup_keep(s);
    weigh<SQUARES, PAIRS>(s, early, tile, stage);
    round(weights, s);
  }
  // A tile's weights times its values, beside the next one's products and weights. MOVES: the next one may be of another level.
  template <bool SQUARES, Pairs PAIRS, bool MOVES, typename Beside>
  __device__ __forceinline__ void go_on(int next, int from, int stage, uint32_t (&weights)[TOKEN_BLOCKS][4], int next_level, Beside beside) {
    float s[2 * TOKEN_BLOCKS][4];
    multiply_keys(s, stage);
    multiply_values(weights, from);
    beside();
    constexpr bool own = PAIRS == GATED_EACH;
    const bool move = own || (MOVES && next_level != level);
    TwoKeys early[EARLY];
    read_early(early, stage);
    warpgroup_wait<1>();
    warpgroup_keep(s);
    if (move) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float factor = moved(own, next_level, half);
        mass[half] *= factor, lost[half] *= factor;
      }
    }
    weigh<SQUARES, PAIRS>(s, early, next, stage);
    warpgroup_keep(s);  // all of it before the wait
    warpgroup_wait<0>();
    warpgroup_keep(acc);
    if (move) {
      const float factor[2] = {moved(own, next_level, 0), moved(own, next_level, 1)};
#pragma unroll
      for (int block = 0; block < 2 * VALUE_BLOCKS; ++block)
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[block][i] *= factor[i >> 1];
    }
    if (MOVES) level = next_level, own_unit = own;
    round(weights, s);
  }
  __device__ __forceinline__ void end_with(int stage, const uint32_t (&weights)[TOKEN_BLOCKS][4]) {
    multiply_values(weights, stage);
    warpgroup_wait<0>();
    warpgroup_keep(acc);
  }

  // The means and masses. A warp stages its results over queries, which everybody has in registers.
  __device__ __forceinline__ void store(const Arguments &args, const Place &own) {
    float *const mass_rows = args.mass + (static_cast<int64_t>(own.batch) * p.query_heads + own.head) * p.length + own.begin;
    T *const results = head_of<T>(args.out, own.batch, own.head) + own.begin * args.out.token_stride;
    const bool stored = own.begin >= args.chunk;  // what states have added lies there
    float finish[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      mass[half] += __shfl_xor_sync(0xffffffffu, mass[half], 1);
      mass[half] += __shfl_xor_sync(0xffffffffu, mass[half], 2);
      lost[half] += __shfl_xor_sync(0xffffffffu, lost[half], 1);
      lost[half] += __shfl_xor_sync(0xffffffffu, lost[half], 2);
      const float size = row_of(half).size;
      mass[half] *= size, lost[half] *= size;
      if (GATES == RUNS && row_of(half).run < 0) mass[half] = 0.f;
      const int row = 16 * warp + 8 * half + group;
      if (stored) {
        if (row < own.rows) mass[half] += mass_rows[row];
        __syncwarp();  // all have read what one of them overwrites
#pragma unroll
        for (int n = 0; n < 2 * VALUE_BLOCKS; ++n) acc[n][2 * half] *= size, acc[n][2 * half + 1] *= size;
      }
      if (place == 0 && row < own.rows) mass_rows[row] = mass[half] / shrink;
      const float divisor = mass[half] - lost[half];
      finish[half] = mass[half] == 0.f || divisor == 0.f ? 0.f : (stored ? 1.f : size) / divisor;
    }
    if (stored) add_stored<T, V>(acc, results, args.out.token_stride, 16 * warp + group, own.rows, place);
    const Blocks<V> blocks(row_tile, lane_down<V>(lane));
#pragma unroll
    for (int block = 0; block < VALUE_BLOCKS; ++block)
      store_block<T, V>(blocks.at(0, block) + Tile<V>::rows_at(warp), acc[2 * block], acc[2 * block + 1], finish[0], finish[1], lane);
    __syncwarp();
    for (int index = lane; index < 16 * (V / 8); index += 32) {
      const int row = 16 * warp + index / (V / 8), piece = index % (V / 8);
      if (row < own.rows) *reinterpret_cast<uint4 *>(results + row * args.out.token_stride + piece * 8) = *reinterpret_cast<const uint4 *>(shared + Tile<V>::at(row, piece));
    }
  }
};

// What a block walks over: its tiles from `first` to `end`.
template <typename T, int K, int V, Gates GATES> struct OutputWalk {
  using S = OutputShape<K, V, GATES>;
  using Rows = OutputRows<T, K, V, GATES>;
  const KeyStream<K, V, GATES> &keys;
  const linattn_problem &p;
  int first, end;
  const int base;    // first, before it was known what is seen
  int second = base;  // the first tile that the second warpgroup sees

  // What there is to know of gated tiles: what each holds, the first that the block sees, and behind the last. Causal walks go on to
  // the block's own tokens, where sums take the rows' own factors.
  __device__ __forceinline__ void look(const Place &own, OwnTokens<GATES> &tokens, const Numbers &f, int thread) {
    typename S::Stages &stages = *keys.stages;
    int4 it{};
    double sum = 0;
    const auto read = [&](int tile) {
      if (tile < end) it = keys.gates[tile].told, sum = keys.gates[tile].edge;
    };
    read(first + thread);
    tokens.finish();
    const Sight<GATES> sight(p, tokens, f);
    int begin = end, behind = first, of_second = end;
#pragma unroll 1
    for (int tile = first + thread; tile < end; read(tile += kGroupThreads)) {
      stages.told[tile - base] = sight.note(it);
      const bool seen = sight.sees(it, sum, 1);
      if (seen || sight.sees(it, sum, 0)) begin = min(begin, tile), behind = tile + 1;
      if (seen) of_second = min(of_second, tile);
    }
    const auto least_of = [&](int32_t (&all)[kGroupThreads / 32]) { return __reduce_min_sync(0xffffffffu, all[thread % (kGroupThreads / 32)]); };
    begin = __reduce_min_sync(0xffffffffu, begin), behind = __reduce_max_sync(0xffffffffu, behind);
    of_second = __reduce_min_sync(0xffffffffu, of_second);
    if (thread % 32 == 0) {
      stages.begin[thread / 32] = begin, stages.behind[thread / 32] = behind;
      stages.second[thread / 32] = of_second;
    }
    __syncthreads();
    first = least_of(stages.begin), end = __reduce_max_sync(0xffffffffu, stages.behind[thread % (kGroupThreads / 32)]);
    second = least_of(stages.second);
    if (p.causal && first < end) end = own.tiles;
  }
  __device__ __forceinline__ int32_t told(int tile) const { return GATES ? __reduce_max_sync(0xffffffffu, keys.stages->told[tile - base]) : 0; }  // all lanes' is the same

  // By one thread: the first tiles.
  __device__ __forceinline__ void start() const {
    for (int i = 0; i < kAhead && first + i < end; ++i) keys.ask(p, first + i, Stage{i});
  }
  // By one thread: a tile ahead of that in `stage`, where all have read what was there.
  __device__ __forceinline__ void ask_ahead(int tile, Stage stage) const {
    if (tile + kAhead >= end) return;
    const Stage ahead = stage.next(kAhead);
    if (tile + kAhead - first >= kKeyStages) bulk_wait(keys.read(ahead), ahead.parity ^ 1);
    keys.ask(p, tile + kAhead, ahead);
  }
  __device__ __forceinline__ void arrive(Stage stage, int32_t told, int warp) const {
    bulk_wait(keys.here(stage), stage.parity);
    if (GATES == RUNS && told & HOLES) zero_holes(stage, warp / 4);
  }
  // Padding among the values reads as zero; each warpgroup sees to it for itself. Nothing here takes another way in some lanes: the loop over tiles counts in registers of
  // the whole warp.
  __device__ __forceinline__ void zero_holes(Stage stage, int warpgroup) const {
    constexpr int kThreads = kGroupThreads / 2;
    unsigned char *const values = reinterpret_cast<unsigned char *>(keys.stages) - S::STAGES_AT + S::ROW_TILE + stage.number * S::STAGE + S::KEYS;
    const int32_t *const runs = keys.stages->gates[stage.number].run;
    const int thread = remade(static_cast<int>(threadIdx.x)) % kThreads;
#pragma unroll
    for (int i = 0; i < kKeys * (V / 8) / kThreads; ++i) {
      const int key = (thread + i * kThreads) / (V / 8), piece = (thread + i * kThreads) % (V / 8);
      if (runs[key] == 0) *reinterpret_cast<uint4 *>(values + Tile<V>::at(key, piece)) = make_uint4(0, 0, 0, 0);
    }
    warpgroup_publish();
    barrier_sync<kThreads>(kFirstGroup + warpgroup);
  }
  __device__ __forceinline__ void leave(Stage stage, int lane) const {
    warpgroup_publish();  // what lanes have read themselves is read before a bulk copy takes its place
    __syncwarp();
    if (lane == 0) bulk_arrive(keys.read(stage));
  }

  // The first tile from `tile` to `mine` that is not far from the rows, or of another level than their sums. What of a tile is asked there is nothing that the
  // steps over tiles before it have to ask.
  __device__ __forceinline__ int far_until(const Rows &rows, int tile, int mine) const {
    if constexpr (GATES == NO_GATES) return min(mine, rows.first_near());
    else
      for (; tile < mine; tile += 32) {
        const int own = tile + rows.lane;
        bool other = own >= mine || rows.is_diagonal(own);
        if (!other) other = rows.is_near(own, keys.stages->told[own - base]) || keys.stages->told[own - base] >> kLevelShift != rows.level;
        const int found = __reduce_min_sync(0xffffffffu, other ? own : INT32_MAX);
        if (found < INT32_MAX) return found;
      }
    return mine;
  }

  // The values of `tile`, in `stage`, beside the weights of the next one.
  template <bool SQUARES, Pairs PAIRS, bool MOVES>
  __device__ __forceinline__ void step(Rows &rows, uint32_t (&weights)[Rows::TOKEN_BLOCKS][4], int tile, Stage stage, Stage next, int level, int &asks_at) const {
    rows.template go_on<SQUARES, PAIRS, MOVES>(tile + 1, stage.number, next.number, weights, level, [&] {
      if (tile == asks_at) ask_ahead(tile, stage), asks_at += 4;
    });
    leave(stage, rows.lane);
  }
  // Rows see the tiles before `mine`.
  template <bool SQUARES> __device__ __forceinline__ void go(Rows &rows, int mine) const {
    if (first >= mine) return;
    uint32_t weights[Rows::TOKEN_BLOCKS][4];
    Stage stage;
    int tile = first;
    if constexpr (GATES != NO_GATES)  // tiles before what the second warpgroup sees are the first's alone
      for (; tile < min(rows.warp < 4 ? first : second, mine); ++tile, stage = stage.next()) bulk_wait(keys.here(stage), stage.parity), leave(stage, rows.lane);
    if (tile >= mine) return;
    const int32_t of_first = told(tile);
    arrive(stage, of_first, rows.warp);
    switch (rows.pairs_of(tile, of_first)) {
      case FAR: rows.template begin_with<SQUARES, FAR>(tile, stage.number, weights), rows.few = false; break;
      case MASKED: rows.template begin_with<SQUARES, MASKED>(tile, stage.number, weights); break;
      case GATED_EACH:
        if constexpr (GATES != NO_GATES) rows.template begin_with<SQUARES, GATED_EACH>(tile, stage.number, weights), rows.own_unit = true;
    }
    rows.level = of_first >> kLevelShift;
    int asks_at = rows.lane == 0 && rows.warp < 4 ? tile + (rows.warp - tile & 3) : INT32_MAX;  // the first warpgroup's in turn, for the work's sake
    while (tile + 1 < mine) {
      const int until = far_until(rows, tile + 1, mine);
      if (tile + 1 < until) rows.few = false;
      for (; tile + 1 < until; ++tile) {
        const Stage next = stage.next();
        bulk_wait(keys.here(next), next.parity);
        step<SQUARES, FAR, false>(rows, weights, tile, stage, next, 0, asks_at);
        stage = next;
      }
      if (tile + 1 >= mine) break;
      const Stage next = stage.next();
      const int32_t of_next = told(tile + 1);
      arrive(next, of_next, rows.warp);
      const int level = of_next >> kLevelShift;
      constexpr bool MOVES = GATES != NO_GATES;
      switch (rows.pairs_of(tile + 1, of_next)) {
        case FAR: step<SQUARES, FAR, MOVES>(rows, weights, tile, stage, next, level, asks_at); break;
        case MASKED: step<SQUARES, MASKED, MOVES>(rows, weights, tile, stage, next, level, asks_at); break;
        case GATED_EACH:
          if constexpr (GATES != NO_GATES) step<SQUARES, GATED_EACH, MOVES>(rows, weights, tile, stage, next, level, asks_at);
      }
      ++tile, stage = next;
    }
    rows.end_with(stage.number, weights);
    leave(stage, rows.lane);
    if (GATES != NO_GATES && p.causal) rows.leave_level();
  }
};

}  // namespace linattn_pairs
