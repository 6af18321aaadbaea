// Columns: what is fetched of the tokens, and what they say of each other.
#pragma once
#include "tokens/columns.cuh"

namespace linattn {
namespace {

template <int DIM, int STEPS> __device__ __forceinline__ void Columns<DIM, STEPS>::send_for_vectors() const {
  constexpr int PARTS = DIM / 8;
  const auto first_of = [&](const linattn_tensor &from, int head) { return static_cast<const uint16_t *>(from.data) + offset_of(from, at.batch, head, 0); };
  const uint16_t *const queries = first_of(p.query, first_query), *const keys = first_of(p.key, key_head), *const values = first_of(p.value, key_head);
  const int part = thread % PARTS * 8;
#pragma unroll 1
  for (int token = thread / PARTS; token < TOKENS; token += THREADS / PARTS) {
    const bool is_token = token < tokens && is_taken(p, at.batch, token);
    const int from = is_token ? token : 0;
    linattn_tile::copy_async(linattn_tile::shared_address(key(token) + part), keys + from * static_cast<int>(p.key.token_stride) + part, is_token);
    linattn_tile::copy_async(linattn_tile::shared_address(value_of(token) + part), values + from * static_cast<int>(p.value.token_stride) + part, is_token);
  }
#pragma unroll 1
  for (int pair = thread / PARTS; pair < 16 * tiles; pair += THREADS / PARTS) {
    const bool is_pair = pair < pairs;
    const int head = is_pair ? head_of(pair) : 0, token = is_pair ? pair - head * tokens : 0;
    const int from = head * static_cast<int>(p.query.head_stride) + token * static_cast<int>(p.query.token_stride) + part;
    linattn_tile::copy_async(linattn_tile::shared_address(query(pair) + 2 * part), queries + from, is_pair);
  }
}

// What makes vectors of unit length: four lanes have one.
template <int DIM, int STEPS> __device__ __forceinline__ void Columns<DIM, STEPS>::measure() const {
#pragma unroll 1
  for (int first = 8 * warp; first < 16 * tiles + TOKENS; first += 8 * WARPS) {
    const int vector = first + group, token = vector - 16 * tiles;
    const uint4 *const from = reinterpret_cast<const uint4 *>(token < 0 ? query(vector) : shared + lies.keys + token * PITCH) + place;
    float square = 0.f;
#pragma unroll
    for (int i = 0; i < DIM / 32; ++i) {
      const uint4 bits = from[4 * i];
      square = fmaf(number(bits.x), number(bits.x), fmaf(upper(bits.x), upper(bits.x), square)),
      square = fmaf(number(bits.y), number(bits.y), fmaf(upper(bits.y), upper(bits.y), square));
      square = fmaf(number(bits.z), number(bits.z), fmaf(upper(bits.z), upper(bits.z), square)),
      square = fmaf(number(bits.w), number(bits.w), fmaf(upper(bits.w), upper(bits.w), square));
    }
#pragma unroll
    for (int step = 1; step <= 2; step *= 2) square += __shfl_xor_sync(0xffffffffu, square, step);
    const float scale = !p.normalize_qk ? 1.f : square > SMALLEST_SQUARE ? 1.f / sqrtf(square) : square == square ? 0.f : square;
    if (place == 0 && token < 0) note_pair(vector, scale);
    if (place == 0 && token >= 0) fixed.key_scales[token] = scale, fixed.weighed[token] = fixed.left[MOST_TOKENS][token] * scale;
  }
}

template <int DIM, int STEPS> __device__ __forceinline__ void Columns<DIM, STEPS>::note_pair(int pair, float scale) const {
  const bool is_pair = pair < pairs;
  const float carried = is_pair ? fixed.carried[pair - head_of(pair) * tokens] : 0.f;
  fixed.scales[pair] = scale * fixed.numbers[3][pair];
  fixed.of_state[pair] = fixed.numbers[1][pair] * scale * fixed.numbers[3][pair] * carried, fixed.of_one[pair] = fixed.numbers[0][pair] * carried;
}

// The tokens' weights at the pairs of each tile, W_tj f(q_t . k_j), by one warp: as left factors in two parts, and added up.
template <int DIM, int STEPS> __device__ __forceinline__ void Columns<DIM, STEPS>::weigh_tokens() const {
#pragma unroll 1
  for (int tile = warp; tile < tiles; tile += WARPS) {
    float weights[2][4] = {};
    uint32_t high[4] = {}, low[4] = {};
#pragma unroll
    for (int slice = 0; slice < SLICES; ++slice) {
      uint32_t left[4];
      load_queries(left, tile, slice);
#pragma unroll
      for (int step = 0; step < STEPS; ++step) {
        const uint32_t *const right = reinterpret_cast<const uint32_t *>(key(token_of(group / 2, step, group % 2)) + 16 * slice) + place;
        linattn_tile::mma_bf16(weights[step], left, right[0], right[4]);
      }
    }
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int pair = 16 * tile + group + 8 * side;
      const float *const left = fixed.left[pair < pairs ? pair - head_of(pair) * tokens : 0];
      float sum = 0.f;
#pragma unroll
      for (int step = 0; step < STEPS; ++step)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int token = token_of(place, step, i);
          float &weight = weights[step][2 * side + i];
          weight = fmaf(fixed.numbers[1][pair], weight * fixed.scales[pair] * fixed.key_scales[token], fixed.numbers[0][pair]) * left[token];
          sum += weight;
        }
#pragma unroll
      for (int step = 1; step <= 2; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
      if (place == 0) fixed.token_masses[pair] = sum;
    }
#pragma unroll
    for (int i = 0; i < 2 * STEPS; ++i) split(weights[i / 2][i % 2 * 2], weights[i / 2][i % 2 * 2 + 1], high[i], low[i]);
    uint4 *const to = weights_of(tile);
    to[0] = make_uint4(high[0], high[1], high[2], high[3]), to[1] = make_uint4(low[0], low[1], low[2], low[3]);
  }
}

template <int DIM, int STEPS> __device__ __forceinline__ void Columns<DIM, STEPS>::make_keys() const {
#pragma unroll
  for (int i = 0; i < 2 * STEPS; ++i) {
    const int number_of = warp * 2 * STEPS + i, eight = number_of / STEPS, step = number_of % STEPS;
    float high[2], low[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int token = token_of(place, step, k);
      const float x = number(key(token)[8 * eight + group]) * fixed.weighed[token];
      high[k] = __uint_as_float((__float_as_uint(x) + 0x1000u) & 0xffffe000u), low[k] = x - high[k];
    }
    *brought(eight, step) = make_float4(high[0], high[1], low[0], low[1]);
  }
}

}  // namespace
}  // namespace linattn
