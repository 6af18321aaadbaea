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

  __device__ __forceinline__ void send_for(int turn) const;
  // Fours of a unit's numbers that lie on 16 bytes, and those at the ends that share theirs with others, one by one. A warp of a group has the
  // same of every unit, so that it alone copies a place of a buffer out and in; and a lane too, of units of products and of single ones each.
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
  __device__ __forceinline__ void fetch(Fetched &to) const;
  static __device__ __forceinline__ int pair_of_vector(int vector, int side) { return vector / 8 * 16 + side * 8 + vector % 8; }

  __device__ __forceinline__ void store_queries(const Fetched &from) const;
  __device__ __forceinline__ void store_numbers(const Fetched &from) const;

  // Which token of the block: number i, the second number of a fragment's two, of step `step`, of a place.
  static __device__ __forceinline__ int token_of(int place, int step, int i) { return 2 * STEPS * place + 2 * step + i; }

  __device__ __forceinline__ void store_values(const Fetched &from) const;
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

  __device__ __forceinline__ void store_keys(const Fetched &from) const;
  __device__ __forceinline__ void take_in_one() const;

  __device__ __forceinline__ void begin();

  __device__ __forceinline__ void store_scales() const;

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
  __device__ __forceinline__ void make_features(Fragment (&features)[PARTS][TOGETHER], uint32_t query, int half, bool is_linear) const;
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
  __device__ __forceinline__ void make_features(Keys &keys, uint32_t key) const;

  __device__ __forceinline__ void work_on(int turn);
  // Those who share a unit.
  __device__ __forceinline__ void meet() const {
    if constexpr (GROUPS == 1) __syncwarp();
    else linattn_tile::barrier_sync<32 * GROUPS>(1 + run);
  }

  __device__ __forceinline__ void read(const Fragment (&features)[PARTS][TOGETHER], float *rows, int half, const Keys &keys);
  __device__ __forceinline__ void take_in(const float (&x)[4][2], int two, const Keys &keys, float *own) const;

  __device__ __forceinline__ void read_ones(const Fragment (&features)[PARTS][TOGETHER], const float *rows);
  __device__ __forceinline__ void take_in_ones(const Keys &keys, float *rows) const;

  __device__ __forceinline__ void work();
  __device__ __forceinline__ void scale_sums();

  // ---- the tokens themselves

  // Their weights at the pairs of each tile, W_tj f(q_t . k_j), by one of its warps while units are on their way: as left factors, and added up.
  __device__ __forceinline__ bool weighs(int tile) const { return at.split == 0 && tile % RUNS == run; }
  __device__ __forceinline__ uint4 *weights_of(int tile) const { return reinterpret_cast<uint4 *>(shared + WEIGHTS) + ((columns * TILES + tile) * 32 + lane) * 2; }
  __device__ __forceinline__ void weigh_tokens();
  __device__ __forceinline__ void read_tokens();
  __device__ __forceinline__ void score(float (&scores)[2][4], int tile) const;
  __device__ __forceinline__ void weigh(float (&weights)[2][4], int tile) const;

  // ---- results

  __device__ __forceinline__ void leave_masses();
  __device__ __forceinline__ void finish();
  __device__ __forceinline__ void write(int pair, int column) const;
};

}  // namespace
}  // namespace linattn
