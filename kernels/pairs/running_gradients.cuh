// The gradients in one pass each: queries forward in the sequence, keys and values backward. What a token's pairs are made into, and the signs, are those of
// group_rows.cuh and group_columns.cuh.
#pragma once
#include "pairs/running_state.cuh"

namespace linattn_pairs {

// What both have in common: a warp's 16 tokens, and their products with a tile of 64 others, in two halves.
template <Pass PASS> struct RunningSide : StateSide {
  using S = RunShape<PASS>;
  static constexpr int HALVES = kKeys / kStep, BUFFERS = PASS == Pass::ROWS ? HALVES : 1;
  uint32_t y[kRunValues / 16][4];  // the tokens' values, or gradients
  float s[BUFFERS][kStep / 8][4], d[BUFFERS][kStep / 8][4];

  __device__ __forceinline__ RunningSide() { clear(s), clear(d); }
  __device__ __forceinline__ void load(uint32_t own) {
    StateSide::load(own);
    const Blocks<kRunValues> blocks(own + S::X, lane_down<kRunValues>(lane));
#pragma unroll
    for (int n = 0; n < kRunValues / 16; ++n) ldmatrix(y[n], blocks.at(0, n) + Tile<kRunValues>::rows_at(warp));
  }
  static __device__ __forceinline__ uint32_t keys_at(uint32_t others, int tile, int half) { return others + Tile<kRunKeys>::rows_at(kKeys / 16 * tile + kStep / 16 * half); }
  static __device__ __forceinline__ uint32_t values_at(uint32_t others, int tile, int half) {
    return others + S::X + Tile<kRunValues>::rows_at(kKeys / 16 * tile + kStep / 16 * half);
  }
  __device__ __forceinline__ void multiply(uint32_t others, int tile, int half) {
    keep(half);
    warpgroup_begin();
    WarpgroupProduct<T, kStep, false>::run(s[half % BUFFERS], x, operand_in<kRunKeys>(keys_at(others, tile, half), 0), false);
#pragma unroll
    for (int n = 0; n < kRunValues / 16; ++n)
      WarpgroupProduct<T, kStep, false>::run(d[half % BUFFERS], y[n], operand_in<kRunValues>(values_at(others, tile, half), Tile<kRunValues>::columns_at(2 * n)), n > 0);
    warpgroup_commit();
  }
  __device__ __forceinline__ void keep(int half) { warpgroup_keep(s[half % BUFFERS]), warpgroup_keep(d[half % BUFFERS]); }
  template <int D> static __device__ __forceinline__ void add(float (&sums)[D / 8][4], const uint32_t (&weights)[kStep / 16][4], uint32_t tile) {
#pragma unroll
    for (int block = 0; block < kStep / 16; ++block) WarpgroupProduct<T, D, true>::run(sums, weights[block], operand_in<D, true>(tile, Tile<D>::rows_at(block)), true);
  }
  // A lane's part of y . `line` of its rows.
  __device__ __forceinline__ float along_values(const float *line, int half) const {
    float sum = 0.f;
#pragma unroll
    for (int n = 0; n < kRunValues / 16; ++n)
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const float2 two = *reinterpret_cast<const float2 *>(line + 16 * n + 8 * t + 2 * place);
        sum += E::low(y[n][2 * t + half]) * two.x + E::high(y[n][2 * t + half]) * two.y;
      }
    return sum;
  }
};

// A warp's sum.
__device__ __forceinline__ void store_reach(float *warps, const float (&reach)[2], const StateSide &side) {
  float sum = reach[0] + reach[1];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  if (side.lane == 0) warps[side.warp] = sum;
}

template <bool GATED> struct RunningRows {
  static constexpr Pass PASS = Pass::ROWS;
  using T = __nv_bfloat16;
  using E = Element<T>;
  using S = RunShape<PASS>;
  RunningSide<PASS> side;
  float acc[2][4], sums[3][2], share[2], error[2], unit[2], beta[2], twice_gamma[2];
  float totals[3] = {};  // of dA, dA s, dA s^2, over chunks
  float reach[2];        // of A dA over the chunk's edge
  uint32_t weights[kKeys / kStep][kStep / 16][4];

  __device__ __forceinline__ void start(const Running &args, const RunPlace<PASS> &at, const Coefficients &f, uint32_t own, uint32_t state, bool has_state,
                                        const StateMargins &margins, const ChunkNumbers &numbers, int64_t begin) {
    const Gradients &g = args.of;
    side.load(own);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float *const of = g.query_numbers + (static_cast<int64_t>(at.batch) * at.p.query_heads + at.head) * kNumbers * g.padded + begin + side.row(half);
      share[half] = share_of(of[0], of[g.padded]), error[half] = share[half] == 0.f ? 0.f : of[g.padded] / share[half], unit[half] = of[2 * g.padded];
      beta[half] = f.beta * unit[half], twice_gamma[half] = 2.f * f.gamma * unit[half] * unit[half];
      sums[0][half] = sums[1][half] = sums[2][half] = reach[half] = 0.f;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) acc[i / 4][i % 4] = 0.f;
    if (!has_state) return;
    float pairs[2][4], lines[2][4], products[2][4];
    side.multiply_values(pairs, lines, side.y, state);
    side.multiply_masses(products, margins);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float change = error[half] + over_place(side.along_values(margins.values, half)) * margins.inverse_count();  // of a value that is the mean
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const float2 line = side.line_of(margins, t);
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          pairs[t][i] += change * products[t][i], lines[t][i] += change * (i % 2 ? line.y : line.x);
          acc[t][i] = twice_gamma[half] * pairs[t][i] + beta[half] * lines[t][i];
        }
      }
      sums[0][half] = side.place == 0 ? change * margins.count : 0.f, sums[1][half] = side.along(lines, half), sums[2][half] = side.along(pairs, half);
    }
    if (GATED && numbers.mixed) take_own(numbers);
#pragma unroll
    for (int half = 0; half < 2; ++half) reach[half] = products_of(f, half);
  }
  // A lane's part of the sum of A dA of its rows.
  __device__ __forceinline__ float products_of(const Coefficients &f, int half) const {
    return f.a * sums[0][half] + beta[half] * sums[1][half] + 0.5f * twice_gamma[half] * sums[2][half];
  }
  __device__ __forceinline__ void scale(const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) acc[i / 4][i % 4] *= factor[i / 2 % 2];
#pragma unroll
    for (int i = 0; i < 6; ++i) sums[i / 2][i % 2] *= factor[i % 2];
  }
  __device__ __forceinline__ void take_own(const ChunkNumbers &numbers) {
    const float own[2] = {numbers.own[side.row(0)], numbers.own[side.row(1)]};
    scale(own);
  }

  __device__ __forceinline__ void add_tile(uint32_t others, const ChunkNumbers &numbers, int tile) {
    const bool diagonal = tile == side.warp / 4;
    side.multiply(others, tile, 0), side.multiply(others, tile, 1);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      warpgroup_wait<1>();
      side.keep(half);
      if (GATED && numbers.mixed) weigh<true>(half, numbers, tile, diagonal);
      else weigh<false>(half, numbers, tile, diagonal);
      warpgroup_keep(weights[half]);
      warpgroup_wait<0>();
      warpgroup_keep(acc);
      warpgroup_begin();
      side.template add<kRunKeys>(acc, weights[half], side.keys_at(others, tile, half));
      warpgroup_commit();
    }
    warpgroup_wait<0>();
    warpgroup_keep(acc);
  }
  template <bool MIXED> __device__ __forceinline__ void weigh(int half_tile, const ChunkNumbers &numbers, int tile, bool diagonal) {
    const int last = side.row(0) - kKeys * tile;  // key of the tile that the lane's first row sees
    float exponent[2] = {};
    int32_t run[2] = {};
    if constexpr (MIXED)
#pragma unroll
      for (int half = 0; half < 2; ++half) exponent[half] = numbers.exponent[side.row(half)], run[half] = numbers.query_run[side.row(half)];
#pragma unroll
    for (int n = 0; n < kStep / 8; ++n) {
      const int column = kStep * half_tile + 8 * n + 2 * side.place, key = kKeys * tile + column;
      const float2 units = *reinterpret_cast<const float2 *>(numbers.unit + key);
      float2 factors = make_float2(1.f, 1.f), exponents = {};
      int2 runs = {};
      if constexpr (GATED && !MIXED) factors = *reinterpret_cast<const float2 *>(numbers.factor + key);
      if constexpr (MIXED) exponents = *reinterpret_cast<const float2 *>(numbers.exponent + key), runs = *reinterpret_cast<const int2 *>(numbers.key_run + key);
      float weight[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int half = i / 2;
        const float t = side.s[half_tile][n][i] * (i % 2 ? units.y : units.x);
        float change = side.d[half_tile][n][i] + error[half];
        if constexpr (MIXED) {
          const float product = change * exp2_fast(fminf(exponent[half] - (i % 2 ? exponents.y : exponents.x), 0.f));
          change = run[half] > 0 && run[half] == (i % 2 ? runs.y : runs.x) ? product : 0.f;
        } else if constexpr (GATED) {
          change *= i % 2 ? factors.y : factors.x;
        }
        if (diagonal && column + i % 2 > last + 8 * half) change = 0.f;
        const float product = change * t;
        sums[0][half] += change, sums[1][half] += product, sums[2][half] = fmaf(product, t, sums[2][half]);
        weight[i] = change * (i % 2 ? units.y : units.x) * fmaf(twice_gamma[half], t, beta[half]);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) weights[half_tile][n / 2][n % 2 * 2 + half] = E::pack(weight[2 * half], weight[2 * half + 1]);
    }
  }

  __device__ __forceinline__ void store(const Running &args, const RunPlace<PASS> &at, const Coefficients &f, unsigned char *tile, const ChunkNumbers &numbers, int64_t begin) {
    const Gradients &g = args.of;
    if (GATED && !numbers.mixed) take_own(numbers);
    scale(share);
    const int rows = at.count_of(begin);
    if (GATED && g.row_sums) {
      float *const row_sums = g.row_sums + (static_cast<int64_t>(at.batch) * at.p.query_heads + at.head) * at.p.length + begin;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float sum = over_place(products_of(f, half));
        if (side.place == 0 && side.row(half) < rows) row_sums[side.row(half)] = sum;
        reach[half] *= share[half] * (numbers.mixed ? 1.f : numbers.own[side.row(half)]);
      }
      store_reach(args.flow.rows + ((static_cast<int64_t>(at.batch) * at.p.query_heads + at.head) * args.chunks + begin / kRunTokens) * kWarps, reach, side);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) totals[0] += sums[0][half], totals[1] += sums[1][half] * unit[half], totals[2] += sums[2][half] * unit[half] * unit[half];
    const Blocks<kRunKeys> blocks(shared_address(tile), lane_down<kRunKeys>(side.lane));
    const uint32_t stripe = Tile<kRunKeys>::rows_at(side.warp);
    if (at.p.normalize_qk) project<T, 1>(acc, blocks, stripe, unit);
    T *const results = head_of<T>(g.grad_query, at.batch, at.head) + begin * g.grad_query.token_stride;
    store_rows<T, kRunKeys>(g.grad_query, results, tile, blocks, stripe, acc, 1.f, 1.f, rows, side.warp, side.lane, at.p.head_dim / 8);
  }
};

template <bool GATED> struct RunningColumns {
  static constexpr Pass PASS = Pass::COLUMNS;
  using T = __nv_bfloat16;
  using E = Element<T>;
  using S = RunShape<PASS>;
  RunningSide<PASS> side;
  float key_sums[2][4], value_sums[kRunValues / 8][4], decay_sums[2], reach[2], unit[2];
  uint32_t slopes[kStep / 16][4], weights[kStep / 16][4];

  __device__ __forceinline__ void start(const Running &args, const RunPlace<PASS> &at, uint32_t own, uint32_t state, bool has_state, const StateMargins &margins,
                                        const ChunkNumbers &numbers, int64_t begin) {
    const Gradients &g = args.of;
    side.load(own);
#pragma unroll
    for (int half = 0; half < 2; ++half)
      unit[half] = g.key_scale[(static_cast<int64_t>(at.batch) * at.p.key_heads + at.key_head) * g.padded + begin + side.row(half)], decay_sums[half] = reach[half] = 0.f;
    if (!has_state) {
#pragma unroll
      for (int i = 0; i < kRunValues / 2; ++i) value_sums[i / 4][i % 4] = 0.f;
#pragma unroll
      for (int i = 0; i < 8; ++i) key_sums[i / 4][i % 4] = 0.f;
      return;
    }
    float pairs[2][4], lines[2][4], products[2][4];
    side.multiply_values(pairs, lines, side.y, state);
    side.multiply_masses(products, margins);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const float2 line = side.line_of(margins, t);
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          pairs[t][i] += products[t][i], lines[t][i] += i % 2 ? line.y : line.x;
          key_sums[t][i] = 2.f * unit[half] * pairs[t][i] + lines[t][i];
        }
      }
      decay_sums[half] =
          side.along_values(margins.values, half) + (side.place == 0 ? margins.count : 0.f) + unit[half] * (side.along(lines, half) + unit[half] * side.along(pairs, half));
    }
    side.add_pairs(value_sums, state);
#pragma unroll
    for (int i = 0; i < kRunValues / 2; ++i) value_sums[i / 4][i % 4] *= unit[i / 2 % 2] * unit[i / 2 % 2];
    side.add_lines(value_sums, unit, state);
#pragma unroll
    for (int n = 0; n < kRunValues / 8; ++n) {
      const float2 two = *reinterpret_cast<const float2 *>(margins.values + 8 * n + 2 * side.place);
#pragma unroll
      for (int i = 0; i < 4; ++i) value_sums[n][i] += i % 2 ? two.y : two.x;
    }
    if (GATED && numbers.mixed) take_own(numbers);
    reach[0] = decay_sums[0], reach[1] = decay_sums[1];
  }
  __device__ __forceinline__ void take_own(const ChunkNumbers &numbers) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float own = numbers.own[side.row(half)];
      decay_sums[half] *= own;
#pragma unroll
      for (int n = 0; n < 2; ++n) key_sums[n][2 * half] *= own, key_sums[n][2 * half + 1] *= own;
#pragma unroll
      for (int n = 0; n < kRunValues / 8; ++n) value_sums[n][2 * half] *= own, value_sums[n][2 * half + 1] *= own;
    }
  }

  __device__ __forceinline__ void add_tile(uint32_t others, const ChunkNumbers &numbers, int tile) {
    const bool diagonal = tile == side.warp / 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      side.multiply(others, tile, half);
      warpgroup_wait<0>();
      side.keep(half);
      if (GATED && numbers.mixed) weigh<true>(half, numbers, tile, diagonal);
      else weigh<false>(half, numbers, tile, diagonal);
      warpgroup_keep(weights), warpgroup_keep(slopes);
      warpgroup_keep(key_sums), warpgroup_keep(value_sums);
      warpgroup_begin();
      side.template add<kRunValues>(value_sums, weights, side.values_at(others, tile, half));
      side.template add<kRunKeys>(key_sums, slopes, side.keys_at(others, tile, half));
      warpgroup_commit();
    }
    warpgroup_wait<0>();
    warpgroup_keep(key_sums), warpgroup_keep(value_sums);
  }
  template <bool MIXED> __device__ __forceinline__ void weigh(int half_tile, const ChunkNumbers &numbers, int tile, bool diagonal) {
    const int first = side.row(0) - kKeys * tile;  // query of the tile that sees the lane's first key
    float exponent[2] = {};
    int32_t run[2] = {};
    if constexpr (MIXED)
#pragma unroll
      for (int half = 0; half < 2; ++half) exponent[half] = numbers.exponent[side.row(half)], run[half] = numbers.key_run[side.row(half)];
#pragma unroll
    for (int n = 0; n < kStep / 8; ++n) {
      const int column = kStep * half_tile + 8 * n + 2 * side.place, query = kKeys * tile + column;
      const float4 of[2] = {numbers.of_query[query], numbers.of_query[query + 1]};
      float2 exponents = {};
      int2 runs = {};
      if constexpr (MIXED) exponents = *reinterpret_cast<const float2 *>(numbers.exponent + query), runs = *reinterpret_cast<const int2 *>(numbers.query_run + query);
      float x[4], y[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int half = i / 2;
        const float4 &c = of[i % 2];
        const float t = side.s[0][n][i] * unit[half], linear = fmaf(c.z, t, c.y), change = side.d[0][n][i] + c.w;
        float weight = fmaf(linear, t, c.x), slope = fmaf(c.z, t, linear);
        bool seen = !diagonal || column + i % 2 >= first + 8 * half;
        if constexpr (MIXED) {
          const float gate = exp2_fast(fminf((i % 2 ? exponents.y : exponents.x) - exponent[half], 0.f));
          weight *= gate, slope *= gate, seen = seen && run[half] > 0 && run[half] == (i % 2 ? runs.y : runs.x);
        }
        weight = seen ? weight : 0.f, slope = seen ? slope : 0.f;
        if constexpr (GATED) decay_sums[half] = fmaf(weight, change, decay_sums[half]);
        x[i] = change * slope, y[i] = weight;
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        slopes[n / 2][n % 2 * 2 + half] = E::pack(x[2 * half], x[2 * half + 1]);
        weights[n / 2][n % 2 * 2 + half] = E::pack(y[2 * half], y[2 * half + 1]);
      }
    }
  }

  __device__ __forceinline__ void store(const Running &args, const RunPlace<PASS> &at, unsigned char *tile, const ChunkNumbers &numbers, int64_t begin) {
    const Gradients &g = args.of;
    if (GATED && !numbers.mixed) take_own(numbers);
    const int rows = at.count_of(begin);
    if (GATED && g.column_sums) {
      float *const column_sums = g.column_sums + (static_cast<int64_t>(at.batch) * at.p.key_heads + at.key_head) * at.p.length + begin;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float sum = over_place(decay_sums[half]);
        if (side.place == 0 && side.row(half) < rows) column_sums[side.row(half)] = sum;
        reach[half] *= numbers.mixed ? 1.f : numbers.own[side.row(half)];
      }
      store_reach(args.flow.columns + (at.key_pair() * args.chunks + begin / kRunTokens) * kWarps, reach, side);
    }
    const Blocks<kRunKeys> key_blocks(shared_address(tile), lane_down<kRunKeys>(side.lane));
    const Blocks<kRunValues> value_blocks(shared_address(tile) + S::X, lane_down<kRunValues>(side.lane));
    const uint32_t stripe = Tile<kRunKeys>::rows_at(side.warp);
    if (at.p.normalize_qk) project<T, 1>(key_sums, key_blocks, stripe, unit);
    T *const keys = head_of<T>(g.grad_key, at.batch, at.key_head) + begin * g.grad_key.token_stride;
    T *const values = head_of<T>(g.grad_value, at.batch, at.key_head) + begin * g.grad_value.token_stride;
    store_rows<T, kRunKeys>(g.grad_key, keys, tile, key_blocks, stripe, key_sums, unit[0], unit[1], rows, side.warp, side.lane, at.p.head_dim / 8);
    store_rows<T, kRunValues>(g.grad_value, values, tile + S::X, value_blocks, Tile<kRunValues>::rows_at(side.warp), value_sums, 1.f, 1.f, rows, side.warp, side.lane);
  }
};

template <bool GATED> __global__ void __launch_bounds__(kRunThreads, 1) running_rows_kernel(const __grid_constant__ Running args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr Pass PASS = Pass::ROWS;
  using S = RunShape<PASS>;
  extern __shared__ __align__(1024) unsigned char shared[];
  const RunPlace<PASS> at(args, args.of.problem.query_heads);
  const int thread = threadIdx.x;
  if (thread >= kReaders) {
    take_registers<kKeeperRegisters>();
    keep_state<PASS>(args, at, shared);
    return;
  }
  give_registers<kReaderRegisters>();
  const uint32_t base = shared_address(shared);
  ChunkNumbers *const numbers = reinterpret_cast<ChunkNumbers *>(shared + S::NUMBERS_AT);
  const StateMargins *const margins = reinterpret_cast<const StateMargins *>(shared + S::MARGINS_AT);
  const Coefficients f(at.p, at.head);
  NumbersOnWay<PASS, 1> on_way;
  RunningRows<GATED> work;
  const auto bring = [&](int step) {
    fetch_step<PASS>(args, at, base, step, thread);
    on_way.load(args, at, step, thread);
  };
  const auto write_down = [&](int step) { on_way.store(numbers[step % 2], shared + S::FEATURES_AT + step % 2 * FeatureTiles<PASS>::BYTES, at, step, thread); };
  bring(0), write_down(0);
#pragma unroll 1
  for (int step = 0; step < at.chunks; ++step) {
    copy_wait<0>();
    warpgroup_publish();
    __syncthreads();
    const ChunkNumbers &here = numbers[step % 2];
    const uint32_t own = S::OWN_AT + step % 2 * S::OWN;
    const int64_t begin = at.begin_of(step);
    if (step + 1 < at.chunks) bring(step + 1);
    work.start(args, at, f, base + own, base + step % 2 * S::STATE, step > 0 || at.has_start, margins[step % 2], here, begin);
    for (int tile = 0; tile <= work.side.warp / 4; ++tile) work.add_tile(base + S::OTHERS_AT + step % 2 * S::OTHERS, here, tile);
    work.store(args, at, f, shared + own, here, begin);
    if (step + 1 < at.chunks) write_down(step + 1);
  }
  float *const totals = reinterpret_cast<float *>(shared + S::TOTALS_AT);
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    float sum = work.totals[i];
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (work.side.lane == 0) totals[3 * work.side.warp + i] = sum;
  }
  barrier_sync<kReaders>(kTotalsWritten);  // the keepers are gone
  if (thread < 3) {
    float sum = 0.f;
    for (int w = 0; w < kWarps; ++w) sum += totals[3 * w + thread];
    args.of.partials[((static_cast<int64_t>(at.batch) * at.p.query_heads + at.head) * args.of.parts + at.segment) * 3 + thread] = sum;
  }
#endif
}

template <bool GATED> __global__ void __launch_bounds__(kRunThreads, 1) running_columns_kernel(const __grid_constant__ Running args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr Pass PASS = Pass::COLUMNS;
  using S = RunShape<PASS>;
  extern __shared__ __align__(1024) unsigned char shared[];
  const RunPlace<PASS> at(args, args.of.problem.key_heads);
  const int thread = threadIdx.x;
  if (thread >= kReaders) {
    take_registers<kKeeperRegisters>();
    keep_state<PASS>(args, at, shared);
    return;
  }
  give_registers<kReaderRegisters>();
  const uint32_t base = shared_address(shared);
  ChunkNumbers *const numbers = reinterpret_cast<ChunkNumbers *>(shared + S::NUMBERS_AT);
  const StateMargins *const margins = reinterpret_cast<const StateMargins *>(shared + S::MARGINS_AT);
  NumbersOnWay<PASS, 1> on_way;
  RunningColumns<GATED> work;
  const auto bring = [&](int step) {
    fetch_step<PASS>(args, at, base, step, thread);
    on_way.load(args, at, step, thread);
  };
  const auto write_down = [&](int step) { on_way.store(numbers[step % 2], shared + S::FEATURES_AT + step % 2 * FeatureTiles<PASS>::BYTES, at, step, thread); };
  bring(0), write_down(0);
  const int steps = at.steps();
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    copy_wait<0>();
    warpgroup_publish();
    __syncthreads();
    const ChunkNumbers &here = numbers[step % 2];
    const int chunk = step / at.heads, head = step % at.heads;
    const uint32_t own = S::OWN_AT + chunk % 2 * S::OWN;
    const int64_t begin = at.begin_of(step);
    if (step + 1 < steps) bring(step + 1);
    if (head == 0) work.start(args, at, base + own, base + chunk % 2 * S::STATE, chunk > 0 || at.has_start, margins[chunk % 2], here, begin);
    for (int tile = work.side.warp / 4; tile < kRunTokens / kKeys; ++tile) work.add_tile(base + S::OTHERS_AT + step % 2 * S::OTHERS, here, tile);
    if (head == at.heads - 1) work.store(args, at, shared + own, here, begin);
    if (step + 1 < steps) write_down(step + 1);
  }
#endif
}

}  // namespace linattn_pairs
