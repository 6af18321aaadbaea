// Units: rows of a state on their way, what tokens ask of them, and what tokens bring.
#pragma once
#include "tokens/units.cuh"

namespace linattn {
namespace {

template <int DIM, int DEGREE, int TILES, int STEPS> __device__ __forceinline__ void Units<DIM, DEGREE, TILES, STEPS>::send_for(int turn) const {
  if (is_unit(turn)) {
    const float *const from = args.before + begin_of(turn);
    float *const to = buffer(turn);
    if (args.before) {
      const int shift = shift_of(from);
      for_all_slots(
          shift, to, from - shift, [](float *slot, const float *x) { linattn_tile::copy_async(linattn_tile::shared_address(slot), x, true); },
          [](float *slot, const float *x) { linattn_tile::copy_number_async(linattn_tile::shared_address(slot), x, true); });
    } else {
#pragma unroll 1
      for (int i = lane + 32 * columns; i < BUFFER; i += 32 * GROUPS) to[i] = 0.f;
    }
  }
  linattn_tile::copy_commit();
}

template <int DIM, int DEGREE, int TILES, int STEPS> __device__ __forceinline__ void Units<DIM, DEGREE, TILES, STEPS>::make_features(Fragment (&features)[PARTS][TOGETHER],
                                                                                                                                     uint32_t query, int half,
                                                                                                                                     bool is_linear) const {
  uint32_t high[TOGETHER][4], low[TOGETHER][4];
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const uint32_t rows = __shfl_sync(0xffffffffu, query, 4 * place + r);
    uint32_t x[WORDS], y[WORDS];
    load_words(x, half, rows & 0xffffu);
    if constexpr (DEGREE == 2) load_words(y, half, rows >> 16);
#pragma unroll
    for (int t = 0; t < TOGETHER; ++t) {
      if constexpr (DEGREE == 1) high[t][r] = x[t];
      else linattn_tile::multiply_two_exactly(x[t], y[t], high[t][r], low[t][r]);
    }
    if (DEGREE == 2 && is_linear) {
      load_words(y, half, query_row(2 * DIM + 1));
#pragma unroll
      for (int t = 0; t < TOGETHER; ++t) low[t][r] = linattn_tile::multiply_add_two(x[t], y[t], low[t][r]);
    }
  }
#pragma unroll
  for (int t = 0; t < TOGETHER; ++t) {
    in_fragments(features[0][t], high[t]);
    if constexpr (DEGREE == 2) in_fragments(features[1][t], low[t]);
  }
}

template <int DIM, int DEGREE, int TILES, int STEPS> __device__ __forceinline__ void Units<DIM, DEGREE, TILES, STEPS>::make_features(Keys &keys, uint32_t key) const {
#pragma unroll
  for (int t = 0; t < 2; ++t) {
    const uint32_t both = __shfl_sync(0xffffffffu, key, group / 2 * 4 + 2 * t + group % 2);
    const float *const x = shared + WEIGHED_KEYS + (both & 0xffffu) + 2 * STEPS * place, *const y = shared + KEYS + (both >> 16) + 2 * STEPS * place;
    float2 left[STEPS], right[STEPS];
    if constexpr (STEPS == 2) {
      const float4 l = *reinterpret_cast<const float4 *>(x), r = *reinterpret_cast<const float4 *>(y);
      left[0] = make_float2(l.x, l.y), left[1] = make_float2(l.z, l.w), right[0] = make_float2(r.x, r.y), right[1] = make_float2(r.z, r.w);
    } else {
      left[0] = *reinterpret_cast<const float2 *>(x), right[0] = *reinterpret_cast<const float2 *>(y);
    }
    keys.sums[t] = 0.f;
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      const float of_row[2] = {left[step].x * right[step].x, left[step].y * right[step].y};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        keys.high[t][step][i] = __uint_as_float((__float_as_uint(of_row[i]) + 0x1000u) & 0xffffe000u);
        keys.low[t][step][i] = of_row[i] - keys.high[t][step][i];
        keys.sums[t] += of_row[i];
      }
    }
#pragma unroll
    for (int step = 1; step <= 2; step *= 2) keys.sums[t] += __shfl_xor_sync(0xffffffffu, keys.sums[t], step);
  }
}

template <int DIM, int DEGREE, int TILES, int STEPS> __device__ __forceinline__ void Units<DIM, DEGREE, TILES, STEPS>::work_on(int turn) {
  const int unit = first + turn * stride;
  const Factors factors = factors_of(unit, lane % 16);
  linattn_tile::copy_wait<STAGES - 1>();
  meet();
  float *const to = args.after + begin_of(turn);
  const int shift = shift_of((args.before ? args.before : args.after) + begin_of(turn));
  float *const rows = buffer(turn) + shift;
  Keys keys;
  make_features(keys, factors.key);
#pragma unroll
  for (int half = 0; half < GROUPS; ++half) {
    Fragment features[PARTS][TOGETHER];
    make_features(features, factors.query, half, unit >= PRODUCTS);
    if (half == columns) read_ones(features, rows);
    read(features, rows, half, keys);
  }
  take_in_ones(keys, rows);
  meet();
  if (args.after)
    for_all_slots(
        shift, rows - shift, to - shift, [](float *slot, float *x) { *reinterpret_cast<float4 *>(x) = *reinterpret_cast<const float4 *>(slot); },
        [](float *slot, float *x) { *x = *slot; });
  // A lane sends for what it has written, but where there was nothing before, and where products end: single ones lie elsewhere among 16 bytes.
  if (!args.before || (DEGREE == 2 && unit < PRODUCTS && unit + STAGES * stride >= PRODUCTS)) meet();
  send_for(turn + STAGES);
}

template <int DIM, int DEGREE, int TILES, int STEPS> __device__ __forceinline__ void Units<DIM, DEGREE, TILES, STEPS>::read(const Fragment (&features)[PARTS][TOGETHER],
                                                                                                                            float *rows, int half, const Keys &keys) {
#pragma unroll
  for (int two = 0; two < EIGHTS / 2; ++two) {
    float x[4][2];
    uint32_t high[2][2], low[2][2];
    float *const own = rows + 4 * place * WIDTH + column_of(columns * EIGHTS + 2 * two, group);
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
      for (int side = 0; side < 2; ++side) x[r][side] = own[r * WIDTH + 4 * side];
#pragma unroll
    for (int side = 0; side < 2; ++side)
#pragma unroll
      for (int i = 0; i < 2; ++i) split(x[2 * i][side], x[2 * i + 1][side], high[side][i], low[side][i]);
#pragma unroll
    for (int product = PARTS; product >= 0; --product)  // the smallest first
#pragma unroll
      for (int t = 0; t < TOGETHER; ++t)
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          const Fragment &feature = features[product == 2 ? PARTS - 1 : 0][t];
          const uint32_t (&of_state)[2] = product == 1 ? low[side] : high[side];
          linattn_tile::mma_bf16(sums[TOGETHER * half + t][2 * two + side], feature, of_state[0], of_state[1]);
        }
    if (half + 1 == GROUPS) take_in(x, two, keys, own);
  }
}

// The state's numbers, and what the tokens bring.
template <int DIM, int DEGREE, int TILES, int STEPS> __device__ __forceinline__ void Units<DIM, DEGREE, TILES, STEPS>::take_in(const float (&x)[4][2], int two, const Keys &keys,
                                                                                                                               float *own) const {
  float brought[2][4] = {};
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    const float4 value = values(step, two);
    const float left[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
    for (int t = 0; t < 2; ++t) mma_tf32(brought[t], left, keys.low[t][step]);
#pragma unroll
    for (int t = 0; t < 2; ++t) mma_tf32(brought[t], left, keys.high[t][step]);
  }
#pragma unroll
  for (int r = 0; r < 4; ++r)
#pragma unroll
    for (int side = 0; side < 2; ++side) own[r * WIDTH + 4 * side] = fmaf(x[r][side], carry, brought[r / 2][2 * side + r % 2]);
}

// The last column, which sums up weights.
template <int DIM, int DEGREE, int TILES, int STEPS> __device__ __forceinline__ void Units<DIM, DEGREE, TILES, STEPS>::read_ones(const Fragment (&features)[PARTS][TOGETHER],
                                                                                                                                 const float *rows) {
  const float *const own = rows + 4 * place * WIDTH + DIM;
  const uint32_t right[2] = {part_of(own[0], own[WIDTH]), part_of(own[2 * WIDTH], own[3 * WIDTH])};
#pragma unroll
  for (int part = PARTS - 1; part >= 0; --part)
#pragma unroll
    for (int t = 0; t < TOGETHER; ++t) linattn_tile::mma_bf16(mass[t], features[part][t], right[0], right[1]);
}

template <int DIM, int DEGREE, int TILES, int STEPS> __device__ __forceinline__ void Units<DIM, DEGREE, TILES, STEPS>::take_in_ones(const Keys &keys, float *rows) const {
  if constexpr (GROUPS > 1) {
    if (columns > 0) return linattn_tile::barrier_arrive<32 * GROUPS>(1 + RUNS + run);
    linattn_tile::barrier_sync<32 * GROUPS>(1 + RUNS + run);  // all have read them
  } else {
    __syncwarp();
  }
  if (place > 1) return;
  float &one = rows[(group / 2 * 4 + 2 * place + group % 2) * WIDTH + DIM];
  one = fmaf(one, carry, place == 0 ? keys.sums[0] : keys.sums[1]);
}

// Units of products come first.
template <int DIM, int DEGREE, int TILES, int STEPS> __device__ __forceinline__ void Units<DIM, DEGREE, TILES, STEPS>::work() {
  begin_part();
  int turn = 0;
  carry = fixed.carried[MOST_TOKENS];
#pragma unroll
  for (int t = 0; t < TILES; ++t)
#pragma unroll
    for (int c = 0; c < EIGHTS; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[t][c][i] = 0.f;
#pragma unroll
  for (int t = 0; t < TOGETHER; ++t)
#pragma unroll
    for (int i = 0; i < 4; ++i) mass[t][i] = 0.f;
  bool is_scaled = DEGREE == 1;
#pragma unroll 1
  for (; is_unit(turn); ++turn) {
    if (!is_scaled && first + turn * stride >= PRODUCTS) scale_sums(), is_scaled = true;
    work_on(turn);
  }
  if (DEGREE == 1 || !is_scaled) scale_sums();
}

template <int DIM, int DEGREE, int TILES, int STEPS> __device__ __forceinline__ void Units<DIM, DEGREE, TILES, STEPS>::scale_sums() {
#pragma unroll
  for (int t = 0; t < TILES; ++t) {
    const float scale[2] = {scale_of_pair(16 * t + group, DEGREE), scale_of_pair(16 * t + group + 8, DEGREE)};
#pragma unroll
    for (int c = 0; c < EIGHTS; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[t][c][i] *= scale[i / 2];
    if (t / TOGETHER == columns)
#pragma unroll
      for (int i = 0; i < 4; ++i) mass[t % TOGETHER][i] *= scale[i / 2];
  }
}

}  // namespace
}  // namespace linattn
