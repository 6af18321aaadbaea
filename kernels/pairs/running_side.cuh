// What the warpgroups that read have in common: a warp's 16 tokens of the chunk, and their products with the state.
#pragma once
#include "pairs/running.cuh"

namespace linattn_pairs {

// Both numbers of a word, each twice.
__device__ __forceinline__ uint32_t first_twice(uint32_t two) { return (two & 0xffffu) | two << 16; }
__device__ __forceinline__ uint32_t second_twice(uint32_t two) { return (two >> 16) | (two & 0xffff0000u); }

// A warp's 16 tokens of the chunk, and what it does with the state.
struct StateSide {
  using T = __nv_bfloat16;
  using E = Element<T>;
  int lane, group, place, stripe;  // stripe: of 16 tokens
  uint32_t x[4], words[8][2];  // the tokens' numbers; of the lane's two rows all of them, two a word

  __device__ __forceinline__ StateSide() { find(threadIdx.x); }
  __device__ __forceinline__ void find(int thread) { lane = thread & 31, group = lane >> 2, place = lane & 3; }
  // The warpgroups take the chunk's halves in turn, for the one has more pairs than the other; and of the second half the last stripes first, so that warps that share a
  // scheduler have as many together as others.
  __device__ __forceinline__ void take_stripe(int chunk) {
    const int warp = warp_number();
    stripe = (warp / 4 + chunk) % 2 == 0 ? warp % 4 : 7 - warp % 4;
  }
  // Before results are stored, for registers are short until then.
  __device__ __forceinline__ void take_stripe_again(int chunk) { find(remade(threadIdx.x)), take_stripe(chunk); }
  __device__ __forceinline__ int row(int half) const { return 16 * stripe + 8 * half + group; }
  // Of the block on the diagonal, whether number `i` of a fragment's columns 8 t is at the lane's own row or before.
  __device__ __forceinline__ bool sees(int t, int i) const { return 8 * t + 2 * place + i % 2 <= group + i / 2 * 8; }
  __device__ __forceinline__ bool is_seen(int t, int i) const { return 8 * t + 2 * place + i % 2 >= group + i / 2 * 8; }
  __device__ __forceinline__ void load(uint32_t tile) {
    ldmatrix(x, tile + Tile<kRunKeys>::rows_at(stripe) + lane_down<kRunKeys>(lane));
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) words[i][half] = __shfl_sync(0xffffffffu, x[half + i / 4 * 2], (lane & 28) + i % 4);
  }

  // 1 / |x| of the lane's rows.
  __device__ __forceinline__ void measure(float (&unit)[2], const linattn_problem &p) const {
    const uint32_t all[1][4] = {{x[0], x[1], x[2], x[3]}};
    row_squares<T>(unit[0], unit[1], all, lane);
#pragma unroll
    for (int half = 0; half < 2; ++half) unit[half] = p.normalize_qk ? inverse_norm(unit[half]) : 1.f;
  }
  // Products of two a, 2 i and the one behind, and a block of b, `times` as many.
  __device__ __forceinline__ void features(uint32_t (&to)[4], int i, const uint32_t (&b)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) to[half] = multiply_two(b[half], first_twice(words[i][half])), to[2 + half] = multiply_two(b[half], second_twice(words[i][half]));
  }
  static __device__ __forceinline__ void multiply_item(float (&sums)[kRunValues / 8][4], const uint32_t (&of)[4], uint32_t state, int item, bool more) {
    WarpgroupProduct<T, kRunValues, true>::run(sums, of, operand_in<kRunValues, true>(state, Tile<kRunValues>::rows_at(item)), more);
  }
  // sums = the tokens' products with all rows x_a x_b. Pairs of two blocks stand for both their orders.
  __device__ __forceinline__ void add_pairs(float (&sums)[kRunValues / 8][4], uint32_t state) const {
    constexpr uint32_t kTwos = 0x40004000u;
    const uint32_t low[2] = {x[0], x[1]}, high[2] = {x[2], x[3]}, twice[2] = {multiply_two(x[2], kTwos), multiply_two(x[3], kTwos)};
    uint32_t of[2][4][4];
#pragma unroll
    for (int part = 0; part < 3; ++part) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int i = part == 2 ? 4 + j : 2 * part + j / 2;
        features(of[part % 2][j], i, part == 2 ? high : j % 2 ? twice : low);
      }
      warpgroup_keep(of[part % 2]);
      if (part > 0) warpgroup_wait<0>(), warpgroup_keep(sums);
      else warpgroup_overwrites(sums);
      warpgroup_begin();
#pragma unroll
      for (int j = 0; j < 4; ++j) multiply_item(sums, of[part % 2][j], state, part == 2 ? 2 * (4 + j) + 1 : 4 * part + j, part > 0 || j > 0);
      warpgroup_commit();
    }
    warpgroup_wait<0>();
    warpgroup_keep(sums);
  }
  // sums += the products with the rows x_a, times `factor`.
  __device__ __forceinline__ void add_lines(float (&sums)[kRunValues / 8][4], const float (&factor)[2], uint32_t state) const {
    uint32_t of[1][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) of[0][i] = E::pack(E::low(x[i]) * factor[i % 2], E::high(x[i]) * factor[i % 2]);
    warpgroup_keep(of), warpgroup_keep(sums);
    warpgroup_begin();
    multiply_item(sums, of[0], state, kRunItems, true);
    warpgroup_commit();
    warpgroup_wait<0>();
    warpgroup_keep(sums);
  }

  // x M of the masses, as two rounded parts.
  __device__ __forceinline__ void multiply_masses(float (&sums)[2][4], const StateMargins &margins) const {
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      uint32_t high[2], low[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float2 two = *reinterpret_cast<const float2 *>(&margins.masses[8 * t + group][8 * i + 2 * place]);
        high[i] = E::pack(two.x, two.y), low[i] = E::pack(two.x - E::low(high[i]), two.y - E::high(high[i]));
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[t][i] = 0.f;
      E::mma(sums[t], x, high[0], high[1]), E::mma(sums[t], x, low[0], low[1]);
    }
  }
  // A lane's part of x . y of its rows, y as sums have it.
  template <int TILES> __device__ __forceinline__ float along(const float (&y)[TILES][4], int half) const {
    float sum = 0.f;
#pragma unroll
    for (int t = 0; t < 2; ++t) sum += E::low(x[2 * t + half]) * y[t][2 * half] + E::high(x[2 * t + half]) * y[t][2 * half + 1];
    return sum;
  }
  __device__ __forceinline__ float2 line_of(const StateMargins &margins, int t) const { return *reinterpret_cast<const float2 *>(margins.lines + 8 * t + 2 * place); }

  // What the state makes of a token's values y: sums over b of (S_ab . y) x_b; S_a . y, and behind them in two parts the product with the sum of all values.
  __device__ __forceinline__ void multiply_values(float (&pairs)[2][4], float (&lines)[4][4], const uint32_t (&y)[kRunValues / 16][4], uint32_t state) const {
    float sums[2][4][4];  // of two a, and of the two behind them
    const auto multiply = [&](int i) {
      warpgroup_overwrites(sums[i % 2]);
      warpgroup_begin();
#pragma unroll
      for (int n = 0; n < kRunValues / 16; ++n)
        WarpgroupProduct<T, 32, false>::run(sums[i % 2], y[n], operand_in<kRunValues>(state, Tile<kRunValues>::rows_at(2 * i) + Tile<kRunValues>::columns_at(2 * n)), n > 0);
      warpgroup_commit();
    };
#pragma unroll
    for (int i = 0; i < 8; ++i) pairs[i / 4][i % 4] = 0.f;
    warpgroup_overwrites(lines);
    warpgroup_begin();
#pragma unroll
    for (int n = 0; n < kRunValues / 16; ++n)
      WarpgroupProduct<T, 32, false>::run(lines, y[n], operand_in<kRunValues>(state, Tile<kRunValues>::rows_at(kRunItems) + Tile<kRunValues>::columns_at(2 * n)), n > 0);
    warpgroup_commit();
    multiply(0);
#pragma unroll
    for (int i = 0; i < kRunKeys / 2; ++i) {
      if (i + 1 < kRunKeys / 2) {
        multiply(i + 1);
        warpgroup_wait<1>();
      } else {
        warpgroup_wait<0>();
      }
      warpgroup_keep(sums[i % 2]);
#pragma unroll
      for (int t = 0; t < 4; ++t)
#pragma unroll
        for (int j = 0; j < 4; ++j) pairs[t / 2][j] = fmaf(sums[i % 2][t][j], t % 2 ? E::high(words[i][j / 2]) : E::low(words[i][j / 2]), pairs[t / 2][j]);
    }
    warpgroup_keep(lines);
  }
};

// Where each pair has a gate of its own: what the lane's two rows bring. BACK: they are keys, and the others queries.
template <bool MIXED, bool BACK> struct RowGates {
  float exponent[2];
  int32_t run[2];
  __device__ __forceinline__ RowGates(const StateSide &side, const ChunkNumbers &numbers) {
    if constexpr (MIXED)
#pragma unroll
      for (int half = 0; half < 2; ++half) exponent[half] = numbers.exponent[side.row(half)], run[half] = (BACK ? numbers.key_run : numbers.query_run)[side.row(half)];
  }
  // With one of two others side by side.
  __device__ __forceinline__ float of(int half, bool second, float2 exponents, int2 runs) const {
    const float other = second ? exponents.y : exponents.x;
    const float gate = exp2_fast(fminf(BACK ? other - exponent[half] : exponent[half] - other, 0.f));
    return run[half] > 0 && run[half] == (second ? runs.y : runs.x) ? gate : 0.f;
  }
};

}  // namespace linattn_pairs
