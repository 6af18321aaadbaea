// The second degree over 16 features in one pass along a sequence: a block walks over chunks of 128 tokens of a head, pairs are formed inside the chunk, and what
// lies outside of it is in a state that never leaves the multiprocessor. Two warpgroups read, 64 of the chunk's tokens each; a third keeps the state, one chunk ahead of them.
//
// With x the unit vectors, rounded, the state is the S and the R of state_sums.cuh: forward in the sequence, of keys, for the output and the gradient of queries; backward, of
// queries, for those of keys and values. Its rows, one for each x_a x_b and then one for each x_a, lie in shared memory as wgmma reads them, the next chunk's beside this one's.
#pragma once
#include "pairs/group_gradients.cuh"

namespace linattn_pairs {

constexpr int kRunKeys = 16, kRunValues = 64, kRunItems = 16, kRunRows = 16 * kRunItems + kRunKeys;
constexpr int kReaders = 256, kKeepers = 128, kRunThreads = kReaders + kKeepers;
constexpr int kRunEdgeChunks = 16;
constexpr int kStartFloats = 142 * kKeepers;  // of a state, as its keepers' registers have it, and what is left of it behind a segment
constexpr int kKeeperRegisters = 200, kReaderRegisters = 152, kRunBringerRegisters = 56;
constexpr float kSteepest = -32.f;  // log2 of a chunk's decay down to which a pair's is a product of one factor a token

enum RunBarrier { kMarginsWritten = 1, kTotalsWritten };
enum class Pass { OUTPUT, ROWS, COLUMNS };  // ROWS: the gradient of queries; COLUMNS: those of keys and values

// What of A dA reaches over the edges between chunks, where a decay wants a gradient: see running_flow.cuh.
struct RunningFlow {
  int32_t edges;           // whose states are kept, one behind every kRunEdgeChunks chunks
  float *states[2];        // before and behind each of them: (batch, key heads, edges, kStartFloats)
  float *rows, *columns;   // of each chunk's tokens with those out of their state, a sum a warp: (batch, query or key heads, chunks, kWarps); null: nobody asks
  double *chunks, *known;  // (batch, key heads, chunks): of all sums of a chunk, rows' less columns'; what reaches over the edge before it
};

struct Running {
  Gradients of;        // of the output those without a gradient in their name are set
  linattn_tensor out;  // where a forward pass puts results, and masses
  float *mass;
  int32_t chunks, segment, segments;  // chunks of a sequence, and of a segment, whose block begins with a state out of memory
  float *starts;                      // (batch, key heads, segments, kStartFloats)
  RunningFlow flow;
};

// Where x_a x_b stands among the state's rows: eight b of one a, then those of the next a; pairs of a by blocks of b.
__device__ __forceinline__ constexpr int row_of(int a, int b) { return 32 * (a / 2) + 16 * (b / 8) + 8 * (a % 2) + b % 8; }

// Of the state what is not in its rows.
struct alignas(16) StateMargins {
  float masses[kRunKeys][kRunKeys], lines[kRunKeys], values[kRunValues], count;  // of x_a x_b and of x_a; of the constant feature
  __device__ __forceinline__ float inverse_count() const { return count == 0.f ? 0.f : 1.f / count; }
};

// A chunk's tokens as its pairs and the state need them. The others are keys, beside columns queries.
struct ChunkNumbers {
  alignas(16) float exponent[kRunTokens], own[kRunTokens];     // of the decay from the chunk's edge on; what lies between a token and its state
  alignas(16) float unit[kRunTokens], factor[kRunTokens];      // of a key: 1 / |k|; where a pair's decay is a product, its own part
  alignas(16) float mass_weight[kRunTokens];                   // of the others in the state's masses
  alignas(16) float4 of_query[kRunTokens];                     // see QueryOnWay
  alignas(16) int32_t query_run[kRunTokens], key_run[kRunTokens];
  float kept;     // what is left of the state behind the chunk
  int32_t mixed;  // whether each pair has a gate of its own
};

// What a chunk's others are in the state, by their numbers: 16 rows of 64 tokens, and the same of the next 64.
template <Pass PASS> struct FeatureTiles {
  static constexpr bool BACK = PASS == Pass::COLUMNS;
  static constexpr int TILE = kRunKeys * kKeys * 2, ALL = kRunTokens / kKeys * TILE;
  static constexpr int UNITS = 0, WEIGHTED = ALL, LINES = BACK ? 2 * ALL : ALL, CONSTANT = LINES + ALL;  // unit vectors; with gamma and their weight; with beta and it; a and it
  static constexpr int BYTES = (CONSTANT + kRunTokens * 2 + 1023) / 1024 * 1024;
  static __device__ __forceinline__ int at(int number, int token) { return token / kKeys * TILE + Tile<kKeys>::at(number, token % kKeys / 8) + token % 8 * 2; }
};

template <Pass PASS> struct RunShape {
  static constexpr int X = kRunTokens * kRunKeys * 2, Y = kRunTokens * kRunValues * 2, OTHERS = X + Y, OWN = PASS == Pass::OUTPUT ? X : OTHERS;
  static constexpr int STATE = kRunRows * kRunValues * 2;
  static constexpr int OTHERS_AT = 2 * STATE, OWN_AT = OTHERS_AT + 2 * OTHERS, RESULTS_AT = OWN_AT + 2 * OWN, FEATURES_AT = RESULTS_AT + (PASS == Pass::OUTPUT ? Y : 0);
  static constexpr int MARGINS_AT = FEATURES_AT + 2 * FeatureTiles<PASS>::BYTES;
  static constexpr int NUMBERS_AT = MARGINS_AT + 2 * sizeof(StateMargins), TOTALS_AT = NUMBERS_AT + 2 * sizeof(ChunkNumbers), SHARED = TOTALS_AT + kWarps * 3 * 4;
};

// What a block works on: steps over the chunks of a head's segment, and beside columns over the query heads that share its keys.
template <Pass PASS> struct RunPlace {
  static constexpr bool BACK = PASS == Pass::COLUMNS;
  const linattn_problem &p;
  const int heads, segment, batch, head, key_head, first_head, first, chunks;  // heads: of queries, for each chunk; head: of queries, or beside columns of keys
  const bool has_start;
  // all_heads: of a sequence, those that have blocks of their own; of keys or of queries.
  __device__ __forceinline__ RunPlace(const Running &args, int all_heads)
      : p(args.of.problem), heads(BACK ? p.query_heads / p.key_heads : 1), segment(blockIdx.x % args.segments), batch(blockIdx.x / args.segments / all_heads),
        head(blockIdx.x / args.segments % all_heads), key_head(head / (all_heads / p.key_heads)), first_head(head * (p.query_heads / all_heads)), first(segment * args.segment),
        chunks(min(args.segment, args.chunks - first)), has_start(BACK ? first + chunks < args.chunks : first > 0) {}
  __device__ __forceinline__ int steps() const { return chunks * heads; }
  __device__ __forceinline__ int64_t begin_of(int step) const { return static_cast<int64_t>(chunk_of(step)) * kRunTokens; }
  __device__ __forceinline__ int count_of(int64_t begin) const { return static_cast<int>(min(p.length - begin, static_cast<int64_t>(kRunTokens))); }
  __device__ __forceinline__ int query_head(int step) const { return first_head + (BACK ? step % heads : 0); }
  __device__ __forceinline__ int chunk_of(int step) const { return first + (BACK ? chunks - 1 - step / heads : step); }
  __device__ __forceinline__ int64_t key_pair() const { return static_cast<int64_t>(batch) * p.key_heads + key_head; }
  // Where the state that the chunk of a step begins with is kept, or null.
  __device__ __forceinline__ float *edge(const Running &args, int step) const {
    const int edge = chunk_of(step) + (BACK ? 1 : 0), number = edge / kRunEdgeChunks - 1;
    const bool first_head = BACK || head % (p.query_heads / p.key_heads) == 0;
    return edge % kRunEdgeChunks == 0 && number >= 0 && number < args.flow.edges && first_head ? args.flow.states[BACK] + (key_pair() * args.flow.edges + number) * kStartFloats
                                                                                               : nullptr;
  }
  // f's numbers of what the others are summed up with: of keys none.
  __device__ __forceinline__ Coefficients coefficients(int step) const {
    Coefficients f(p, query_head(step));
    if constexpr (!BACK) f.a = f.beta = f.gamma = 1.f;
    return f;
  }
  __device__ __forceinline__ float *start(const Running &args) const { return args.starts + (key_pair() * args.segments + segment) * kStartFloats; }
};

// One thread a token, or two that halve its features: its numbers leave memory while the chunk before is in work, and are written down when that is done.
template <Pass PASS, int PIECES> struct NumbersOnWay {
  using T = __nv_bfloat16;
  using E = Element<T>;
  using Tiles = FeatureTiles<PASS>;
  static constexpr bool BACK = PASS == Pass::COLUMNS;
  uint4 raw[PIECES];
  float unit, inverse, error, exponent, whole;  // whole: of the chunk's decay
  int32_t query_run, key_run, run_first, run_last;
  bool real, mixed, begins;

  __device__ __forceinline__ void load(const Running &args, const RunPlace<PASS> &at, int step, int number) {
    const Gradients &g = args.of;
    const int thread = remade(number) % kRunTokens, first_piece = remade(number) / kRunTokens;
    const linattn_problem &p = g.problem;
    const int64_t begin = at.begin_of(step), token = begin + thread;
    const int count = at.count_of(begin), query_head = at.query_head(step);
    real = thread < count, begins = begin == 0;
    query_run = key_run = real ? 1 : 0, run_first = run_last = 1, mixed = false, exponent = whole = 0.f;
    if (p.key_segments) {
      const int32_t *const keys = p.key_segments + at.batch * p.key_segments_stride, *const queries = p.query_segments + at.batch * p.query_segments_stride;
      run_first = abs(keys[begins ? 0 : begin - 1]), run_last = abs(keys[begin + count - 1]);
      if (real) query_run = max(queries[token], 0), key_run = max(keys[token], 0);
      for (int i = thread % 32; i < count; i += 32) mixed |= queries[begin + i] != run_first || keys[begin + i] != run_first;
      mixed = __any_sync(0xffffffffu, mixed);
    }
    real = real && (BACK ? query_run : key_run) > 0;
    const linattn_tensor &tensor = BACK ? p.query : p.key;
    const T *const row = head_of<const T>(tensor, at.batch, BACK ? query_head : at.key_head) + (real ? token : 0) * tensor.token_stride;
#pragma unroll
    for (int i = 0; i < PIECES; ++i) raw[i] = real && first_piece + i < p.head_dim / 8 ? *reinterpret_cast<const uint4 *>(row + 8 * (first_piece + i)) : make_uint4(0, 0, 0, 0);
    if (g.gates.decay) {
      const double *const decay = g.gates.decay + (static_cast<int64_t>(at.batch) * p.state_heads + query_head / (p.query_heads / p.state_heads)) * p.length;
      const double edge = begins ? 0.0 : decay[begin - 1];
      exponent = token < p.length ? static_cast<float>(decay[token] - edge) : 0.f, whole = static_cast<float>(decay[begin + count - 1] - edge);
      mixed = mixed || whole < kSteepest;
    }
    unit = inverse = error = 0.f;
    if constexpr (BACK) {
      const float *const numbers = g.query_numbers + (static_cast<int64_t>(at.batch) * p.query_heads + query_head) * kNumbers * g.padded + token;
      if (real) inverse = numbers[0], error = numbers[g.padded], unit = numbers[2 * g.padded];
    } else if (real) {
      unit = g.key_scale[(static_cast<int64_t>(at.batch) * p.key_heads + at.key_head) * g.padded + token];
    }
  }
  __device__ __forceinline__ void store(ChunkNumbers &to, unsigned char *features, const RunPlace<PASS> &at, int step, int number) const {
    const int thread = remade(number) % kRunTokens, first_piece = remade(number) / kRunTokens;
    const Coefficients f = at.coefficients(step);
    const float before = query_run == run_first ? exp2_fast(fminf(exponent, 0.f)) : 0.f, behind = key_run == run_last ? exp2_fast(fminf(whole - exponent, 0.f)) : 0.f;
    const float weight = !real ? 0.f : BACK ? before * inverse : behind;
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
      const uint32_t words[4] = {raw[i].x, raw[i].y, raw[i].z, raw[i].w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float low = E::low(words[j]) * unit, high = E::high(words[j]) * unit;
        const int place = Tiles::at(8 * (first_piece + i) + 2 * j, thread), next = Tiles::at(8 * (first_piece + i) + 2 * j + 1, thread);
        const auto put = [&](int tile, float factor) {
          const uint32_t two = E::pack(low * factor, high * factor);
          *reinterpret_cast<uint16_t *>(features + tile + place) = static_cast<uint16_t>(two),
                                                          *reinterpret_cast<uint16_t *>(features + tile + next) = static_cast<uint16_t>(two >> 16);
        };
        put(Tiles::UNITS, 1.f), put(Tiles::WEIGHTED, f.gamma * weight);
        if constexpr (BACK) put(Tiles::LINES, f.beta * weight);
      }
    }
    if (first_piece > 0) return;
    const float factor = !real ? 0.f : mixed ? 1.f : exp2_fast(BACK ? exponent - whole : -exponent);
    *reinterpret_cast<uint16_t *>(features + Tiles::CONSTANT + 2 * thread) = static_cast<uint16_t>(E::pack(f.a * weight, 0.f));
    to.exponent[thread] = exponent, to.own[thread] = BACK ? behind : before, to.query_run[thread] = query_run, to.key_run[thread] = key_run;
    if constexpr (BACK) {
      const float share = share_of(inverse, error), scaled = share * factor;
      to.of_query[thread] = make_float4(f.a * scaled, f.beta * unit * scaled, f.gamma * unit * unit * scaled, share == 0.f ? 0.f : error / share);
      to.mass_weight[thread] = real ? before * error : 0.f;
    } else {
      to.unit[thread] = unit, to.factor[thread] = factor, to.mass_weight[thread] = weight;
    }
    if (thread == 0) to.kept = !begins && run_first == run_last ? exp2_fast(fminf(whole, 0.f)) : 0.f, to.mixed = mixed;
  }
};

// A chunk's tokens of a head into a tile; those from `count` on read as zero, and so does padding, NaN in memory or not, where there are runs.
template <int D, int THREADS, typename T>
__device__ __forceinline__ void copy_chunk(uint32_t tile, const T *rows, int64_t stride, const int32_t *runs, int count, int thread, int pieces) {
  constexpr int kPieces = D / 8;
  static_assert(kRunTokens * kPieces % THREADS == 0, "");
#pragma unroll
  for (int i = 0; i < kRunTokens * kPieces / THREADS; ++i) {
    const int row = (thread + i * THREADS) / kPieces, piece = (thread + i * THREADS) % kPieces;
    const bool valid = row < count && piece < pieces && (!runs || runs[row] > 0);
    copy_async(tile + Tile<D>::at(row, piece), rows + (valid ? row * stride : 0) + piece * 8, valid);
  }
}

// The readers' part in copies: tokens of a step into its stages.
template <Pass PASS, bool OWN = true, int THREADS = kReaders> __device__ __forceinline__ void fetch_step(const Running &args, const RunPlace<PASS> &at, uint32_t base, int step,
                                                                                                         int number) {
  using T = __nv_bfloat16;
  using S = RunShape<PASS>;
  const int thread = remade(number);  // no address is kept from chunk to chunk: registers are short
  const linattn_problem &p = at.p;
  const int64_t begin = at.begin_of(step);
  const int count = at.count_of(begin), query_head = at.query_head(step), pieces = p.head_dim / 8;
  const int32_t *const query_runs = p.key_segments ? p.query_segments + at.batch * p.query_segments_stride + begin : nullptr;
  const int32_t *const key_runs = p.key_segments ? p.key_segments + at.batch * p.key_segments_stride + begin : nullptr;
  const auto copy = [&](auto width, uint32_t tile, const linattn_tensor &tensor, int head, const int32_t *runs, int parts) {
    copy_chunk<decltype(width)::value, THREADS>(tile, head_of<const T>(tensor, at.batch, head) + begin * tensor.token_stride, tensor.token_stride, runs, count, thread, parts);
  };
  const std::integral_constant<int, kRunKeys> narrow;
  const std::integral_constant<int, kRunValues> wide;
  const uint32_t others = base + S::OTHERS_AT + step % 2 * S::OTHERS, own = base + S::OWN_AT + step / at.heads % 2 * S::OWN;
  if constexpr (PASS == Pass::COLUMNS) {
    copy(narrow, others, p.query, query_head, query_runs, pieces);
    copy(wide, others + S::X, args.of.grad_out, query_head, query_runs, kRunValues / 8);
    if (OWN && step % at.heads == 0) {
      copy(narrow, own, p.key, at.key_head, key_runs, pieces);
      copy(wide, own + S::X, p.value, at.key_head, key_runs, kRunValues / 8);
    }
  } else {
    copy(narrow, others, p.key, at.key_head, key_runs, pieces);
    copy(wide, others + S::X, p.value, at.key_head, key_runs, kRunValues / 8);
    if constexpr (OWN) copy(narrow, own, p.query, query_head, query_runs, pieces);
    if constexpr (OWN && PASS == Pass::ROWS) copy(wide, own + S::X, args.of.grad_out, query_head, query_runs, kRunValues / 8);
  }
  copy_commit();
}

// Both numbers of a word, each twice.
__device__ __forceinline__ uint32_t first_twice(uint32_t two) { return (two & 0xffffu) | two << 16; }
__device__ __forceinline__ uint32_t second_twice(uint32_t two) { return (two >> 16) | (two & 0xffff0000u); }

// A warp's 16 tokens of the chunk, and what it does with the state.
struct StateSide {
  using T = __nv_bfloat16;
  using E = Element<T>;
  const int lane, warp, group, place;
  uint32_t x[4], words[8][2];  // the tokens' numbers; of the lane's two rows all of them, two a word

  __device__ __forceinline__ StateSide() : lane(threadIdx.x & 31), warp(warp_number()), group(lane >> 2), place(lane & 3) {}
  __device__ __forceinline__ int row(int half) const { return 16 * warp + 8 * half + group; }
  __device__ __forceinline__ void load(uint32_t tile) {
    ldmatrix(x, tile + Tile<kRunKeys>::rows_at(warp) + lane_down<kRunKeys>(lane));
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) words[i][half] = __shfl_sync(0xffffffffu, x[half + i / 4 * 2], (lane & 28) + i % 4);
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
      if (part > 0) warpgroup_wait<0>();
      warpgroup_keep(sums);
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
  __device__ __forceinline__ float along(const float (&y)[2][4], int half) const {
    float sum = 0.f;
#pragma unroll
    for (int t = 0; t < 2; ++t) sum += E::low(x[2 * t + half]) * y[t][2 * half] + E::high(x[2 * t + half]) * y[t][2 * half + 1];
    return sum;
  }
  __device__ __forceinline__ float2 line_of(const StateMargins &margins, int t) const { return *reinterpret_cast<const float2 *>(margins.lines + 8 * t + 2 * place); }

  // What the state makes of a token's values y: sums over b of (S_ab . y) x_b, and S_a . y.
  __device__ __forceinline__ void multiply_values(float (&pairs)[2][4], float (&lines)[2][4], const uint32_t (&y)[kRunValues / 16][4], uint32_t state) const {
    float sums[2][8][4];
    const auto multiply = [&](int round) {
      warpgroup_keep(sums[round % 2]);
      warpgroup_begin();
#pragma unroll
      for (int n = 0; n < kRunValues / 16; ++n)
        WarpgroupProduct<T, 64, false>::run(sums[round % 2], y[n], operand_in<kRunValues>(state, Tile<kRunValues>::rows_at(4 * round) + Tile<kRunValues>::columns_at(2 * n)),
                                            n > 0);
      warpgroup_commit();
    };
#pragma unroll
    for (int i = 0; i < 64; ++i) sums[i / 32][i / 4 % 8][i % 4] = 0.f;
#pragma unroll
    for (int i = 0; i < 8; ++i) pairs[i / 4][i % 4] = lines[i / 4][i % 4] = 0.f;
    warpgroup_keep(lines);
    warpgroup_begin();
#pragma unroll
    for (int n = 0; n < kRunValues / 16; ++n)
      WarpgroupProduct<T, 16, false>::run(lines, y[n], operand_in<kRunValues>(state, Tile<kRunValues>::rows_at(kRunItems) + Tile<kRunValues>::columns_at(2 * n)), n > 0);
    warpgroup_commit();
    multiply(0);
#pragma unroll
    for (int round = 0; round < 4; ++round) {
      if (round < 3) {
        multiply(round + 1);
        warpgroup_wait<1>();
      } else {
        warpgroup_wait<0>();
      }
      warpgroup_keep(sums[round % 2]);
#pragma unroll
      for (int t = 0; t < 8; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t two = words[2 * round + t / 4][i / 2];
          float &sum = pairs[t / 2 % 2][i];
          sum = fmaf(sums[round % 2][t][i], t % 2 ? E::high(two) : E::low(two), sum);
        }
    }
    warpgroup_keep(lines);
  }
};

}  // namespace linattn_pairs
