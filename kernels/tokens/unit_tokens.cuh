// Units: what is fetched of the tokens, how it lies in shared memory, and what they say of each other.
#pragma once
#include "tokens/units.cuh"

namespace linattn {
namespace {

template <int DIM, int DEGREE, int TILES, int STEPS> __device__ __forceinline__ void Units<DIM, DEGREE, TILES, STEPS>::fetch(Fetched &to) const {
  to.token = Decays::token_of(p, at, lane);
  const uint16_t *const queries = first_of(p.query, first_query), *const keys = first_of(p.key, key_head), *const values = first_of(p.value, key_head);
#pragma unroll
  for (int turn = 0; turn < KEYS_EACH; ++turn) {
    if (!has_tokens(turn)) break;
    const int token = min(vector(turn), tokens - 1);
    to.keys[turn] = load(p.key, keys, 0, token), to.values[turn] = load(p.value, values, 0, token);
    to.is_token[turn] = vector(turn) < tokens && is_taken(p, at.batch, token);
  }
#pragma unroll
  for (int turn = 0; turn < QUERIES_EACH && has_queries(turn); ++turn)
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int pair = min(pair_of_vector(query_vector(turn), side), pairs - 1), head = head_of(pair);
      to.queries[turn][side] = load(p.query, queries, head, pair - head * tokens);
    }
#pragma unroll
  for (int i = 0; i < 4; ++i) to.numbers[i] = thread < pairs && (i != 2 || DEGREE == 2) ? p.coefficients[i * p.query_heads + first_query + head_of(thread)] : 0.f;
#pragma unroll
  for (int i = 0; i < ONES_EACH; ++i) to.one[i] = at.split == 0 && args.before && thread + i * THREADS < WIDTH ? args.before[state + DIM * WIDTH + thread + i * THREADS] : 0.f;
}

// Two pairs at once, which share words.
template <int DIM, int DEGREE, int TILES, int STEPS> __device__ __forceinline__ void Units<DIM, DEGREE, TILES, STEPS>::store_queries(const Fetched &from) const {
#pragma unroll
  for (int turn = 0; turn < QUERIES_EACH; ++turn) {
    if (!has_queries(turn)) break;
    const int tile = query_vector(turn) / 8, row = query_vector(turn) % 8;
    Scale scale[2];
    bool is_pair[2];
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int pair = pair_of_vector(query_vector(turn), side);
      scale[side] = scale_of(square_of(from.queries[turn][side])), is_pair[side] = pair < pairs;
      if (lane % LANES == 0) fixed.scales[pair] = scale[side].rest;
    }
    unsigned char *const to = queries(tile / WORDS) + tile % WORDS * 4;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const float low = is_pair[0] ? number(from.queries[turn][0], e) * scale[0].power : 0.f, high = is_pair[1] ? number(from.queries[turn][1], e) * scale[1].power : 0.f;
      const int at_row = (query_row(8 * (lane % LANES) + e / 4 * 4) ^ row * 4 * WORDS) ^ e % 4 * QUERY_PITCH;  // bits of its own
      *reinterpret_cast<uint32_t *>(to + at_row) = linattn_tile::upper_halves(__float_as_uint(low), __float_as_uint(high));
      if constexpr (DEGREE == 2)
        *reinterpret_cast<uint32_t *>(to + DIM * QUERY_PITCH + at_row) = linattn_tile::upper_halves(__float_as_uint(0.5f * low), __float_as_uint(0.5f * high));
    }
  }
}

template <int DIM, int DEGREE, int TILES, int STEPS> __device__ __forceinline__ void Units<DIM, DEGREE, TILES, STEPS>::store_numbers(const Fetched &from) const {
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (thread < 16 * TILES) fixed.numbers[i][thread] = from.numbers[i];
#pragma unroll
  for (int i = 0; i < ONES_EACH; ++i)
    if (thread + i * THREADS < WIDTH) fixed.one[thread + i * THREADS] = from.one[i];
}

// As fragments: columns are rows of the left factor, tokens its columns.
template <int DIM, int DEGREE, int TILES, int STEPS> __device__ __forceinline__ void Units<DIM, DEGREE, TILES, STEPS>::store_values(const Fetched &from) const {
#pragma unroll
  for (int turn = 0; turn < KEYS_EACH; ++turn) {
    if (!has_tokens(turn)) break;
    const int token = vector(turn);
#pragma unroll
    for (int e = 0; e < 8; ++e) shared[VALUES + value_at(token, 8 * (lane % LANES)) + e % 4 * 16 + e / 4] = from.is_token[turn] ? number(from.values[turn], e) : 0.f;
  }
}

// Keys, a column each; and times what decays leave of them and what makes them of unit length.
template <int DIM, int DEGREE, int TILES, int STEPS> __device__ __forceinline__ void Units<DIM, DEGREE, TILES, STEPS>::store_keys(const Fetched &from) const {
#pragma unroll
  for (int turn = 0; turn < KEYS_EACH; ++turn) {
    if (!has_tokens(turn)) break;
    const int token = vector(turn);
    const Scale scale = scale_of(square_of(from.keys[turn]));
    const float left = fixed.left[MOST_TOKENS][token] * scale.rest;
    if (lane % LANES == 0) fixed.key_scales[token] = from.is_token[turn] ? scale.rest : 0.f, shared[WEIGHED_KEYS + DIM * TOKENS + token] = from.is_token[turn] ? left : 0.f;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int x = 8 * (lane % LANES) + e;
      const float key = from.is_token[turn] ? number(from.keys[turn], e) * scale.power : 0.f;
      shared[KEYS + x * TOKENS + token] = key;
      if constexpr (DEGREE == 2) shared[WEIGHED_KEYS + x * TOKENS + token] = from.is_token[turn] ? key * left * scale.rest : 0.f;
    }
  }
}

template <int DIM, int DEGREE, int TILES, int STEPS> __device__ __forceinline__ void Units<DIM, DEGREE, TILES, STEPS>::begin() {
  Fetched fetched;
  fetch(fetched);
#pragma unroll
  for (int turn = 0; turn < STAGES; ++turn) send_for(turn);
  store_queries(fetched), store_values(fetched), store_numbers(fetched);
  if (warp == 0) fixed.look_at_tokens(fetched.token, tokens, lane);
  __syncthreads();
  store_keys(fetched), store_scales();
  __syncthreads();
}

// In the place of a second number: what the single ones are multiplied by.
template <int DIM, int DEGREE, int TILES, int STEPS> __device__ __forceinline__ void Units<DIM, DEGREE, TILES, STEPS>::store_scales() const {
  if (DEGREE == 1 || thread >= 16 * TILES) return;
  const int tile = thread / 16, side = thread / 8 % 2, row = thread % 8;
  uint32_t high, low;
  split(scale_of_pair(thread, 1), 0.f, high, low);
  unsigned char *const to = queries(tile / WORDS) + tile % WORDS * 4 + side * 2;
  *reinterpret_cast<uint16_t *>(to + (query_row(2 * DIM) ^ row * 4 * WORDS)) = static_cast<uint16_t>(high);
  *reinterpret_cast<uint16_t *>(to + (query_row(2 * DIM + 1) ^ row * 4 * WORDS)) = static_cast<uint16_t>(low);
}

template <int DIM, int DEGREE, int TILES, int STEPS> __device__ __forceinline__ void Units<DIM, DEGREE, TILES, STEPS>::weigh_tokens() {
  begin_part();
#pragma unroll 1
  for (int t = run; t < TILES && at.split == 0; t += RUNS) {
    float weights[2][4] = {};
    uint32_t high[4] = {}, low[4] = {};
    score(weights, t);
    weigh(weights, t);
#pragma unroll
    for (int i = 0; i < 2 * STEPS; ++i) split(weights[i / 2][i % 2 * 2], weights[i / 2][i % 2 * 2 + 1], high[i], low[i]);
    weights_of(t)[0] = make_uint4(high[0], high[1], high[2], high[3]), weights_of(t)[1] = make_uint4(low[0], low[1], low[2], low[3]);
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      float sum = (weights[0][2 * side] + weights[0][2 * side + 1]) + (weights[1][2 * side] + weights[1][2 * side + 1]);
#pragma unroll
      for (int step = 1; step <= 2; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
      if (place == 0 && columns == 0) fixed.token_masses[16 * t + group + 8 * side] = sum;
    }
  }
}

template <int DIM, int DEGREE, int TILES, int STEPS> __device__ __forceinline__ void Units<DIM, DEGREE, TILES, STEPS>::score(float (&scores)[2][4], int tile) const {
  const unsigned char *const from = queries(tile / WORDS) + tile % WORDS * 4;
#pragma unroll 2
  for (int slice = 0; slice < DIM; slice += 16) {
    uint32_t rows[4];
    Fragment left;
    const float *const keys = shared + KEYS + (slice + 4 * place) * TOKENS;
#pragma unroll
    for (int r = 0; r < 4; ++r) rows[r] = *reinterpret_cast<const uint32_t *>(from + (query_row(slice + 4 * place + r) ^ group * 4 * WORDS));
    in_fragments(left, rows);
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      const int token = token_of(group / 2, step, group % 2);
      uint32_t right[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) right[i] = linattn_tile::upper_halves(__float_as_uint(keys[2 * i * TOKENS + token]), __float_as_uint(keys[(2 * i + 1) * TOKENS + token]));
      linattn_tile::mma_bf16(scores[step], left, right[0], right[1]);
    }
  }
}

template <int DIM, int DEGREE, int TILES, int STEPS> __device__ __forceinline__ void Units<DIM, DEGREE, TILES, STEPS>::weigh(float (&weights)[2][4], int tile) const {
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    const int pair = 16 * tile + group + 8 * side;
    const float scale = fixed.scales[pair] * fixed.numbers[3][pair], a = fixed.numbers[0][pair], b = fixed.numbers[1][pair], c = fixed.numbers[2][pair];
    const float *const left = fixed.left[pair < pairs ? pair - head_of(pair) * tokens : 0];
#pragma unroll
    for (int step = 0; step < STEPS; ++step)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int token = token_of(place, step, i);
        float &weight = weights[step][2 * side + i];
        const float score = weight * scale * fixed.key_scales[token];
        weight = fmaf(fmaf(c, score, b), score, a) * left[token];
      }
  }
}

}  // namespace
}  // namespace linattn
