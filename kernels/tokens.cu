// architectures: sm_80 compute_80 sm_90
// Up to 16 new tokens a sequence, as chunks of a prompt, drafts that are verified and the turns of a conversation bring them, all at once:
//   num_t = K_t phi(q_t)^T S + sum_{j <= t} W_tj f(q_t . k_j) [v_j, 1]^T,   S <- K S + sum_j W_j psi(k_j) [v_j, 1]^T,
// where W_tj is what decays leave of token j at token t, 0 across runs, K_t what they leave of the state before, and K and W_j the same behind
// the last token. The state comes from memory once, by lots of rows of which two are on their way, and goes back once.
//
// Rows of the products are pairs of a query head and a token, 16 to a tile of the tensor cores (tf32; in float32 each factor in two parts, as
// scores always are). Warps share tiles, and where there are fewer tiles than warps also the rows of a lot. The state itself, and the sums of
// weights, are summed in float32 by ordinary instructions, a warp a row.
#include "decode.cuh"
#include "tile/instructions.cuh"

namespace linattn {
namespace {

constexpr int MOST_TOKENS = 16;
constexpr int KEY_PITCH = 20;  // floats between a dimension of all keys and the next

// SLICES of 32 numbers hold D and Dv; PRECISE: inputs are float32.
template <int SLICES, bool PRECISE> struct Tokens {
  static constexpr int COLUMNS = 32 * SLICES, PARTS = COLUMNS / 8, PITCH = COLUMNS + 8;
  static constexpr int ROWS = SLICES <= 2 ? 72 : SLICES == 4 ? 48 : 16;        // of a lot: at D = 64 one lot is the whole first degree
  static constexpr int MOST_TILES = SLICES <= 2 ? 8 : SLICES == 4 ? 2 : 1;     // of pairs, in a round
  static constexpr int MOST_SHARES = SLICES <= 4 ? 8 : 4;                      // of a lot's rows among warps
  static constexpr int READ = PARTS < 16 ? PARTS : SLICES < 8 ? 16 : 8;                         // eights of columns that a row is read for together
  static constexpr int AT_ONCE = SLICES <= 2 ? 8 : SLICES == 4 ? 4 : 2;        // vectors that a warp has on their way
  static constexpr int WIDE = SLICES < 2 ? SLICES : 2;                         // slices that a row of the state takes in together
  struct Fixed {
    float keep[MOST_TOKENS];                  // exp(log_decay), and 0 where a run begins
    float left[MOST_TOKENS + 1][MOST_TOKENS];  // W_tj: of token j at token t; below, where t = MOST_TOKENS, W_j
    float carried[MOST_TOKENS + 1];           // K_t, and K
    bool taken[MOST_TOKENS], seeing[MOST_TOKENS];
    float masses[WARPS][16];
  };
  // Where a block's arrays begin in shared memory, in floats.
  struct Layout {
    int queries, keys, values, ones, factors, end, pitch;
    __host__ __device__ Layout(int dim, int tiles) {
      pitch = (dim + 28) / 32 * 32 + 4;  // rows of a fragment in other banks; room for a 1 behind
      queries = 2 * ROWS * PITCH, keys = queries + 16 * tiles * pitch, values = keys + (dim + 1) * KEY_PITCH;
      ones = values + MOST_TOKENS * PITCH, factors = ones + 2 * ROWS, end = factors + 2 * ROWS;
    }
  };
  static int heads_at_once(const linattn_problem &p) { return std::min<int>(p.query_heads / p.state_heads, 16 * MOST_TILES / static_cast<int>(p.length)); }
  static int shared_bytes(const linattn_problem &p) { return 4 * Layout(p.head_dim, (heads_at_once(p) * static_cast<int>(p.length) + 15) / 16).end; }

  const StepArguments &args;
  const linattn_problem &p;
  Fixed &fixed;
  float *const shared;
  const int thread, warp, lane, group, place;
  const Place at;
  const int key_head, width, dim, tokens;
  const int begin, rows;       // the block's rows of the state
  const int64_t first_element;  // of them, in the state
  int first_query, heads, pairs, tiles, tile_warps, shares;  // of this round
  int tile, share;             // of pairs, and of a lot's rows, that are this warp's
  const Layout lies;
  float sums[PARTS][4], mass[2];   // of pairs group and group + 8 of the tile
  float weight_of[2][4];           // a, b, c and 2 c, times K_t

  __device__ __forceinline__ Tokens(const StepArguments &args, Fixed &fixed, float *shared, int most_tiles)
      : args(args), p(args.problem), fixed(fixed), shared(shared), thread(threadIdx.x), warp(thread / 32), lane(thread % 32), group(lane / 4), place(lane % 4),
        key_head(key_head_of(args, at.head)), width(p.value_dim + 1), dim(p.head_dim), tokens(static_cast<int>(p.length)), begin(at.split * args.rows_each),
        rows(max(0, min(args.features - begin, args.rows_each))), first_element(((static_cast<int64_t>(at.batch) * p.state_heads + at.head) * args.features + begin) * width),
        lies(p.head_dim, most_tiles) {}

  __device__ __forceinline__ bool is_column(int slice) const { return lane + 32 * slice < p.value_dim; }
  __device__ __forceinline__ int64_t element(int row, int column) const { return first_element + static_cast<int64_t>(row) * width + column; }
  __device__ __forceinline__ float *lot(int number) const { return shared + number % 2 * ROWS * PITCH; }
  __device__ __forceinline__ float *ones(int number) const { return shared + lies.ones + number % 2 * ROWS; }
  __device__ __forceinline__ short2 *factors(int number) const { return reinterpret_cast<short2 *>(shared + lies.factors) + number % 2 * ROWS; }
  __device__ __forceinline__ int rows_in(int number) const { return min(ROWS, rows - number * ROWS); }
  __device__ __forceinline__ const float *query(int side) const { return shared + lies.queries + (16 * tile + group + 8 * side) * lies.pitch; }
  __device__ __forceinline__ int pair(int side) const { return 16 * tile + group + 8 * side; }  // head * tokens + token

  __device__ __forceinline__ void begin_round(int base, int most) {
    first_query = at.head * args.group + base, heads = min(most, args.group - base), pairs = heads * tokens, tiles = (pairs + 15) / 16;
    tile_warps = 1;
    while (tile_warps < tiles) tile_warps *= 2;
    tile = warp % tile_warps, share = warp / tile_warps, shares = min(WARPS / tile_warps, MOST_SHARES);
  }

  // A lot of rows on its way, zeros up to a whole number of eights, and which elements of a vector their features are the product of.
  __device__ __forceinline__ void send_for(int number) const {
    const int first = number * ROWS, count = rows_in(number);
    for (int row = warp; row < count + 7 - (count + 7) % 8; row += WARPS)
#pragma unroll
      for (int s = 0; s < SLICES; ++s) bring(lot(number) + row * PITCH + lane + 32 * s, row < count && is_column(s), element(first + row, lane + 32 * s));
    if (thread < ROWS && count > 0) {
      bring(ones(number) + thread, thread < count, element(first + thread, p.value_dim));
      factors(number)[thread] = thread < count ? factors_of(begin + first + thread) : make_short2(-1, 0);
    }
    linattn_tile::copy_commit();
  }
  __device__ __forceinline__ void bring(float *to, bool is_there, int64_t from) const {
    if (!args.before) *to = 0.f;
    else linattn_tile::copy_number_async(linattn_tile::shared_address(to), args.before + (is_there ? from : 0), is_there);
  }
  // Of vectors that end with a 1, at D: k_i, 1 and k_i k_j.
  __device__ __forceinline__ short2 factors_of(int row) const {
    if (row <= dim) return make_short2(row, dim);
    const int2 both = pair_of(row - dim - 1, dim);
    return make_short2(both.x, both.y);
  }

  // Queries, a row each; keys, a column each, and values, zeros where a token is not taken in.
  __device__ __forceinline__ void gather() const {
    const int columns = tokens + 7 - (tokens + 7) % 8, all = pairs + 2 * columns;
    for (int next = warp; next < all; next += WARPS * AT_ONCE) {
      Vector some[AT_ONCE];
#pragma unroll
      for (int v = 0; v < AT_ONCE; ++v) some[v] = vector(next + v * WARPS, columns, all);
      fetch<SLICES>(some, p);
    }
  }
  __device__ __forceinline__ Vector vector(int number, int columns, int all) const {
    if (number >= all) return {};
    if (number < pairs) {
      const int head = number / tokens;
      float *const to = shared + lies.queries + number * lies.pitch;
      if (lane == 0) to[dim] = 1.f;
      return query_of(p, at.batch, first_query + head, number - head * tokens, to);
    }
    const int token = (number - pairs) % columns;
    const bool is_there = token < tokens && is_taken(p, at.batch, token);
    Vector found;
    if (number < pairs + columns) {
      float *const to = shared + lies.keys + token;
      if (lane == 0) to[dim * KEY_PITCH] = is_there ? 1.f : 0.f;
      found = key_of(p, at.batch, key_head, token, to), found.stride = KEY_PITCH;
    } else {
      found = {p.value.data, offset_of(p.value, at.batch, key_head, token), p.value_dim, false, 1.f, shared + lies.values + token * PITCH, 1};
    }
    if (!is_there) found.from = nullptr;
    return found;
  }

  // What is said of each token, and then what decays leave of one at another.
  __device__ __forceinline__ void look_at_tokens() const {
    if (thread >= tokens) return;
    const int state_head = at.batch * p.state_heads + at.head;
    const bool begins = thread > 0 && run_of(p, at.batch, thread) != run_of(p, at.batch, thread - 1);
    const float rate = !p.log_decay ? 0.f : p.log_decay_per_token ? p.log_decay[static_cast<int64_t>(state_head) * tokens + thread] : p.log_decay[at.head];
    fixed.keep[thread] = begins ? 0.f : expf(rate);
    fixed.taken[thread] = is_taken(p, at.batch, thread), fixed.seeing[thread] = sees(p, at.batch, thread);
  }
  __device__ __forceinline__ void find_what_is_left() const {
    const int t = thread / MOST_TOKENS, j = thread % MOST_TOKENS;
    fixed.left[t][j] = t >= tokens || j > t || !fixed.taken[j] ? 0.f : kept(j, t);
    if (thread < MOST_TOKENS) fixed.left[MOST_TOKENS][thread] = thread >= tokens || !fixed.taken[thread] ? 0.f : kept(thread, tokens - 1);
    if (thread <= MOST_TOKENS) fixed.carried[thread] = kept(-1, min(thread, tokens - 1));
  }
  __device__ __forceinline__ float kept(int behind, int last) const {
    float product = 1.f;
    for (int s = behind + 1; s <= last; ++s) product *= fixed.keep[s];
    return product;
  }

  // f's numbers for the two pairs of this lane, and what they make of the tokens themselves: by one of the warps that have the tile.
  __device__ __forceinline__ void begin_sums() {
    float numbers[2][3];
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const bool is_pair = pair(side) < pairs;
      const int head = is_pair ? pair(side) / tokens : 0, token = is_pair ? pair(side) - head * tokens : 0;
#pragma unroll
      for (int i = 0; i < 3; ++i) numbers[side][i] = is_pair && i <= p.degree ? p.coefficients[i * p.query_heads + first_query + head] : 0.f;
      const float carried = fixed.carried[token];
      weight_of[side][0] = numbers[side][0] * carried, weight_of[side][1] = numbers[side][1] * carried;
      weight_of[side][2] = numbers[side][2] * carried, weight_of[side][3] = 2.f * weight_of[side][2];
      mass[side] = 0.f;
    }
#pragma unroll
    for (int c = 0; c < PARTS; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[c][i] = 0.f;
    if (at.split > 0 || share > 0 || tile >= tiles) return;
#pragma unroll
    for (int first = 0; first < MOST_TOKENS; first += 8)
      if (first < tokens) see_tokens(first, numbers);
  }
  __device__ __forceinline__ void see_tokens(int first, const float (&numbers)[2][3]) {
    float weights[4] = {};
    for (int slice = 0; slice < dim; slice += 64) {  // tensor cores round their sums toward zero
      float scores[4] = {};
      for (int k = slice; k < min(dim, slice + 64); k += 8) {
        float left[4], right[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int i = k + place + 4 * half;
          left[2 * half] = i < dim ? query(0)[i] : 0.f, left[2 * half + 1] = i < dim ? query(1)[i] : 0.f;
          right[half] = i < dim ? shared[lies.keys + i * KEY_PITCH + first + group] : 0.f;
        }
        multiply_in_parts<true>(scores, left, right);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) weights[i] += scores[i];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int side = i / 2, token = pair(side) < pairs ? pair(side) % tokens : 0;
      const float s = weights[i];
      weights[i] = fmaf(fmaf(numbers[side][2], s, numbers[side][1]), s, numbers[side][0]) * fixed.left[token][first + 2 * place + i % 2];
      mass[side] += weights[i];
    }
    const float left[4] = {weights[0], weights[2], weights[1], weights[3]};  // token 2 place + i takes the place that the instruction numbers place + 4 i
    const float *const values = shared + lies.values + (first + 2 * place) * PITCH + group;
#pragma unroll
    for (int c = 0; c < PARTS; ++c) {
      if (8 * c >= p.value_dim) break;
      const float right[2] = {values[8 * c], values[PITCH + 8 * c]};
      multiply_in_parts<true>(sums[c], left, right);
    }
  }

  // sum += a b of a fragment, where PARTED by factors of two parts each.
  template <bool PARTED> static __device__ __forceinline__ void multiply_in_parts(float (&sum)[4], const float (&a)[4], const float (&b)[2]) {
    float a_high[4], a_low[4], b_high[2], b_low[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) a_high[i] = round_to_tf32(a[i]), a_low[i] = a[i] - a_high[i];
#pragma unroll
    for (int i = 0; i < 2; ++i) b_high[i] = round_to_tf32(b[i]), b_low[i] = b[i] - b_high[i];
    if (PARTED) mma_tf32(sum, a_low, b_high), mma_tf32(sum, a_high, b_low);
    mma_tf32(sum, a_high, b_high);
  }

  // phi(q) of a row, times K_t: [b q, a, c m_ij q_i q_j], m_ij is 2 off the diagonal.
  __device__ __forceinline__ float feature(int side, short2 factor) const {
    const float *const weight = weight_of[side], *const q = query(side);
    if (factor.x < 0) return 0.f;
    const float of_kind = factor.y < dim ? (factor.x == factor.y ? weight[2] : weight[3]) : factor.x < dim ? weight[1] : weight[0];
    return of_kind * q[factor.x] * q[factor.y];
  }

  // What the rows of a lot, as they were before the tokens, give the pairs of this warp's tile: this warp's share of them.
  __device__ __forceinline__ void read(int number) {
    if (tile >= tiles || share >= shares) return;
#pragma unroll
    for (int first = 0; first < PARTS; first += READ) read_columns(number, first);
  }
  __device__ __forceinline__ void read_columns(int number, int first) {
    const float *const from = lot(number) + place * PITCH + group;
    float fresh[READ][4] = {};
#pragma unroll 1
    for (int row = 8 * share; row < rows_in(number); row += 8 * shares) {
      float left[4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const short2 factor = factors(number)[row + place + 4 * half];
        const float one = ones(number)[row + place + 4 * half];
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          left[2 * half + side] = feature(side, factor);
          if (first == 0) mass[side] = fmaf(left[2 * half + side], one, mass[side]);
        }
      }
#pragma unroll
      for (int c = 0; c < READ; ++c) {
        const int column = 8 * (first + c);
        if (column >= p.value_dim) break;
        const float right[2] = {from[row * PITCH + column], from[(row + 4) * PITCH + column]};
        multiply_in_parts<PRECISE>(PRECISE ? fresh[c] : sums[first + c], left, right);
      }
    }
    if (!PRECISE) return;
#pragma unroll
    for (int c = 0; c < READ; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[first + c][i] += fresh[c][i];
  }

  // The rows of a lot take the tokens in and are written.
  __device__ __forceinline__ void take_in(int number) const {
    const float *const from = lot(number), *const last = fixed.left[MOST_TOKENS], carried = fixed.carried[MOST_TOKENS];
    const int first = number * ROWS, count = rows_in(number);
#pragma unroll 1
    for (int slice = 0; slice < SLICES; slice += WIDE) {
      float value[MOST_TOKENS][WIDE];
#pragma unroll
      for (int t = 0; t < MOST_TOKENS; ++t)
#pragma unroll
        for (int s = 0; s < WIDE; ++s) value[t][s] = t < tokens && is_column(slice + s) ? shared[lies.values + t * PITCH + lane + 32 * (slice + s)] * last[t] : 0.f;
#pragma unroll 1
      for (int row = warp; row < count; row += WARPS) {
        const short2 factor = factors(number)[row];
        float x[WIDE];
#pragma unroll
        for (int s = 0; s < WIDE; ++s) x[s] = from[row * PITCH + lane + 32 * (slice + s)] * carried;
#pragma unroll
        for (int next = 0; next < MOST_TOKENS; next += 4) {
          if (next >= tokens) break;
          const float4 keys = features_of_keys(factor, next);
#pragma unroll
          for (int s = 0; s < WIDE; ++s) {
            x[s] = fmaf(keys.x, value[next][s], x[s]), x[s] = fmaf(keys.y, value[next + 1][s], x[s]);
            x[s] = fmaf(keys.z, value[next + 2][s], x[s]), x[s] = fmaf(keys.w, value[next + 3][s], x[s]);
          }
        }
#pragma unroll
        for (int s = 0; s < WIDE; ++s)
          if (is_column(slice + s)) args.after[element(first + row, lane + 32 * (slice + s))] = x[s];
      }
    }
    if (thread < count) args.after[element(first + thread, p.value_dim)] = one_behind(number);
  }
  __device__ __forceinline__ float one_behind(int number) const {
    const float *const last = fixed.left[MOST_TOKENS];
    float one = ones(number)[thread] * fixed.carried[MOST_TOKENS];
    for (int next = 0; next < tokens; next += 4) {
      const float4 keys = features_of_keys(factors(number)[thread], next);
      one = fmaf(keys.x, last[next], one), one = fmaf(keys.y, last[next + 1], one);
      one = fmaf(keys.z, last[next + 2], one), one = fmaf(keys.w, last[next + 3], one);
    }
    return one;
  }
  // psi(k) of a row and four tokens.
  __device__ __forceinline__ float4 features_of_keys(short2 factor, int token) const {
    const float *const keys = shared + lies.keys + token;
    const float4 x = *reinterpret_cast<const float4 *>(keys + factor.x * KEY_PITCH), y = *reinterpret_cast<const float4 *>(keys + factor.y * KEY_PITCH);
    return make_float4(x.x * y.x, x.y * y.y, x.z * y.z, x.w * y.w);
  }

  // Adds up the warps that share a tile, in a fixed order, over what all have read.
  __device__ __forceinline__ void add_up() {
#pragma unroll
    for (int side = 0; side < 2; ++side)
      for (int step = 1; step <= 2; step *= 2) mass[side] += __shfl_xor_sync(0xffffffffu, mass[side], step);
    const bool has_sums = tile < tiles && share < shares;
    if (has_sums && share > 0) {
      float *const to = shared + ((share - 1) * tiles + tile) * 16 * PITCH + group * PITCH + 2 * place;
#pragma unroll
      for (int c = 0; c < PARTS; ++c)
#pragma unroll
        for (int i = 0; i < 4; ++i) to[i / 2 * 8 * PITCH + 8 * c + i % 2] = sums[c][i];
      if (place < 2) fixed.masses[warp][group + 8 * place] = place == 0 ? mass[0] : mass[1];
    }
    __syncthreads();
    if (!has_sums || share > 0) return;
    for (int other = 1; other < shares; ++other) {
      const float *const from = shared + ((other - 1) * tiles + tile) * 16 * PITCH + group * PITCH + 2 * place;
#pragma unroll
      for (int c = 0; c < PARTS; ++c)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[c][i] += from[i / 2 * 8 * PITCH + 8 * c + i % 2];
      const float *const masses = fixed.masses[other * tile_warps + tile];
      mass[0] += masses[group], mass[1] += masses[group + 8];
    }
  }

  // Divides; or leaves the sums to the second kernel.
  __device__ __forceinline__ void write() const {
    if (tile >= tiles || share > 0) return;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      if (pair(side) >= pairs) continue;
      const int head = pair(side) / tokens, token = pair(side) - head * tokens, query_head = first_query + head;
      const int64_t number = (static_cast<int64_t>(at.batch) * p.query_heads + query_head) * tokens + token;
      if (args.splits > 1) write_part(args.partials + (number * args.splits + at.split) * width, side);
      else write_row(offset_of(args.out, at.batch, query_head, token), number, side, fixed.seeing[token] ? mass[side] : 0.f);
    }
  }
  __device__ __forceinline__ void write_part(float *part, int side) const {
#pragma unroll
    for (int c = 0; c < PARTS; ++c)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (8 * c + 2 * place + i < p.value_dim) part[8 * c + 2 * place + i] = sums[c][2 * side + i];
    if (place == 0) part[p.value_dim] = mass[side];
  }
  __device__ __forceinline__ void write_row(int64_t row, int64_t number, int side, float total) const {
#pragma unroll
    for (int c = 0; c < PARTS; ++c)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (8 * c + 2 * place + i < p.value_dim) store(args.out.data, p.dtype, row + 8 * c + 2 * place + i, total == 0.f ? 0.f : sums[c][2 * side + i] / total);
    if (place == 0 && args.mass) args.mass[number] = total;
  }
};

template <int SLICES, bool PRECISE> __global__ void __launch_bounds__(THREADS, SLICES <= 2 ? 2 : 1) tokens_kernel(const StepArguments args, int most_heads) {
  using Work = Tokens<SLICES, PRECISE>;
  extern __shared__ __align__(16) float shared[];
  __shared__ typename Work::Fixed fixed;
  Work work(args, fixed, shared, (most_heads * static_cast<int>(args.problem.length) + 15) / 16);
  for (int base = 0; base < args.group; base += most_heads) {
    work.begin_round(base, most_heads);
    work.send_for(0), work.send_for(1);
    work.look_at_tokens();
    work.gather();
    __syncthreads();
    work.find_what_is_left();
    __syncthreads();
    work.begin_sums();
    for (int number = 0; work.rows_in(number) > 0; ++number) {
      linattn_tile::copy_wait<1>();
      __syncthreads();
      work.read(number);
      if (base + most_heads >= args.group && args.after) work.take_in(number);
      __syncthreads();
      work.send_for(number + 2);
    }
    work.add_up();
    work.write();
    __syncthreads();
  }
}

// The kernel for a call.
struct Kernel {
  int (*heads_at_once)(const linattn_problem &);
  int (*shared_bytes)(const linattn_problem &);
  void (*kernel)(StepArguments, int);
};
template <int SLICES, bool PRECISE> Kernel kernel_of() { return {Tokens<SLICES, PRECISE>::heads_at_once, Tokens<SLICES, PRECISE>::shared_bytes, tokens_kernel<SLICES, PRECISE>}; }
template <bool PRECISE> Kernel kernel_of(int dim) {
  return dim <= 32 ? kernel_of<1, PRECISE>() : dim <= 64 ? kernel_of<2, PRECISE>() : dim <= 128 ? kernel_of<4, PRECISE>() : kernel_of<8, PRECISE>();
}
Kernel kernel_of(const linattn_problem &p) {
  const int dim = std::max(p.head_dim, p.value_dim);
  return p.dtype == LINATTN_FLOAT32 ? kernel_of<true>(dim) : kernel_of<false>(dim);
}

bool plan_tokens(const linattn_problem &problem, linattn_plan &plan) {
  if (problem.length > MOST_TOKENS || !problem.causal || problem.dropout_p) return false;
  plan_splits(problem, splits_of(problem), plan);
  plan.shared_bytes = kernel_of(problem).shared_bytes(problem);
  return true;
}

cudaError_t run_tokens(const linattn_problem &problem, const linattn_forward_result &result, const float *before, const linattn_plan &plan) {
  const cudaStream_t stream = static_cast<cudaStream_t>(problem.stream);
  const StepArguments args = step_arguments(problem, result, before, plan);
  const Kernel found = kernel_of(problem);
  const auto kernel = found.kernel;
  const int heads = found.heads_at_once(problem);
  if (const cudaError_t failed = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes)) return failed;
  kernel<<<blocks_of(args), THREADS, plan.shared_bytes, stream>>>(args, heads);
  return launch_join(args, stream);
}

}  // namespace

bool tokens_plan_forward(const linattn_problem &problem, const linattn_forward_result &result, linattn_plan &plan) {
  return (problem.initial_state || result.state) && plan_tokens(problem, plan);
}
bool tokens_plan_step(const linattn_problem &problem, const linattn_forward_result &result, linattn_plan &plan) { return result.state && plan_tokens(problem, plan); }

cudaError_t tokens_forward(const linattn_problem &problem, const linattn_forward_result &result, const linattn_plan &plan) {
  return run_tokens(problem, result, problem.initial_state, plan);
}
cudaError_t tokens_step(const linattn_problem &problem, const linattn_forward_result &result, const linattn_plan &plan) { return run_tokens(problem, result, result.state, plan); }

}  // namespace linattn
