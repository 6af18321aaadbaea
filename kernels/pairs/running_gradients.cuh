// The gradients in one pass each: queries forward in the sequence, keys and values backward. What a token's pairs are made into, and the signs, are those of
// group_rows.cuh and group_columns.cuh.
#pragma once
#include "pairs/running_side.cuh"
#include "pairs/running_state.cuh"

namespace linattn_pairs {

// What both have in common: a warp's 16 tokens, and their products with a tile of 64 others, in two halves.
template <Pass PASS> struct RunningSide : StateSide {
  using S = RunShape<PASS>;
  static constexpr int HALVES = kKeys / kStep;
  uint32_t y[kRunValues / 16][4];  // the tokens' values, or gradients

  __device__ __forceinline__ void load_values(uint32_t own) {
    const Blocks<kRunValues> blocks(own + S::X, lane_down<kRunValues>(lane));
#pragma unroll
    for (int n = 0; n < kRunValues / 16; ++n) ldmatrix(y[n], blocks.at(0, n) + Tile<kRunValues>::rows_at(stripe));
  }
  static __device__ __forceinline__ uint32_t keys_at(uint32_t others, int tile, int half) { return others + Tile<kRunKeys>::rows_at(kKeys / 16 * tile + kStep / 16 * half); }
  static __device__ __forceinline__ uint32_t values_at(uint32_t others, int tile, int half) {
    return others + S::X + Tile<kRunValues>::rows_at(kKeys / 16 * tile + kStep / 16 * half);
  }
  // s = x . x, d = y . y of half a tile of others.
  __device__ __forceinline__ void multiply(float (&s)[kStep / 8][4], float (&d)[kStep / 8][4], uint32_t others, int tile, int half) const {
    warpgroup_overwrites(s), warpgroup_overwrites(d);
    warpgroup_begin();
    WarpgroupProduct<T, kStep, false>::run(s, x, operand_in<kRunKeys>(keys_at(others, tile, half), 0), false);
#pragma unroll
    for (int n = 0; n < kRunValues / 16; ++n)
      WarpgroupProduct<T, kStep, false>::run(d, y[n], operand_in<kRunValues>(values_at(others, tile, half), Tile<kRunValues>::columns_at(2 * n)), n > 0);
    warpgroup_commit();
  }
  template <int D> static __device__ __forceinline__ void add(float (&sums)[D / 8][4], const uint32_t (&weights)[kStep / 16][4], uint32_t tile) {
#pragma unroll
    for (int block = 0; block < kStep / 16; ++block) WarpgroupProduct<T, D, true>::run(sums, weights[block], operand_in<D, true>(tile, Tile<D>::rows_at(block)), true);
  }
};

// A warp's sum.
__device__ __forceinline__ void store_reach(float *warps, const float (&reach)[2], const StateSide &side) {
  float sum = reach[0] + reach[1];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  if (side.lane == 0) warps[side.stripe] = sum;
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
    side.load(own), side.load_values(own), side.measure(unit, at.p);
    row_products<T>(error[0], error[1], side.y, Blocks<kRunValues>(own + S::OTHERS, lane_across<kRunValues>(side.lane)), Tile<kRunValues>::rows_at(side.stripe), side.lane);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float4 of = numbers.of_query[side.row(half)];
      const float change = of.y - error[half] * of.x;
      float *const kept = g.query_numbers + (static_cast<int64_t>(at.batch) * at.p.query_heads + at.head) * kNumbers * g.padded + begin + side.row(half);
      if (side.place == 0) kept[0] = of.x, kept[g.padded] = change;  // for columns
      share[half] = share_of(of.x, change), error[half] = share[half] == 0.f ? 0.f : change / share[half];
      beta[half] = f.beta * unit[half], twice_gamma[half] = 2.f * f.gamma * unit[half] * unit[half];
      sums[0][half] = sums[1][half] = sums[2][half] = reach[half] = 0.f;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) acc[i / 4][i % 4] = 0.f;
    if (!has_state) return;
    float pairs[2][4], lines[4][4], products[2][4];
    side.multiply_values(pairs, lines, side.y, state);
    side.multiply_masses(products, margins);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float along_values = __shfl_sync(0xffffffffu, lines[2][2 * half] + lines[2][2 * half + 1], side.lane & 28);
      const float change = error[half] + along_values * margins.inverse_count();  // of a value that is the mean
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
    const bool diagonal = tile == side.stripe / 4;
    float s[2][kStep / 8][4], d[2][kStep / 8][4];
    side.multiply(s[0], d[0], others, tile, 0), side.multiply(s[1], d[1], others, tile, 1);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      warpgroup_wait<1>();
      warpgroup_keep(s[half]), warpgroup_keep(d[half]);
      if (GATED && numbers.mixed) weigh<true>(s[half], d[half], half, numbers, tile, diagonal);
      else weigh<false>(s[half], d[half], half, numbers, tile, diagonal);
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
  template <bool MIXED> __device__ __forceinline__ void weigh(const float (&s)[kStep / 8][4], const float (&d)[kStep / 8][4], int half_tile, const ChunkNumbers &numbers, int tile,
                                                              bool diagonal) {
    const RowGates<MIXED, false> own(side, numbers);
#pragma unroll
    for (int block = 0; block < kStep / 16; ++block) {
      const int place = kStep / 16 * half_tile + block;  // of the tile's blocks
      if (diagonal && place > side.stripe % 4) {         // no query of the warp sees one of these
#pragma unroll
        for (int i = 0; i < 4; ++i) weights[half_tile][block][i] = 0u;
        continue;
      }
      float change[2][4];
      float2 units[2];
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const int key = kKeys * tile + 16 * place + 8 * t + 2 * side.place;
        float2 factors = make_float2(1.f, 1.f), exponents = {};
        int2 runs = {};
        units[t] = *reinterpret_cast<const float2 *>(numbers.unit + key);
        if constexpr (GATED && !MIXED) factors = *reinterpret_cast<const float2 *>(numbers.factor + key);
        if constexpr (MIXED) exponents = *reinterpret_cast<const float2 *>(numbers.exponent + key), runs = *reinterpret_cast<const int2 *>(numbers.key_run + key);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int half = i / 2;
          change[t][i] = d[2 * block + t][i] + error[half];
          if constexpr (MIXED) {
            change[t][i] *= own.of(half, i % 2, exponents, runs);
          } else if constexpr (GATED) {
            change[t][i] *= i % 2 ? factors.y : factors.x;
          }
        }
      }
      if (diagonal && place == side.stripe % 4)
#pragma unroll
        for (int i = 0; i < 8; ++i)
          if (!side.sees(i / 4, i % 4)) change[i / 4][i % 4] = 0.f;
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        float weight[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int half = i / 2;
          const float unit = i % 2 ? units[t].y : units[t].x, x = s[2 * block + t][i] * unit, product = change[t][i] * x;
          sums[0][half] += change[t][i], sums[1][half] += product, sums[2][half] = fmaf(product, x, sums[2][half]);
          weight[i] = change[t][i] * unit * fmaf(twice_gamma[half], x, beta[half]);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) weights[half_tile][block][2 * t + half] = E::pack(weight[2 * half], weight[2 * half + 1]);
      }
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
    const uint32_t stripe = Tile<kRunKeys>::rows_at(side.stripe);
    if (at.p.normalize_qk) project<T, 1>(acc, blocks, stripe, unit);
    T *const results = head_of<T>(g.grad_query, at.batch, at.head) + begin * g.grad_query.token_stride;
    store_rows<T, kRunKeys>(g.grad_query, results, tile, blocks, stripe, acc, 1.f, 1.f, rows, side.stripe, side.lane, at.p.head_dim / 8);
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

  __device__ __forceinline__ void start(const linattn_problem &p, uint32_t own, uint32_t state, bool has_state, const StateMargins &margins, const ChunkNumbers &numbers) {
    side.load(own), side.load_values(own), side.measure(unit, p);
#pragma unroll
    for (int half = 0; half < 2; ++half) decay_sums[half] = reach[half] = 0.f;
    if (!has_state) {
#pragma unroll
      for (int i = 0; i < kRunValues / 2; ++i) value_sums[i / 4][i % 4] = 0.f;
#pragma unroll
      for (int i = 0; i < 8; ++i) key_sums[i / 4][i % 4] = 0.f;
      return;
    }
    float pairs[2][4], lines[4][4], products[2][4];
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
          (side.place == 0 ? lines[2][2 * half] + lines[2][2 * half + 1] + margins.count : 0.f) + unit[half] * (side.along(lines, half) + unit[half] * side.along(pairs, half));
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
    side.load_values(own);  // again: registers were short meanwhile
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
    const bool diagonal = tile == side.stripe / 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float s[kStep / 8][4], d[kStep / 8][4];
      side.multiply(s, d, others, tile, half);
      warpgroup_wait<0>();
      warpgroup_keep(s), warpgroup_keep(d);
      if (GATED && numbers.mixed) weigh<true>(s, d, half, numbers, tile, diagonal);
      else weigh<false>(s, d, half, numbers, tile, diagonal);
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
  template <bool MIXED> __device__ __forceinline__ void weigh(const float (&s)[kStep / 8][4], const float (&d)[kStep / 8][4], int half_tile, const ChunkNumbers &numbers, int tile,
                                                              bool diagonal) {
    const RowGates<MIXED, true> own(side, numbers);
#pragma unroll
    for (int block = 0; block < kStep / 16; ++block) {
      const int place = kStep / 16 * half_tile + block;  // of the tile's blocks
      if (diagonal && place < side.stripe % 4) {         // none of these sees a key of the warp
#pragma unroll
        for (int i = 0; i < 4; ++i) weights[block][i] = slopes[block][i] = 0u;
        continue;
      }
      float weight[2][4], slope[2][4], change[2][4];
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const int query = kKeys * tile + 16 * place + 8 * t + 2 * side.place;
        const float4 of[2] = {numbers.of_query[query], numbers.of_query[query + 1]};
        float2 exponents = {};
        int2 runs = {};
        if constexpr (MIXED) exponents = *reinterpret_cast<const float2 *>(numbers.exponent + query), runs = *reinterpret_cast<const int2 *>(numbers.query_run + query);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int half = i / 2;
          const float4 &c = of[i % 2];
          const float x = s[2 * block + t][i] * unit[half], linear = fmaf(c.z, x, c.y);
          change[t][i] = d[2 * block + t][i] + c.w, weight[t][i] = fmaf(linear, x, c.x), slope[t][i] = fmaf(c.z, x, linear);
          if constexpr (MIXED) {
            const float gate = own.of(half, i % 2, exponents, runs);
            weight[t][i] *= gate, slope[t][i] *= gate;
          }
        }
      }
      if (diagonal && place == side.stripe % 4)
#pragma unroll
        for (int i = 0; i < 8; ++i)
          if (!side.is_seen(i / 4, i % 4)) weight[i / 4][i % 4] = slope[i / 4][i % 4] = 0.f;
#pragma unroll
      for (int t = 0; t < 2; ++t)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float (&x)[4] = weight[t], (&y)[4] = slope[t], (&c)[4] = change[t];
          const int i = 2 * half;
          if constexpr (GATED) decay_sums[half] = fmaf(x[i + 1], c[i + 1], fmaf(x[i], c[i], decay_sums[half]));
          slopes[block][2 * t + half] = E::pack(c[i] * y[i], c[i + 1] * y[i + 1]), weights[block][2 * t + half] = E::pack(x[i], x[i + 1]);
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
    const uint32_t stripe = Tile<kRunKeys>::rows_at(side.stripe);
    if (at.p.normalize_qk) project<T, 1>(key_sums, key_blocks, stripe, unit);
    T *const keys = head_of<T>(g.grad_key, at.batch, at.key_head) + begin * g.grad_key.token_stride;
    T *const values = head_of<T>(g.grad_value, at.batch, at.key_head) + begin * g.grad_value.token_stride;
    store_rows<T, kRunKeys>(g.grad_key, keys, tile, key_blocks, stripe, key_sums, unit[0], unit[1], rows, side.stripe, side.lane, at.p.head_dim / 8);
    store_rows<T, kRunValues>(g.grad_value, values, tile + S::X, value_blocks, Tile<kRunValues>::rows_at(side.stripe), value_sums, 1.f, 1.f, rows, side.stripe, side.lane);
  }
};

template <bool GATED> __global__ void __launch_bounds__(kRunThreads, 1) running_rows_kernel(const __grid_constant__ Running args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr Pass PASS = Pass::ROWS;
  using S = RunShape<PASS>;
  extern __shared__ __align__(1024) unsigned char shared[];
  const RunPlace<PASS> at(args, args.of.problem.query_heads);
  if (helps_readers(args, at, shared)) return;
  const uint32_t base = shared_address(shared);
  const ChunkNumbers *const numbers = reinterpret_cast<const ChunkNumbers *>(shared + S::NUMBERS_AT);
  const StateMargins *const margins = reinterpret_cast<const StateMargins *>(shared + S::MARGINS_AT);
  const Coefficients f(at.p, at.head);
  RunningRows<GATED> work;
#pragma unroll 1
  for (int step = 0; step < at.chunks; ++step) {
    await_step(step);
    const ChunkNumbers &here = numbers[step % 2];
    work.side.take_stripe(step);
    const uint32_t own = S::OWN_AT + step % 2 * S::OWN;
    const int64_t begin = at.begin_of(step);
    work.start(args, at, f, base + own, base + step % 2 * S::STATE, step > 0 || at.has_start, margins[step % 2], here, begin);
    for (int tile = 0; tile <= work.side.stripe / 4; ++tile) work.add_tile(base + S::OTHERS_AT + step % 2 * S::OTHERS, here, tile);
    work.side.take_stripe_again(step);
    work.store(args, at, f, shared + own, here, begin);
    leave_chunk(step, at.chunks), leave_state(step, at.chunks);
  }
  float *const totals = reinterpret_cast<float *>(shared + S::TOTALS_AT);
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    float sum = work.totals[i];
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (work.side.lane == 0) totals[3 * work.side.stripe + i] = sum;
  }
  barrier_sync<kReaders>(kTotalsWritten);  // the keepers are gone
  if (threadIdx.x < 3) {
    float sum = 0.f;
    for (int w = 0; w < kWarps; ++w) sum += totals[3 * w + threadIdx.x];
    args.of.partials[((static_cast<int64_t>(at.batch) * at.p.query_heads + at.head) * args.of.parts + at.segment) * 3 + threadIdx.x] = sum;
  }
#endif
}

template <bool GATED> __global__ void __launch_bounds__(kRunThreads, 1) running_columns_kernel(const __grid_constant__ Running args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr Pass PASS = Pass::COLUMNS;
  using S = RunShape<PASS>;
  extern __shared__ __align__(1024) unsigned char shared[];
  const RunPlace<PASS> at(args, args.of.problem.key_heads);
  if (helps_readers(args, at, shared)) return;
  const uint32_t base = shared_address(shared);
  const ChunkNumbers *const numbers = reinterpret_cast<const ChunkNumbers *>(shared + S::NUMBERS_AT);
  const StateMargins *const margins = reinterpret_cast<const StateMargins *>(shared + S::MARGINS_AT);
  RunningColumns<GATED> work;
  const int steps = at.steps();
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    await_step(step);
    const ChunkNumbers &here = numbers[step % 2];
    const int chunk = step / at.heads, head = step % at.heads;
    work.side.take_stripe(chunk);
    const uint32_t own = S::OWN_AT + chunk % 2 * S::OWN;
    const int64_t begin = at.begin_of(step);
    if (head == 0) work.start(at.p, base + own, base + chunk % 2 * S::STATE, chunk > 0 || at.has_start, margins[chunk % 2], here);
    for (int tile = work.side.stripe / 4; tile < kRunTokens / kKeys; ++tile) work.add_tile(base + S::OTHERS_AT + step % 2 * S::OTHERS, here, tile);
    if (head == at.heads - 1) work.store(args, at, shared + own, here, begin);
    leave_chunk(step, steps), leave_state(step, steps);
  }
#endif
}

}  // namespace linattn_pairs
