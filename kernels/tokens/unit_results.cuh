// Units: the tokens' own values, and warps' sums, added up and divided.
#pragma once
#include "tokens/units.cuh"

namespace linattn {
namespace {

template <int DIM, int DEGREE, int TILES, int STEPS> __device__ __forceinline__ void Units<DIM, DEGREE, TILES, STEPS>::take_in_one() const {
  if (at.split > 0 || !args.after) return;
  for (int i = thread; i < WIDTH; i += THREADS) {
    float x = fixed.one[i] * fixed.carried[MOST_TOKENS];
#pragma unroll 1
    for (int token = 0; token < tokens; ++token) x = fmaf(fixed.left[MOST_TOKENS][token], i < DIM ? shared[VALUES + value_at(token, i)] : 1.f, x);
    args.after[state + DIM * WIDTH + i] = x;
  }
}

// Times the values.
template <int DIM, int DEGREE, int TILES, int STEPS> __device__ __forceinline__ void Units<DIM, DEGREE, TILES, STEPS>::read_tokens() {
  begin_part();
#pragma unroll
  for (int t = 0; t < TILES; ++t)
    if (weighs(t)) {
      const uint4 first = weights_of(t)[0], second = weights_of(t)[1];
      const Fragment high = {first.x, first.y, first.z, first.w}, low = {second.x, second.y, second.z, second.w};
#pragma unroll
      for (int two = 0; two < EIGHTS / 2; ++two) {
        uint32_t right[2][2] = {};
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
          const float4 value = values(step, two);
          right[0][step] = linattn_tile::upper_halves(__float_as_uint(value.x), __float_as_uint(value.z));
          right[1][step] = linattn_tile::upper_halves(__float_as_uint(value.y), __float_as_uint(value.w));
        }
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          linattn_tile::mma_bf16(sums[t][2 * two + side], low, right[side][0], right[side][1]);
          linattn_tile::mma_bf16(sums[t][2 * two + side], high, right[side][0], right[side][1]);
        }
      }
    }
}

template <int DIM, int DEGREE, int TILES, int STEPS> __device__ __forceinline__ void Units<DIM, DEGREE, TILES, STEPS>::leave_masses() {
#pragma unroll
  for (int t = 0; t < TOGETHER; ++t)
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      float sum = mass[t][2 * side] + mass[t][2 * side + 1];
#pragma unroll
      for (int step = 1; step <= 2; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
      if (place == 0) fixed.masses[run][16 * (TOGETHER * columns + t) + group + 8 * side] = sum;
    }
}

// The sums of all warps, added up in a fixed order and divided; or left to the second kernel.
template <int DIM, int DEGREE, int TILES, int STEPS> __device__ __forceinline__ void Units<DIM, DEGREE, TILES, STEPS>::finish() {
  begin_part();
  leave_masses();
  __syncthreads();
  float *const to = shared + (16 * TILES * run + group) * PITCH;
#pragma unroll
  for (int t = 0; t < TILES; ++t)
#pragma unroll
    for (int c = 0; c < EIGHTS; ++c)
#pragma unroll
      for (int side = 0; side < 2; ++side)
        *reinterpret_cast<float2 *>(to + (16 * t + 8 * side) * PITCH + column_of(columns * EIGHTS + c, 2 * place)) = make_float2(sums[t][c][2 * side], sums[t][c][2 * side + 1]);
  __syncthreads();
#pragma unroll 1
  for (int i = thread; i < pairs * (DIM / 8); i += THREADS) write(i / (DIM / 8), i % (DIM / 8) * 8);
}

template <int DIM, int DEGREE, int TILES, int STEPS> __device__ __forceinline__ void Units<DIM, DEGREE, TILES, STEPS>::write(int pair, int column) const {
  const int head = head_of(pair), token = pair - head * tokens, query_head = first_query + head;
  const int64_t row = (static_cast<int64_t>(at.batch) * p.query_heads + query_head) * tokens + token;
  const float of_one = at.split > 0 ? 0.f : scale_of_pair(pair, 0);
  float sum[8], total = at.split > 0 ? 0.f : fmaf(of_one, fixed.one[DIM], fixed.token_masses[pair]);
#pragma unroll
  for (int i = 0; i < 8; ++i) sum[i] = at.split > 0 ? 0.f : of_one * fixed.one[column + i];
#pragma unroll
  for (int other = 0; other < RUNS; ++other) {
    total += fixed.masses[other][pair];
    const float4 *const from = reinterpret_cast<const float4 *>(shared + (16 * TILES * other + pair) * PITCH + column);
    const float4 x = from[0], y = from[1];
    sum[0] += x.x, sum[1] += x.y, sum[2] += x.z, sum[3] += x.w, sum[4] += y.x, sum[5] += y.y, sum[6] += y.z, sum[7] += y.w;
  }
  if (args.splits > 1) {
    float *const part = args.partials + (row * args.splits + at.split) * WIDTH;
#pragma unroll
    for (int i = 0; i < 8; ++i) part[column + i] = sum[i];
    if (column == 0) part[DIM] = total;
    return;
  }
  if (!sees(p, at.batch, token)) total = 0.f;
  const float inverse = total == 0.f ? 0.f : 1.f / total;
  uint32_t bits[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) bits[i] = total == 0.f ? 0u : linattn_tile::pack_bf16(sum[2 * i] * inverse, sum[2 * i + 1] * inverse);
  *reinterpret_cast<uint4 *>(static_cast<uint16_t *>(args.out.data) + offset_of(args.out, at.batch, query_head, token) + column) = make_uint4(bits[0], bits[1], bits[2], bits[3]);
  if (column == 0 && args.mass) args.mass[row] = total;
}

}  // namespace
}  // namespace linattn
