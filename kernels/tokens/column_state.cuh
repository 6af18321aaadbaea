// Columns: the state, what the pairs weigh in it, and what the tokens bring to it.
#pragma once
#include "tokens/columns.cuh"

namespace linattn {
namespace {

template <int DIM, int STEPS> __device__ __forceinline__ void Columns<DIM, STEPS>::send_for_state() const {
  if (args.before)
    for_all_slots(
        args.before + state, [](float *slot, const float *x) { linattn_tile::copy_async(linattn_tile::shared_address(slot), x, true); },
        [](float *slot, const float *x) { linattn_tile::copy_number_async(linattn_tile::shared_address(slot), x, true); });
  else
#pragma unroll 1
    for (int i = thread; i < STATE; i += THREADS) rows[i] = 0.f;
}

// The sums of weights, by one warp a tile; the state's last column is their right factor, three parts of a number in three of eight columns.
template <int DIM, int STEPS> __device__ __forceinline__ void Columns<DIM, STEPS>::weigh_state() const {
  if (warp >= tiles) return;
  uint32_t right[SLICES][2];
#pragma unroll
  for (int slice = 0; slice < SLICES; ++slice)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float *const own = rows + (16 * slice + 8 * i + 2 * place) * WIDTH + DIM;
      right[slice][i] = part_of(own[0], own[WIDTH]);
    }
#pragma unroll 1
  for (int tile = warp; tile < tiles; tile += WARPS) {
    float sums[4] = {};
#pragma unroll
    for (int slice = 0; slice < SLICES; ++slice) {
      uint32_t left[4];
      load_queries(left, tile, slice);
      linattn_tile::mma_bf16(sums, left, right[slice][0], right[slice][1]);
    }
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      float sum = sums[2 * side] + sums[2 * side + 1];
#pragma unroll
      for (int step = 1; step <= 2; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
      const int pair = 16 * tile + group + 8 * side;
      if (place == 0 && pair < pairs) note_mass(pair, fmaf(sum, fixed.of_state[pair], fmaf(fixed.of_one[pair], rows[DIM * WIDTH + DIM], fixed.token_masses[pair])));
    }
  }
}

template <int DIM, int STEPS> __device__ __forceinline__ void Columns<DIM, STEPS>::note_mass(int pair, float mass) const {
  const int head = head_of(pair), token = pair - head * tokens;
  const float total = sees(p, at.batch, token) ? mass : 0.f;
  fixed.inverses[pair] = total == 0.f ? 0.f : 1.f / total;
  if (args.mass) args.mass[(static_cast<int64_t>(at.batch) * p.query_heads + first_query + head) * tokens + token] = total;
}

// This warp's columns, as right factors and with what the tokens bring.
template <int DIM, int STEPS> __device__ __forceinline__ void Columns<DIM, STEPS>::take_in() {
  const float carry = fixed.carried[MOST_TOKENS];
  float left[STEPS][4];
#pragma unroll
  for (int eight = 0; eight < 2; ++eight)
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      const uint16_t *const first = value_of(token_of(place, step, 0)) + column_of(eight, group);
      value[eight][step] = first[0] | static_cast<uint32_t>(first[PITCH / 2]) << 16;
      left[step][eight] = number(value[eight][step]), left[step][2 + eight] = upper(value[eight][step]);
    }
#pragma unroll
  for (int eight = 0; eight < 2; ++eight)
#pragma unroll
    for (int i = 0; i < 2; ++i) one[eight][i] = rows[DIM * WIDTH + column_of(eight, 2 * place + i)];
#pragma unroll
  for (int of_rows = 0; of_rows < DIM / 8; ++of_rows) {
    float *const own = rows + (8 * of_rows + 2 * place) * WIDTH + column_of(0, group);
    float x[2][2], sums[4] = {};
#pragma unroll
    for (int row = 0; row < 2; ++row)
#pragma unroll
      for (int eight = 0; eight < 2; ++eight) x[row][eight] = own[row * WIDTH + 2 * eight];
#pragma unroll
    for (int eight = 0; eight < 2; ++eight) split(x[0][eight], x[1][eight], high[of_rows / 2][eight][of_rows % 2], low[of_rows / 2][eight][of_rows % 2]);
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      const float4 keys = *brought(of_rows, step);
      const float of_low[2] = {keys.z, keys.w}, of_high[2] = {keys.x, keys.y};
      mma_tf32(sums, left[step], of_low), mma_tf32(sums, left[step], of_high);
    }
#pragma unroll
    for (int row = 0; row < 2; ++row)
#pragma unroll
      for (int eight = 0; eight < 2; ++eight) own[row * WIDTH + 2 * eight] = fmaf(x[row][eight], carry, sums[2 * eight + row]);
  }
}

// The last column and the last row take the tokens in, a thread a number.
template <int DIM, int STEPS> __device__ __forceinline__ void Columns<DIM, STEPS>::take_in_ones() const {
  const float carry = fixed.carried[MOST_TOKENS];
#pragma unroll 1
  for (int i = thread; i < 2 * DIM + 1; i += THREADS) {
    const bool is_row = i >= DIM;
    float &to = is_row ? rows[DIM * WIDTH + i - DIM] : rows[i * WIDTH + DIM];
    float sum = to * carry;
#pragma unroll 4
    for (int token = 0; token < tokens; ++token) {
      const float x = i == 2 * DIM ? 1.f : number(is_row ? value_of(token)[i - DIM] : key(token)[i]);
      sum = fmaf(is_row ? fixed.left[MOST_TOKENS][token] : fixed.weighed[token], x, sum);
    }
    to = sum;
  }
}

template <int DIM, int STEPS> __device__ __forceinline__ void Columns<DIM, STEPS>::write_state() const {
  if (args.after)
    for_all_slots(
        args.after + state, [](float *slot, float *x) { *reinterpret_cast<float4 *>(x) = *reinterpret_cast<const float4 *>(slot); }, [](float *slot, float *x) { *x = *slot; });
}

}  // namespace
}  // namespace linattn
