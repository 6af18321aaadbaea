// Up to 16 new tokens a sequence where models live, in bfloat16: the second degree, and the first where no or few heads share a state.
//
// The rows of a state go through the block's warps by units of 16, each warp on its own: it sends for units ahead, multiplies what the tokens ask
// by the rows as they were, adds what the tokens bring, and writes the unit back, without a barrier of the block. Products by tensor cores:
//   pairs x rows x columns, the state before, by bfloat16 in two parts: a state's number as the nearest one and what is left. Queries are
//     bfloat16 themselves, times a power of two, and so are products of two of them in two parts, exactly; all else that a pair is multiplied
//     by, its sums are multiplied by at the end.
//   columns x tokens x rows, what the tokens bring, by tf32: values are exact in it, features of keys in two parts. It is added to the state in float32.
// A lane holds, of a unit, rows 4 * place to 4 * place + 3 and in each eight of columns one: the same registers are a factor of the first product and
// what the second is added to. Which column that is keeps 32 lanes in 32 banks of rows that lie one behind the other, DIM + 1 numbers each.
#pragma once
#include "decode.cuh"
#include "tile/exact.cuh"
#include "tile/instructions.cuh"
#include "tokens/decays.cuh"
#include "tokens/kernels.h"

namespace linattn {
namespace {

// TILES of 16 pairs; STEPS of 8 tokens.
template <int DIM, int DEGREE, int TILES, int STEPS> struct Units {
  static constexpr int TOKENS = 8 * STEPS, RUNS = 4;
  static constexpr int GROUPS = TILES > 4 ? 2 : 1;  // of columns: that many warps share a unit
  static constexpr int OWN = DIM / GROUPS, EIGHTS = OWN / 8, WARPS = RUNS * GROUPS, THREADS = 32 * WARPS;
  static constexpr int TOGETHER = TILES / GROUPS;  // tiles that a unit is read for together; of so many a warp has the sums of weights
  static constexpr int WIDTH = DIM + 1, UNIT = 16 * WIDTH, BUFFER = UNIT + 4;
  static constexpr int STAGES = DEGREE == 2 ? 3 : DIM / 64;  // units of a warp that are in shared memory
  static constexpr int PRODUCTS = DEGREE == 2 ? DIM * (DIM + 1) / 2 / 16 : 0, COUNT = PRODUCTS + DIM / 16;  // units: of products, and all
  static constexpr int BLOCKS = GROUPS > 1 ? 1 : DIM == 128 || TILES > 2 ? 2 : TILES == 2 ? 3 : DEGREE == 2 ? 4 : 5;  // of a multiprocessor
  static constexpr int WORDS = TOGETHER == 3 ? 4 : TOGETHER;  // of a pair and the one 8 further, a word a tile: those of tiles that are read for together
  static constexpr int QUERY_PITCH = 32 * WORDS, QUERY_ROWS = DEGREE == 2 ? 2 * DIM + 2 : DIM, QUERY_BYTES = QUERY_ROWS * QUERY_PITCH;
  static constexpr int PITCH = DIM + 4;  // of sums
  static constexpr int LANES = DIM / 8, VECTORS = 32 / LANES;  // lanes of a vector, 8 numbers each, and vectors of a warp at once
  static constexpr int KEYS_EACH = (TOKENS + WARPS * VECTORS - 1) / (WARPS * VECTORS), QUERIES_EACH = (8 * TILES + WARPS * VECTORS - 1) / (WARPS * VECTORS);
  static constexpr int ONES_EACH = (WIDTH + THREADS - 1) / THREADS;
  static constexpr int PARTS = DEGREE == 2 ? 2 : 1;  // of a feature of a query

  struct Fixed : Decays {
    float numbers[4][16 * TILES];                       // of f: a, b, c and the temperature of each pair
    float scales[16 * TILES], key_scales[MOST_TOKENS];  // what else a pair's and a token's vectors are to be multiplied by
    float masses[RUNS][16 * TILES], token_masses[16 * TILES];  // sums of weights: of the state's rows, and of the tokens
    float one[WIDTH];  // the row of the state that belongs to the feature 1
  };
  // Where a block's arrays begin in shared memory, in floats.
  static constexpr int SUMS = RUNS * 16 * TILES * PITCH;  // of all warps, over all else once it has been read
  static constexpr int QUERIES = RUNS * STAGES * BUFFER, VALUES = QUERIES + GROUPS * QUERY_BYTES / 4;
  static constexpr int KEYS = VALUES + STEPS * DIM / 16 * 128, WEIGHED_KEYS = KEYS + DIM * TOKENS, WEIGHTS = WEIGHED_KEYS + (DIM + 1) * TOKENS;
  static constexpr int END = WEIGHTS + GROUPS * TILES * 32 * 8;
  static constexpr int SHARED_BYTES = 4 * (END > SUMS ? END : SUMS);

  const SeveralArguments &args;
  const linattn_problem &p;
  Fixed &fixed;
  float *const shared;
  int thread, warp, lane, group, place, run, columns;  // columns: which of the GROUPS
  const Place at;
  const int key_head, tokens, pairs, first_query, first, stride;  // first, stride: this warp's units
  const int64_t state;
  float carry;
  float sums[TILES][EIGHTS][4], mass[TOGETHER][4];

  __device__ __forceinline__ Units(const SeveralArguments &args, Fixed &fixed, float *shared)
      : args(args), p(args.problem), fixed(fixed), shared(shared), thread(threadIdx.x), warp(__shfl_sync(0xffffffffu, thread / 32, 0)), lane(thread % 32), group(lane / 4),
        place(lane % 4), run(GROUPS == 1 ? warp : warp % RUNS), columns(GROUPS == 1 ? 0 : warp / RUNS), key_head(key_head_of(args, at.head)), tokens(static_cast<int>(p.length)),
        pairs(args.group * tokens), first_query(at.head * args.group), first(at.split * RUNS + run), stride(RUNS * args.splits),
        state((static_cast<int64_t>(at.batch) * p.state_heads + at.head) * args.features * WIDTH) {}

  // Numbers of this thread are made again from here on: those of the part before would take registers that sums have.
  __device__ __forceinline__ void begin_part() {
    thread = linattn_tile::remade(thread), warp = linattn_tile::remade(warp);
    lane = thread % 32, group = lane / 4, place = lane % 4, run = GROUPS == 1 ? warp : warp % RUNS, columns = GROUPS == 1 ? 0 : warp / RUNS;
  }

  // ---- units on their way

  __device__ __forceinline__ static int row_of(int unit) { return unit < PRODUCTS ? DIM + 1 + 16 * unit : 16 * (unit - PRODUCTS); }
  __device__ __forceinline__ float *buffer(int turn) const { return shared + (run * STAGES + turn % STAGES) * BUFFER; }
  // A unit lies in shared memory as far from a boundary of 16 bytes as in memory, before and behind the tokens.
  static __device__ __forceinline__ int shift_of(const float *from) { return static_cast<int>(reinterpret_cast<uintptr_t>(from) / 4 % 4); }
  __device__ __forceinline__ int64_t begin_of(int turn) const { return state + static_cast<int64_t>(row_of(first + turn * stride)) * WIDTH; }
  __device__ __forceinline__ bool is_unit(int turn) const { return first + turn * stride < COUNT; }

  __device__ __forceinline__ void send_for(int turn) const {
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
  // Fours of a unit's numbers that lie on 16 bytes, and those at the ends that share theirs with others, one by one. A warp of a group has the
  // same of every unit, so that it alone copies a place of a buffer out and in.
  template <typename Memory, typename Four, typename Single>
  __device__ __forceinline__ void for_all_slots(int shift, float *slots, Memory *memory, const Four &four, const Single &single) const {
    const int own = lane + 32 * columns, end = own < shift ? UNIT + own : own;
    float *const slot = slots + 4 * own;
    Memory *const x = memory + 4 * own;
#pragma unroll
    for (int i = 0; i < UNIT / 4; i += 32 * GROUPS)
      if ((i > 0 || own > 0 || shift == 0) && (i + 32 * GROUPS <= UNIT / 4 || own < UNIT / 4 - i)) four(slot + 4 * i, x + 4 * i);
    if (own < 4 && shift != 0) single(slots + end, memory + end);
  }

  // ---- what the block knows of its tokens

  // Where numbers of dim x stand among the queries': in turns, so that 4 dims 4 apart do not share banks.
  static __device__ __forceinline__ int query_row(int x) { return x * QUERY_PITCH ^ (x / 4 % 4 * 32); }
  __device__ __forceinline__ unsigned char *queries(int half) const { return reinterpret_cast<unsigned char *>(shared + QUERIES) + half * QUERY_BYTES; }

  static __device__ __forceinline__ float square_of(const uint4 &bits) {
    float square = 0.f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float low = __uint_as_float(word(bits, i) << 16), high = __uint_as_float(word(bits, i) & 0xffff0000u);
      square = fmaf(low, low, square), square = fmaf(high, high, square);
    }
#pragma unroll
    for (int step = 1; step < LANES; step *= 2) square += __shfl_xor_sync(0xffffffffu, square, step);
    return square;
  }
  static __device__ __forceinline__ uint32_t word(const uint4 &bits, int i) { return i == 0 ? bits.x : i == 1 ? bits.y : i == 2 ? bits.z : bits.w; }
  static __device__ __forceinline__ float number(const uint4 &bits, int i) { return __uint_as_float(i % 2 ? word(bits, i / 2) & 0xffff0000u : word(bits, i / 2) << 16); }
  // What makes a vector one of unit length, as a power of two, which leaves a bfloat16 what it is, and the rest.
  struct Scale {
    float power, rest;
  };
  __device__ __forceinline__ Scale scale_of(float square) const {
    if (!p.normalize_qk) return {1.f, 1.f};
    if (!(square > SMALLEST_SQUARE)) return {1.f, square == square ? 0.f : square};
    const float inverse = 1.f / sqrtf(square), power = __uint_as_float(__float_as_uint(inverse) & 0x7f800000u);
    return power > 0.f ? Scale{power, inverse / power} : Scale{1.f, inverse};
  }
  // Eight numbers of a vector: of a head and a token behind the first ones.
  __device__ __forceinline__ uint4 load(const linattn_tensor &rows, const uint16_t *first, int head, int token) const {
    return *reinterpret_cast<const uint4 *>(first + head * static_cast<int>(rows.head_stride) + token * static_cast<int>(rows.token_stride));
  }
  __device__ __forceinline__ const uint16_t *first_of(const linattn_tensor &rows, int head) const {
    return static_cast<const uint16_t *>(rows.data) + offset_of(rows, at.batch, head, 0) + lane % LANES * 8;
  }
  __device__ __forceinline__ int head_of(int pair) const { return pair * args.one_token >> 16; }  // a pair is head * tokens + token
  // The vector that a lane has a part of, of those that a warp takes in turns: of queries, and of keys and values, by the last warps first.
  __device__ __forceinline__ int query_vector(int turn) const { return (turn * WARPS + warp) * VECTORS + lane / LANES; }
  __device__ __forceinline__ int vector(int turn) const { return (turn * WARPS + WARPS - 1 - warp) * VECTORS + lane / LANES; }
  __device__ __forceinline__ bool has_queries(int turn) const { return (turn * WARPS + warp) * VECTORS < 8 * TILES; }
  __device__ __forceinline__ bool has_tokens(int turn) const { return (turn * WARPS + WARPS - 1 - warp) * VECTORS < TOKENS; }

  // What is fetched of the tokens, all on its way before the first is looked at.
  struct Fetched {
    uint4 queries[QUERIES_EACH][2], keys[KEYS_EACH], values[KEYS_EACH];
    bool is_token[KEYS_EACH];
    float numbers[4], one[ONES_EACH];
    Decays::Token token;
  };
  __device__ __forceinline__ void fetch(Fetched &to) const {
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
  static __device__ __forceinline__ int pair_of_vector(int vector, int side) { return vector / 8 * 16 + side * 8 + vector % 8; }

  // Two pairs at once, which share words.
  __device__ __forceinline__ void store_queries(const Fetched &from) const {
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
  __device__ __forceinline__ void store_numbers(const Fetched &from) const {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (thread < 16 * TILES) fixed.numbers[i][thread] = from.numbers[i];
#pragma unroll
    for (int i = 0; i < ONES_EACH; ++i)
      if (thread + i * THREADS < WIDTH) fixed.one[thread + i * THREADS] = from.one[i];
  }

  // Which token of the block: number i, the second number of a fragment's two, of step `step`, of a place.
  static __device__ __forceinline__ int token_of(int place, int step, int i) { return 2 * STEPS * place + 2 * step + i; }

  // As fragments: columns are rows of the left factor, tokens its columns.
  __device__ __forceinline__ void store_values(const Fetched &from) const {
#pragma unroll
    for (int turn = 0; turn < KEYS_EACH; ++turn) {
      if (!has_tokens(turn)) break;
      const int token = vector(turn);
#pragma unroll
      for (int e = 0; e < 8; ++e) shared[VALUES + value_at(token, 8 * (lane % LANES)) + e % 4 * 16 + e / 4] = from.is_token[turn] ? number(from.values[turn], e) : 0.f;
    }
  }
  // Column `lane` of an eight; which one that is of a row.
  static __device__ __forceinline__ int column_of(int eight, int lane) { return eight / 4 * 32 + eight % 4 * 4 + lane / 4 * 16 + lane % 4; }
  static __device__ __forceinline__ int value_at(int token, int column) {
    const int eight = column / 32 * 4 + column / 4 % 4, row = column / 16 % 2 * 4 + column % 4;
    const int place = token / (2 * STEPS), step = token / 2 % STEPS;
    return ((step * (DIM / 16) + eight / 2) * 32 + 4 * row + place) * 4 + token % 2 * 2 + eight % 2;
  }
  __device__ __forceinline__ float4 values(int step, int two) const {
    return *reinterpret_cast<const float4 *>(shared + VALUES + ((step * (DIM / 16) + columns * EIGHTS / 2 + two) * 32 + lane) * 4);
  }

  // Keys, a column each; and times what decays leave of them and what makes them of unit length.
  __device__ __forceinline__ void store_keys(const Fetched &from) const {
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
  __device__ __forceinline__ void take_in_one() const {
    if (at.split > 0 || !args.after) return;
    for (int i = thread; i < WIDTH; i += THREADS) {
      float x = fixed.one[i] * fixed.carried[MOST_TOKENS];
#pragma unroll 1
      for (int token = 0; token < tokens; ++token) x = fmaf(fixed.left[MOST_TOKENS][token], i < DIM ? shared[VALUES + value_at(token, i)] : 1.f, x);
      args.after[state + DIM * WIDTH + i] = x;
    }
  }

  __device__ __forceinline__ void begin() {
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
  __device__ __forceinline__ void store_scales() const {
    if (DEGREE == 1 || thread >= 16 * TILES) return;
    const int tile = thread / 16, side = thread / 8 % 2, row = thread % 8;
    uint32_t high, low;
    split(scale_of_pair(thread, 1), 0.f, high, low);
    unsigned char *const to = queries(tile / WORDS) + tile % WORDS * 4 + side * 2;
    *reinterpret_cast<uint16_t *>(to + (query_row(2 * DIM) ^ row * 4 * WORDS)) = static_cast<uint16_t>(high);
    *reinterpret_cast<uint16_t *>(to + (query_row(2 * DIM + 1) ^ row * 4 * WORDS)) = static_cast<uint16_t>(low);
  }

  // ---- a unit

  // What features are products of: where numbers of queries stand, and of keys, two places in a word.
  struct Factors {
    uint32_t query, key;
  };
  static __device__ __forceinline__ Factors factors_of(int unit, int row) {
    if (unit >= PRODUCTS) {
      const int x = 16 * (unit - PRODUCTS) + row;
      return {static_cast<uint32_t>(query_row(x) | (DEGREE == 2 ? query_row(2 * DIM) << 16 : 0)), static_cast<uint32_t>(DIM * TOKENS | x * TOKENS << 16)};
    }
    // The first number's products begin at x (2 DIM + 1 - x) / 2: the root of what is left of a square is a whole number there, and elsewhere is
    // greater by more than what it is rounded by.
    const int product = 16 * unit + row;
    const float side = 2 * DIM + 1, rest = side * side - 8.f * product;
    const int x = static_cast<int>(.5f * (side + 1.f / 128.f - rest * linattn_tile::reciprocal_root(rest))), y = product - x * (2 * DIM - 1 - x) / 2;
    return {static_cast<uint32_t>(query_row(x) | query_row(x == y ? DIM + y : y) << 16), static_cast<uint32_t>(x * TOKENS | y * TOKENS << 16)};
  }
  __device__ __forceinline__ void load_words(uint32_t (&words)[WORDS], int half, uint32_t row) const {
    const unsigned char *const from = queries(half) + (row ^ group * 4 * WORDS);
    if constexpr (WORDS == 4) {
      const uint4 bits = *reinterpret_cast<const uint4 *>(from);
      words[0] = bits.x, words[1] = bits.y, words[2] = bits.z, words[3] = bits.w;
    } else if constexpr (WORDS == 2) {
      const uint2 bits = *reinterpret_cast<const uint2 *>(from);
      words[0] = bits.x, words[1] = bits.y;
    } else {
      words[0] = *reinterpret_cast<const uint32_t *>(from);
    }
  }

  // Features of the pairs of some tiles in the rows of a unit, as left factors: of the second degree all products of two numbers but for what a
  // pair's sums are multiplied by at the end, and its single ones with that, which stands in two parts where a second number would.
  using Fragment = uint32_t[4];
  __device__ __forceinline__ void make_features(Fragment (&features)[PARTS][TOGETHER], uint32_t query, int half, bool is_linear) const {
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
  static __device__ __forceinline__ void in_fragments(Fragment &to, const uint32_t (&rows)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = i % 2 ? linattn_tile::upper_halves(rows[i / 2 * 2], rows[i / 2 * 2 + 1]) : linattn_tile::lower_halves(rows[i / 2 * 2], rows[i / 2 * 2 + 1]);
  }
  // What sums of a pair's features are multiplied by: of single numbers, and of products of two.
  __device__ __forceinline__ float scale_of_pair(int pair, int degree) const {
    if (pair >= pairs) return 0.f;
    const float number = fixed.numbers[degree][pair] * fixed.carried[pair - head_of(pair) * tokens], scale = fixed.scales[pair] * fixed.numbers[3][pair];
    return degree == 0 ? number : degree == 1 ? number * scale : 2.f * number * scale * scale;
  }

  // Two numbers as the nearest bfloat16 and what is left.
  static __device__ __forceinline__ void split(float x, float y, uint32_t &high, uint32_t &low) {
    high = linattn_tile::pack_bf16(x, y);
    low = linattn_tile::pack_bf16(x - __uint_as_float(high << 16), y - __uint_as_float(high & 0xffff0000u));
  }
  // The sum over what stands in eight columns, three parts of a number in the first three, is the number's.
  __device__ __forceinline__ uint32_t part_of(float x, float y) const {
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const uint32_t high = linattn_tile::pack_bf16(x, y);
      if (group > part) x -= __uint_as_float(high << 16), y -= __uint_as_float(high & 0xffff0000u);
    }
    return group < 3 ? linattn_tile::pack_bf16(x, y) : 0u;
  }

  // Of keys, as right factors of two parts, and their sums over the tokens.
  struct Keys {
    float high[2][STEPS][2], low[2][STEPS][2], sums[2];
  };
  __device__ __forceinline__ void make_features(Keys &keys, uint32_t key) const {
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

  __device__ __forceinline__ void work_on(int turn) {
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
    if (!args.before) meet();  // elsewhere a lane sends for what it has written
    send_for(turn + STAGES);
  }
  // Those who share a unit.
  __device__ __forceinline__ void meet() const {
    if constexpr (GROUPS == 1) __syncwarp();
    else linattn_tile::barrier_sync<32 * GROUPS>(1 + run);
  }

  __device__ __forceinline__ void read(const Fragment (&features)[PARTS][TOGETHER], float *rows, int half, const Keys &keys) {
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
  __device__ __forceinline__ void take_in(const float (&x)[4][2], int two, const Keys &keys, float *own) const {
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
  __device__ __forceinline__ void read_ones(const Fragment (&features)[PARTS][TOGETHER], const float *rows) {
    const float *const own = rows + 4 * place * WIDTH + DIM;
    const uint32_t right[2] = {part_of(own[0], own[WIDTH]), part_of(own[2 * WIDTH], own[3 * WIDTH])};
#pragma unroll
    for (int part = PARTS - 1; part >= 0; --part)
#pragma unroll
      for (int t = 0; t < TOGETHER; ++t) linattn_tile::mma_bf16(mass[t], features[part][t], right[0], right[1]);
  }
  __device__ __forceinline__ void take_in_ones(const Keys &keys, float *rows) const {
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
  __device__ __forceinline__ void work() {
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
  __device__ __forceinline__ void scale_sums() {
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

  // ---- the tokens themselves

  // Their weights at the pairs of each tile, W_tj f(q_t . k_j), by one of its warps while units are on their way: as left factors, and added up.
  __device__ __forceinline__ bool weighs(int tile) const { return at.split == 0 && tile % RUNS == run; }
  __device__ __forceinline__ uint4 *weights_of(int tile) const { return reinterpret_cast<uint4 *>(shared + WEIGHTS) + ((columns * TILES + tile) * 32 + lane) * 2; }
  __device__ __forceinline__ void weigh_tokens() {
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
  // Times the values.
  __device__ __forceinline__ void read_tokens() {
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
  __device__ __forceinline__ void score(float (&scores)[2][4], int tile) const {
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
  __device__ __forceinline__ void weigh(float (&weights)[2][4], int tile) const {
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

  // ---- results

  __device__ __forceinline__ void leave_masses() {
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
  __device__ __forceinline__ void finish() {
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
  __device__ __forceinline__ void write(int pair, int column) const {
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
};

template <int DIM, int DEGREE, int TILES, int STEPS> __global__ void __launch_bounds__(Units<DIM, DEGREE, TILES, STEPS>::THREADS, Units<DIM, DEGREE, TILES, STEPS>::BLOCKS)
    units_kernel(const SeveralArguments args) {
  using Work = Units<DIM, DEGREE, TILES, STEPS>;
  extern __shared__ __align__(16) float shared[];
  __shared__ typename Work::Fixed fixed;
  Work work(args, fixed, shared);
  work.begin();
  work.weigh_tokens();
  work.work();
  work.read_tokens();
  work.take_in_one();
  work.finish();
}

template <int DIM, int DEGREE, int TILES, int STEPS> SeveralKernel units() {
  using Work = Units<DIM, DEGREE, TILES, STEPS>;
  return {Work::WARPS, Work::SHARED_BYTES, Work::BLOCKS, Work::COUNT, Work::RUNS, units_kernel<DIM, DEGREE, TILES, STEPS>};
}
template <int DIM, int DEGREE, int TILES> SeveralKernel units(int tokens) { return tokens <= 8 ? units<DIM, DEGREE, TILES, 1>() : units<DIM, DEGREE, TILES, 2>(); }

}  // namespace
}  // namespace linattn
