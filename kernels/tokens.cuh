// Up to 16 new tokens a sequence, as chunks of a prompt, drafts that are verified and the turns of a conversation bring them, all at once:
//   num_t = K_t phi(q_t)^T S + sum_{j <= t} W_tj f(q_t . k_j) [v_j, 1]^T,   S <- K S + sum_j W_j psi(k_j) [v_j, 1]^T,
// where W_tj is what decays leave of token j at token t, 0 across runs, K_t what they leave of the state before, and K and W_j the same behind
// the last token. The state comes from memory once, by lots of rows of which two are on their way, and goes back once.
//
// Rows of the products are pairs of a query head and a token, 16 to a tile of the tensor cores (tf32; each factor in two parts but for bfloat16,
// whose scores alone are so). Warps share tiles, and where there are fewer tiles than warps also the rows of a lot. The state itself, and the sums of
// weights, are summed in float32 by ordinary instructions, a warp a row.
#pragma once
#include <type_traits>

#include "decode.cuh"
#include "tile/instructions.cuh"
#include "tokens/decays.cuh"
#include "tokens/kernels.h"

namespace linattn {
namespace {

constexpr int TOKEN_PITCH = 20;  // floats from one row to the next where columns are tokens

struct TokensArguments : SeveralArguments {
  int32_t heads_at_once, tiles_at_once;
};

// SLICES of 32 numbers hold D and Dv; DTYPE: of inputs. WARPS: fewer where states are small, since each begins by finding out the same.
//
// A block passes over this code about once, and has to fetch it: loops whose bodies number no registers are not unrolled.
template <int SLICES, linattn_dtype DTYPE, int WARPS> struct Tokens {
  using Number = std::conditional_t<DTYPE == LINATTN_FLOAT32, float, uint16_t>;
  // float16 has as many bits as the tensor cores leave: where terms cancel, their rounding would be more than its own.
  static constexpr bool PRECISE = DTYPE != LINATTN_BFLOAT16;
  static constexpr int COLUMNS = 32 * SLICES, PARTS = COLUMNS / 8, PITCH = COLUMNS + 8;
  static constexpr int THREADS = 32 * WARPS;
  static constexpr int ROWS = SLICES <= 2 ? 72 : SLICES == 4 ? 48 : 16;             // of a lot: at D = 64 one lot is the whole first degree
  static constexpr int MOST_TILES = SLICES <= 2 ? WARPS : SLICES == 4 ? 2 : 1;      // of pairs, in a round
  static constexpr int MOST_SHARES = SLICES <= 4 ? WARPS : 4;                       // of a lot's rows among warps
  static constexpr int READ = PARTS < 16 ? PARTS : SLICES < 8 ? 16 : 8;             // eights of columns that a row is read for together
  static constexpr int AT_ONCE = SLICES <= 4 ? 4 : 2;                               // vectors that a warp has on their way
  static constexpr int WIDE = SLICES < 2 ? SLICES : 2, TAKEN = SLICES < 8 ? 3 : 2;  // slices and rows that take tokens in together
  // Blocks of a multiprocessor, by registers.
  static constexpr int BLOCKS = ((SLICES <= 2 ? 3 : SLICES == 4 ? 2 : 1) - (PRECISE && SLICES < 8)) * 8 / WARPS;
  struct Fixed : Decays {
    float masses[WARPS][16];
  };
  // Where a block's arrays begin in shared memory, in floats.
  struct Layout {
    int queries, weights, keys, values, ones, factors, end, pitch;
    __host__ __device__ Layout(int dim, int tiles, int rows) {
      pitch = (dim + 28) / 32 * 32 + 4;  // rows of a fragment in other banks; room for a 1 behind
      queries = (rows > ROWS ? 2 : 1) * ROWS * PITCH, weights = queries + 16 * tiles * pitch, keys = weights + 16 * tiles * TOKEN_PITCH;
      values = keys + (dim + 1) * TOKEN_PITCH, ones = values + MOST_TOKENS * PITCH, factors = ones + 2 * ROWS;
      end = factors + 2 * ROWS;
      const int sums = 16 * MOST_SHARES * PITCH;  // of all warps, over the rest
      if (end < sums) end = sums;
    }
  };
  static int shared_bytes(int dim, int tiles, int rows) { return 4 * Layout(dim, tiles, rows).end; }

  const TokensArguments &args;
  const linattn_problem &p;
  Fixed &fixed;
  float *const shared;
  const int thread, warp, lane, group, place;
  const Place at;
  const int key_head, width, dim, tokens, columns;  // columns: tokens, up to a whole number of eights
  const int begin, rows;                            // the block's rows of the state
  const int64_t first_element;                      // of them, in the state
  const Layout lies;
  int first_query, pairs, tiles, tile_warps, shares;  // of this round
  int tile, share;                                    // of pairs, and of a lot's rows, that are this warp's
  float sums[PARTS][4], mass[2];                      // of pairs group and group + 8 of the tile
  float numbers[2][3], carried[2];                    // of them: a, b, c, and K_t

  __device__ __forceinline__ Tokens(const TokensArguments &args, Fixed &fixed, float *shared)
      : args(args), p(args.problem), fixed(fixed), shared(shared), thread(threadIdx.x), warp(__shfl_sync(0xffffffffu, thread / 32, 0)), lane(thread % 32), group(lane / 4),
        place(lane % 4), key_head(key_head_of(args, at.head)), width(p.value_dim + 1), dim(p.head_dim), tokens(static_cast<int>(p.length)), columns((tokens + 7) / 8 * 8),
        begin(at.split * args.rows_each), rows(max(0, min(args.features - begin, args.rows_each))),
        first_element(((static_cast<int64_t>(at.batch) * p.state_heads + at.head) * args.features + begin) * width), lies(dim, args.tiles_at_once, args.rows_each) {}

  __device__ __forceinline__ int head_of(int pair) const { return pair * args.one_token >> 16; }  // a pair is head * tokens + token
  __device__ __forceinline__ bool is_column(int slice) const { return lane + 32 * slice < p.value_dim; }
  __device__ __forceinline__ float *lot(int number) const { return shared + number % 2 * ROWS * PITCH; }
  __device__ __forceinline__ float *ones(int number) const { return shared + lies.ones + number % 2 * ROWS; }
  __device__ __forceinline__ short2 *factors(int number) const { return reinterpret_cast<short2 *>(shared + lies.factors) + number % 2 * ROWS; }
  __device__ __forceinline__ int rows_in(int number) const { return min(ROWS, rows - number * ROWS); }
  __device__ __forceinline__ int pair(int side) const { return 16 * tile + group + 8 * side; }

  __device__ __forceinline__ void begin_round(int base) {
    first_query = at.head * args.group + base, pairs = min(args.heads_at_once, args.group - base) * tokens, tiles = (pairs + 15) / 16;
    tile_warps = tiles == 1 ? 1 : tiles == 2 ? 2 : tiles <= 4 ? 4 : 8;
    tile = warp % tile_warps, share = warp / tile_warps, shares = min(WARPS / tile_warps, MOST_SHARES);
  }
  __device__ __forceinline__ bool has_share() const { return tile < tiles && share < shares; }

  // A lot of rows on its way, zeros up to a whole number of eights, and which elements of a vector their features are the product of.
  __device__ __forceinline__ void send_for(int number) const {
    const int first = number * ROWS, count = rows_in(number), fill = (count + 7) / 8 * 8;
    if (count <= 0) return linattn_tile::copy_commit();
    const float *from = args.before + first_element + (first + warp) * width + lane;
    float *to = lot(number) + warp * PITCH + lane;
    int row = warp;
    if (args.before)
#pragma unroll 1
      for (; row < count; row += WARPS, from += WARPS * width, to += WARPS * PITCH)
#pragma unroll
        for (int s = 0; s < SLICES; ++s)
          if (is_column(s)) linattn_tile::copy_number_async(linattn_tile::shared_address(to + 32 * s), from + 32 * s, true);
#pragma unroll 1
    for (; row < fill; row += WARPS, to += WARPS * PITCH)
#pragma unroll
      for (int s = 0; s < SLICES; ++s) to[32 * s] = 0.f;
    if (thread < fill) {
      const bool is_row = thread < count;
      const float *const one = args.before + first_element + (first + thread) * width + p.value_dim;
      if (is_row && args.before) linattn_tile::copy_number_async(linattn_tile::shared_address(ones(number) + thread), one, true);
      else ones(number)[thread] = 0.f;
      factors(number)[thread] = is_row ? factors_of(begin + first + thread) : make_short2(dim, dim);
    }
    linattn_tile::copy_commit();
  }
  // Of vectors that end with a 1, at D: k_i, 1 and k_i k_j.
  __device__ __forceinline__ short2 factors_of(int row) const {
    if (row <= dim) return make_short2(row, dim);
    const int2 both = pair_of(row - dim - 1, dim);
    return make_short2(both.x, both.y);
  }

  // Where a vector lies, null for zeros; where it goes in shared memory, how far apart its numbers; whether it is to be of unit length, and what
  // it is multiplied by.
  struct Source {
    const Number *from;
    int length, to, step;
    bool is_unit;
    float scale;
  };

  // Queries, a row each; keys, a column each, and values, zeros where a token is not taken in. A lane finds out about one of its warp's.
  __device__ __forceinline__ void gather() const {
    const Source own = source(warp + WARPS * lane);
#pragma unroll 1
    for (int next = 0; warp + WARPS * next < pairs + 2 * tokens; next += AT_ONCE) fetch_some(own, next);
#pragma unroll 1
    for (int token = tokens; token < columns; ++token) {  // those that there are not
      for (int i = thread; i <= dim; i += THREADS) shared[lies.keys + i * TOKEN_PITCH + token] = 0.f;
      for (int i = thread; i < p.value_dim; i += THREADS) shared[lies.values + token * PITCH + i] = 0.f;
    }
  }
  __device__ __forceinline__ Source source(int number) const {
    if (number >= pairs + 2 * tokens) return {};
    if (number < pairs) {
      const int head = head_of(number), to = lies.queries + number * lies.pitch;
      shared[to + dim] = 1.f;
      const int64_t offset = offset_of(p.query, at.batch, first_query + head, number - head * tokens);
      return {static_cast<const Number *>(p.query.data) + offset, dim, to, 1, p.normalize_qk != 0, p.coefficients[3 * p.query_heads + first_query + head]};
    }
    const bool is_key = number < pairs + tokens;
    const int token = number - pairs - (is_key ? 0 : tokens);
    const bool is_there = is_taken(p, at.batch, token);
    const linattn_tensor &rows = is_key ? p.key : p.value;
    const Number *const from = is_there ? static_cast<const Number *>(rows.data) + offset_of(rows, at.batch, key_head, token) : nullptr;
    if (!is_key) return {from, p.value_dim, lies.values + token * PITCH, 1, false, 1.f};
    shared[lies.keys + dim * TOKEN_PITCH + token] = is_there ? 1.f : 0.f;
    return {from, dim, lies.keys + token, TOKEN_PITCH, p.normalize_qk != 0, 1.f};
  }
  // Those that lanes from `next` on found out about, who also find what they are multiplied by.
  __device__ __forceinline__ void fetch_some(const Source &own, int next) const {
    Number bits[AT_ONCE][SLICES];
#pragma unroll
    for (int v = 0; v < AT_ONCE; ++v) {
      const auto from = reinterpret_cast<const Number *>(__shfl_sync(0xffffffffu, reinterpret_cast<unsigned long long>(own.from), next + v));
      const int length = __shfl_sync(0xffffffffu, own.length, next + v);
#pragma unroll
      for (int s = 0; s < SLICES; ++s) bits[v][s] = from && lane + 32 * s < length ? from[lane + 32 * s] : Number(0);
    }
    float square = 1.f;  // of the vector that this lane found out about
#pragma unroll
    for (int v = 0; v < AT_ONCE; ++v) {
      float of_vector = 0.f;
#pragma unroll
      for (int s = 0; s < SLICES; ++s) of_vector += number_of(bits[v][s]) * number_of(bits[v][s]);
      of_vector = warp_sum(of_vector);
      if (lane == next + v) square = of_vector;
    }
    const float scale = own.scale * (!own.is_unit ? 1.f : square > SMALLEST_SQUARE ? 1.f / sqrtf(square) : 0.f);
#pragma unroll
    for (int v = 0; v < AT_ONCE; ++v) {
      const int to = __shfl_sync(0xffffffffu, own.to, next + v), length = __shfl_sync(0xffffffffu, own.length, next + v);
      const int step = __shfl_sync(0xffffffffu, own.step, next + v);
      const float of_vector = __shfl_sync(0xffffffffu, scale, next + v);
#pragma unroll
      for (int s = 0; s < SLICES; ++s)
        if (lane + 32 * s < length) shared[to + (lane + 32 * s) * step] = number_of(bits[v][s]) * of_vector;
    }
  }
  __device__ __forceinline__ float number_of(Number bits) const {
    if constexpr (DTYPE == LINATTN_FLOAT32) {
      return bits;
    } else if constexpr (DTYPE == LINATTN_BFLOAT16) {
      return __uint_as_float(static_cast<uint32_t>(bits) << 16);
    } else {
      __half_raw half;
      half.x = bits;
      return __half2float(__half(half));
    }
  }

  // f's numbers for the two pairs of this lane.
  __device__ __forceinline__ void begin_sums() {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const bool is_pair = pair(side) < pairs;
      const int head = is_pair ? head_of(pair(side)) : 0;
#pragma unroll
      for (int i = 0; i < 3; ++i) numbers[side][i] = is_pair && i <= p.degree ? p.coefficients[i * p.query_heads + first_query + head] : 0.f;
      carried[side] = fixed.carried[is_pair ? pair(side) - head * tokens : 0];
      mass[side] = 0.f;
    }
#pragma unroll
    for (int c = 0; c < PARTS; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[c][i] = 0.f;
  }

  // The weights of the tokens themselves, W_tj f(q_t . k_j), into shared memory, by one of the warps that have the tile.
  __device__ __forceinline__ void weigh_tokens() const {
    if (at.split > 0 || share > 0 || tile >= tiles) return;
    const float *const queries = shared + lies.queries + pair(0) * lies.pitch;
#pragma unroll 1
    for (int first = 0; first < columns; first += 8) {
      float scores[4] = {};
#pragma unroll 1
      for (int slice = 0; slice < dim; slice += 64) {  // tensor cores round their sums toward zero
        float sums[3][4] = {};
#pragma unroll 2
        for (int k = slice + place; k < min(dim, slice + 64) + place; k += 8) {
          float left[4], right[2], left_low[4], right_low[2];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int i = k + 4 * half;
            left[2 * half] = i < dim ? queries[i] : 0.f, left[2 * half + 1] = i < dim ? queries[8 * lies.pitch + i] : 0.f;
            right[half] = i < dim ? shared[lies.keys + i * TOKEN_PITCH + first + group] : 0.f;
          }
          split(left, left_low), split(right, right_low);
          mma_tf32(sums[0], left_low, right), mma_tf32(sums[1], left, right_low), mma_tf32(sums[2], left, right);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[i] += sums[0][i] + sums[1][i] + sums[2][i];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int side = i / 2, token = first + 2 * place + i % 2, row = pair(side) < pairs ? pair(side) - head_of(pair(side)) * tokens : 0;
        const float weight = fmaf(fmaf(numbers[side][2], scores[i], numbers[side][1]), scores[i], numbers[side][0]);
        shared[lies.weights + pair(side) * TOKEN_PITCH + token] = weight * fixed.left[row][token];
      }
    }
  }

  // sum += a b of a fragment. By factors of two parts each; in bfloat16 tensor cores cut factors to 11 bits, and what is added first makes that
  // a rounding that errs to both sides alike. A NaN stays one.
  static __device__ __forceinline__ void multiply(float (&sum)[4], const float (&a)[4], const float (&b)[2]) {
    if constexpr (PRECISE) {
      float left[4] = {a[0], a[1], a[2], a[3]}, right[2] = {b[0], b[1]}, left_low[4], right_low[2];
      split(left, left_low), split(right, right_low);
      mma_tf32(sum, left_low, right), mma_tf32(sum, left, right_low), mma_tf32(sum, left, right);
    } else {
      constexpr float UP = 1.f + 3.f / 8192.f;
      const float left[4] = {a[0] * UP, a[1] * UP, a[2] * UP, a[3] * UP}, right[2] = {b[0] * UP, b[1] * UP};
      mma_tf32(sum, left, right);
    }
  }
  // The upper 11 bits, to the nearest, and what is left.
  template <int COUNT> static __device__ __forceinline__ void split(float (&x)[COUNT], float (&low)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const float high = __uint_as_float((__float_as_uint(x[i]) + 0x1000u) & 0xffffe000u);
      low[i] = x[i] - high, x[i] = high;
    }
  }

  // What the rows of a lot, as they were before the tokens, and once the tokens themselves give the pairs of this warp's tile: this warp's share.
  __device__ __forceinline__ void read(int number) {
    if (!has_share()) return;
#pragma unroll
    for (int first = 0; first < PARTS; first += READ) read_columns(number, first);
  }
  __device__ __forceinline__ void read_columns(int number, int first) {
    const int of_lot = (rows_in(number) + 7) / 8;
    float fresh[READ][4] = {}, left[4];
    float (&to)[READ][4] = *reinterpret_cast<float (*)[READ][4]>(PRECISE ? fresh : sums + first);
#pragma unroll 1
    for (int step = share; step < of_lot; step += shares) {
      const int row = 8 * step + place;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const short2 factor = factors(number)[row + 4 * half];
        const float one = ones(number)[row + 4 * half];
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          left[2 * half + side] = feature(side, factor);
          if (first == 0) mass[side] = fmaf(left[2 * half + side], one, mass[side]);
        }
      }
      multiply_row(to, first, left, lot(number) + row * PITCH);
    }
    const int of_tokens = (share + shares - of_lot % shares) % shares;  // those with the fewest rows begin
#pragma unroll 1
    for (int row = 8 * of_tokens + place; row < columns && number == 0 && at.split == 0; row += 8 * shares) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        left[i] = shared[lies.weights + pair(i % 2) * TOKEN_PITCH + row + i / 2 * 4];
        if (first == 0) mass[i % 2] += left[i];
      }
      multiply_row(to, first, left, shared + lies.values + row * PITCH);
    }
    if constexpr (PRECISE) {
#pragma unroll
      for (int c = 0; c < READ; ++c)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[first + c][i] += fresh[c][i];
    }
  }
  __device__ __forceinline__ void multiply_row(float (&to)[READ][4], int first, const float (&left)[4], const float *from) const {
#pragma unroll
    for (int c = 0; c < READ; ++c)
      if (8 * (first + c) < p.value_dim) {
        const float *const at = from + 8 * (first + c) + group, right[2] = {at[0], at[4 * PITCH]};
        multiply(to[c], left, right);
      }
  }
  // phi(q) of a row, times K_t: [b q, a, c m_ij q_i q_j], m_ij is 2 off the diagonal.
  __device__ __forceinline__ float feature(int side, short2 factor) const {
    const float *const q = shared + lies.queries + pair(side) * lies.pitch;
    const float number = factor.y < dim ? numbers[side][2] : factor.x < dim ? numbers[side][1] : numbers[side][0];
    const float twice = factor.y < dim && factor.x != factor.y ? 2.f : 1.f;
    return carried[side] * twice * number * q[factor.x] * q[factor.y];
  }

  // The rows of a lot take the tokens in and are written, by the warps from `begin` on.
  __device__ __forceinline__ void take_in(int number, int begin) const {
    const int count = rows_in(number), warps = WARPS - begin;
    if (warp < begin) return;
#pragma unroll 1
    for (int slice = 0; slice < SLICES; slice += WIDE)
#pragma unroll 1
      for (int row = warp - begin; row < count; row += TAKEN * warps) take_in_rows(number, row, warps, slice);
    float *const to = args.after + first_element + number * ROWS * width + p.value_dim;
    for (int row = thread - 32 * begin; row < count; row += 32 * warps) to[row * width] = one_behind(number, row);
  }
  // Every `step`th of some rows from `first` on, WIDE slices of them.
  __device__ __forceinline__ void take_in_rows(int number, int first, int step, int slice) const {
    const int count = rows_in(number), column = lane + 32 * slice;
    short2 factor[TAKEN];
    float x[TAKEN][WIDE];
#pragma unroll
    for (int r = 0; r < TAKEN; ++r) {
      const int row = min(first + r * step, count - 1);
      factor[r] = factors(number)[row];
#pragma unroll
      for (int s = 0; s < WIDE; ++s) x[r][s] = lot(number)[row * PITCH + column + 32 * s] * fixed.carried[MOST_TOKENS];
    }
#pragma unroll 1
    for (int token = 0; token < tokens; token += 4) {
      float value[4][WIDE];
#pragma unroll
      for (int t = 0; t < 4; ++t)
#pragma unroll
        for (int s = 0; s < WIDE; ++s) value[t][s] = shared[lies.values + (token + t) * PITCH + column + 32 * s] * fixed.left[MOST_TOKENS][token + t];
#pragma unroll
      for (int r = 0; r < TAKEN; ++r) {
        const float4 keys = features_of_keys(factor[r], token);
#pragma unroll
        for (int s = 0; s < WIDE; ++s) {
          x[r][s] = fmaf(keys.x, value[0][s], x[r][s]), x[r][s] = fmaf(keys.y, value[1][s], x[r][s]);
          x[r][s] = fmaf(keys.z, value[2][s], x[r][s]), x[r][s] = fmaf(keys.w, value[3][s], x[r][s]);
        }
      }
    }
    float *const to = args.after + first_element + number * ROWS * width + column;
#pragma unroll
    for (int r = 0; r < TAKEN; ++r)
#pragma unroll
      for (int s = 0; s < WIDE; ++s)
        if (first + r * step < count && is_column(slice + s)) to[(first + r * step) * width + 32 * s] = x[r][s];
  }
  __device__ __forceinline__ float one_behind(int number, int row) const {
    const float *const last = fixed.left[MOST_TOKENS];
    float one = ones(number)[row] * fixed.carried[MOST_TOKENS];
#pragma unroll 1
    for (int next = 0; next < tokens; next += 4) {
      const float4 keys = features_of_keys(factors(number)[row], next);
      one = fmaf(keys.x, last[next], one), one = fmaf(keys.y, last[next + 1], one);
      one = fmaf(keys.z, last[next + 2], one), one = fmaf(keys.w, last[next + 3], one);
    }
    return one;
  }
  // psi(k) of a row and four tokens.
  __device__ __forceinline__ float4 features_of_keys(short2 factor, int token) const {
    const float *const keys = shared + lies.keys + token;
    const float4 x = *reinterpret_cast<const float4 *>(keys + factor.x * TOKEN_PITCH), y = *reinterpret_cast<const float4 *>(keys + factor.y * TOKEN_PITCH);
    return make_float4(x.x * y.x, x.y * y.y, x.z * y.z, x.w * y.w);
  }

  // The sums of every share of rows, over what all have read.
  __device__ __forceinline__ void leave_sums() {
    if (!has_share()) return;
    float *const to = shared + (16 * (share * tiles + tile) + group) * PITCH + 2 * place;
#pragma unroll
    for (int c = 0; c < PARTS; ++c)
#pragma unroll
      for (int i = 0; i < 2; ++i) *reinterpret_cast<float2 *>(to + 8 * i * PITCH + 8 * c) = make_float2(sums[c][2 * i], sums[c][2 * i + 1]);
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      for (int step = 1; step <= 2; step *= 2) mass[side] += __shfl_xor_sync(0xffffffffu, mass[side], step);
      if (place == 0) fixed.masses[warp][group + 8 * side] = mass[side];
    }
  }
  // Adds them up, in a fixed order, and divides, a warp a pair; or leaves them to the second kernel.
  __device__ __forceinline__ void write() const {
#pragma unroll 1
    for (int pair = warp; pair < pairs; pair += WARPS) {
      const int head = head_of(pair), token = pair - head * tokens, query_head = first_query + head;
      const int64_t number = (static_cast<int64_t>(at.batch) * p.query_heads + query_head) * tokens + token;
      const float *from = shared + pair * PITCH + lane, *masses = &fixed.masses[pair / 16][pair % 16];
      float sum[SLICES] = {}, total = 0.f;
#pragma unroll 1
      for (int other = 0; other < shares; ++other, from += 16 * PITCH * tiles, masses += 16 * tile_warps) {
        total += *masses;
#pragma unroll
        for (int s = 0; s < SLICES; ++s) sum[s] += from[32 * s];
      }
      if (args.splits > 1) write_part(args.partials + (number * args.splits + at.split) * width, sum, total);
      else write_row(offset_of(args.out, at.batch, query_head, token), number, sum, sees(p, at.batch, token) ? total : 0.f);
    }
  }
  __device__ __forceinline__ void write_part(float *part, const float (&sum)[SLICES], float total) const {
#pragma unroll
    for (int s = 0; s < SLICES; ++s)
      if (is_column(s)) part[lane + 32 * s] = sum[s];
    if (lane == 0) part[p.value_dim] = total;
  }
  __device__ __forceinline__ void write_row(int64_t row, int64_t number, const float (&sum)[SLICES], float total) const {
    const float inverse = total == 0.f ? 0.f : 1.f / total;
#pragma unroll
    for (int s = 0; s < SLICES; ++s)
      if (is_column(s)) store(args.out.data, p.dtype, row + lane + 32 * s, total == 0.f ? 0.f : sum[s] * inverse);
    if (lane == 0 && args.mass) args.mass[number] = total;
  }
};

}  // namespace
}  // namespace linattn
