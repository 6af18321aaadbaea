// What is known of the tokens outside of a chunk, by mma.sync. With x the unit vectors, rounded:
//   S = sum x_a x_b [v, 1] over the keys before the chunk, and the same of x_a and of 1; what a query's output and gradient are made of;
//   R = sum gamma x_a x_b [w, e] over the queries behind it, and beta x_a and a [w, e]; what those of keys and values are made of.
// With gates S is as its last token sees it, R as it sees the last key of the chunk: what lies between is a factor of each token of a sum, of the sum from chunk to
// chunk, and of each token that reads it; a token of another run than the one at the chunk's edge has none.
// A sum over tokens is a product: its rows are the features x_a x_b, made in registers from 16 rows of X^T and one more, its columns those of v or w.
#pragma once
#include "pairs/backward.cuh"

namespace linattn_pairs {

// The rows of a state: an item is 16 features x_a x_b of one a and a block of b, each pair of blocks once; items by block of b, then a. Behind them those of x_a.
template <int K, int V> struct FeatureState {
  static constexpr int BLOCKS = K / 16, ITEMS = 8 * BLOCKS * (BLOCKS + 1), PAIRS = 16 * ITEMS, ROWS = PAIRS + K;
  static constexpr int VALUES = ROWS, COUNT = ROWS + V, FLOATS = ROWS + V + 4;  // the column of masses: of each row, then what the constant feature holds
  static constexpr int64_t chunk() { return K < 32 ? 512 : 16 * K; }
  static __host__ __device__ constexpr int first_item(int block) { return 8 * block * (block + 1); }
  static __host__ __device__ constexpr int item(int a, int block) { return first_item(block) + a; }
};

struct StateArguments {
  Gradients of;            // of the output those without a gradient in their name are set
  linattn_tensor out;      // where a forward pass puts results, and masses
  float *mass;
  int32_t chunks, tiles;   // tiles: of a head, a block of a reader each
  __nv_bfloat16 *across;   // (batch, heads, padded / kKeys, K, kKeys): unit vectors
  __nv_bfloat16 *scaled;   // (batch, heads, padded, V): w / g, or v, with the token's gate; ungated values are read where they are
  float *weights;          // (batch, heads, padded): e, or 1, with the gate
  __nv_bfloat16 *rows;     // (batch, key heads, chunks, ROWS, V): of the chunk, then of all before it or behind it
  float *sums, *columns;   // (batch, key heads, chunks, FLOATS): of the chunk; of all before it or behind it
  int32_t edges;                    // of a head's sequence, one behind every kEdgeChunks chunks: see state_flow.cuh
  __nv_bfloat16 *edge_rows;         // (batch, key heads, edges, ROWS, V): S there
  float *edge_columns;              // (batch, key heads, edges, FLOATS)
  double *flows;                    // (batch, key heads, edges)
};

constexpr int kEdgeChunks = 4;
constexpr int kSumsWarps = 6, kSumsThreads = 32 * kSumsWarps, kSumsStages = 3, kTaskItems = 4, kScanThreads = 256, kScanAhead = 4;

template <int K, int V> struct SumsShape {
  using S = FeatureState<K, V>;
  static constexpr int COLUMNS = V < 64 ? V : 64, GROUPS = V / COLUMNS;             // of values, for one block
  static constexpr int PAIR_TASKS = S::ITEMS / kTaskItems, TASKS = PAIR_TASKS + 2;  // a warp's: pairs, or x_a, or the masses of pairs
  static constexpr int PARTS = (TASKS + kSumsWarps - 1) / kSumsWarps;
  static constexpr int ACROSS = K * kKeys * 2, WEIGHTS_AT = ACROSS + kKeys * COLUMNS * 2, STAGE = (WEIGHTS_AT + kKeys * 4 + 1023) / 1024 * 1024;
  static constexpr int SHARED = kSumsStages * STAGE, WIDE = COLUMNS > K ? COLUMNS : K;
};

// What lies between a query and the last token before its chunk, or a key and the last token of its chunk. head: a query head of the token's.
__device__ __forceinline__ float gate_of(const Gradients &g, bool queries, int batch, int head, int64_t token) {
  const linattn_problem &p = g.problem;
  const int64_t edge = queries ? token / g.chunk * g.chunk - 1 : min((token / g.chunk + 1) * g.chunk, p.length) - 1;
  const GateReader gates(g.gates, p, queries, batch, head, edge);
  if (token >= p.length || edge < 0) return 0.f;
  const int32_t run = gates.run_of(token), edge_run = p.key_segments ? abs(p.key_segments[batch * p.key_segments_stride + edge]) : 1;
  const double exponent = queries ? gates.sum_of(token) - gates.edge() : gates.edge() - gates.sum_of(token);
  return run == edge_run ? exp2_fast(fminf(static_cast<float>(exponent), 0.f)) : 0.f;
}

// What is left of a state behind a chunk.
__device__ __forceinline__ float kept_of(const Gradients &g, int batch, int head, int chunk) {
  const linattn_problem &p = g.problem;
  const int64_t edge = chunk * g.chunk - 1, last = edge + g.chunk;
  if (edge < 0 || last >= p.length) return 0.f;
  const GateReader gates(g.gates, p, false, batch, head, edge);
  const int32_t *const runs = p.key_segments ? p.key_segments + batch * p.key_segments_stride : nullptr;
  return runs && abs(runs[edge]) != abs(runs[last]) ? 0.f : exp2_fast(fminf(static_cast<float>(gates.sum_of(last) - gates.edge()), 0.f));
}

// Whether nothing of what lies beyond their chunk's edge is left to the tokens from `begin` on, of one chunk. head, heads: those whose state it is.
__device__ __forceinline__ bool is_out_of_reach(const Gradients &g, bool queries, int batch, int head, int heads, int64_t begin, int rows) {
  const linattn_problem &p = g.problem;
  if (!p.log_decay) return false;
  const int64_t chunk_begin = begin / g.chunk * g.chunk, edge = queries ? chunk_begin - 1 : min(chunk_begin + g.chunk, p.length) - 1;
  const GateReader gates(g.gates, p, queries, batch, head, edge);
  return !farthest(p, head, heads).reaches(queries ? gates.edge() - gates.sum_of(begin) : gates.sum_of(begin + rows - 1) - gates.edge());
}
// What such tokens get.
template <typename T> __device__ __forceinline__ void zero_rows(T *rows, int64_t stride, int count, int pieces, int thread, int threads) {
  for (int index = thread; index < count * pieces; index += threads) *reinterpret_cast<uint4 *>(rows + index / pieces * stride + index % pieces * 8) = make_uint4(0, 0, 0, 0);
}

// Unit vectors of 64 tokens, rounded, by their numbers, and what they are multiplied by. Zero in padding and behind the last token.
template <int K, int V, bool QUERIES> __global__ void __launch_bounds__(kKeys * 2) across_kernel(const __grid_constant__ StateArguments args) {
  using T = __nv_bfloat16;
  using E = Element<T>;
  extern __shared__ __align__(1024) unsigned char shared[];
  uint16_t (*const across)[kKeys + 8] = reinterpret_cast<uint16_t (*)[kKeys + 8]>(shared);
  float *const factors = reinterpret_cast<float *>(across + K);
  const Gradients &g = args.of;
  const linattn_problem &p = g.problem;
  const int thread = threadIdx.x, place = thread % kKeys, heads = QUERIES ? p.query_heads : p.key_heads, pair = blockIdx.y, batch = pair / heads, head = pair % heads;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kKeys, token = first + place, at = pair * g.padded + token;
  const linattn_tensor &tensor = QUERIES ? p.query : p.key, &other = QUERIES ? g.grad_out : p.value;
  const float *const numbers = g.query_numbers + static_cast<int64_t>(pair) * kNumbers * g.padded + token;
  const bool gated = p.log_decay || p.key_segments;
  const float gate = gated ? gate_of(g, QUERIES, batch, QUERIES ? head : head * (p.query_heads / p.key_heads), token) : 1.f;
  const bool real = token < p.length && gate != 0.f;
  const float scale = !real ? 0.f : QUERIES ? numbers[2 * g.padded] : g.key_scale[at];
  if (thread < kKeys) args.weights[at] = real ? (QUERIES ? numbers[g.padded] * gate : gate) : 0.f, factors[place] = !real ? 0.f : QUERIES ? numbers[0] * gate : gate;
  const T *const row = head_of<const T>(tensor, batch, head) + (real ? token : 0) * tensor.token_stride;
  for (int piece = thread / kKeys; piece < K / 8; piece += 2) {
    const uint4 eight = real && piece < p.head_dim / 8 ? *reinterpret_cast<const uint4 *>(row + 8 * piece) : make_uint4(0, 0, 0, 0);
    const uint32_t words[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t two = E::pack(E::low(words[i]) * scale, E::high(words[i]) * scale);
      across[8 * piece + 2 * i][place] = static_cast<uint16_t>(two), across[8 * piece + 2 * i + 1][place] = static_cast<uint16_t>(two >> 16);
    }
  }
  __syncthreads();
  if (QUERIES || gated) {
    const T *const rows = head_of<const T>(other, batch, head);
    for (int index = thread; index < kKeys * (V / 8); index += 2 * kKeys) {
      const int own = index / (V / 8), piece = index % (V / 8);
      const float factor = factors[own];
      const uint4 eight = factor != 0.f ? *reinterpret_cast<const uint4 *>(rows + (first + own) * other.token_stride + 8 * piece) : make_uint4(0, 0, 0, 0);
      const auto times = [&](uint32_t two) { return E::pack(E::low(two) * factor, E::high(two) * factor); };
      *reinterpret_cast<uint4 *>(args.scaled + (pair * g.padded + first + own) * V + 8 * piece) = make_uint4(times(eight.x), times(eight.y), times(eight.z), times(eight.w));
    }
  }
  uint4 *const target = reinterpret_cast<uint4 *>(args.across + (pair * g.padded + first) * K);
  for (int index = thread; index < K * kKeys / 8; index += kKeys * 2) target[index] = *reinterpret_cast<const uint4 *>(&across[index / (kKeys / 8)][index % (kKeys / 8) * 8]);
}

// Two sums times `scale`, beside what the heads before left.
__device__ __forceinline__ void put_two(__nv_bfloat16 *target, const float (&x)[4], int i, float scale, bool more) {
  using E = Element<__nv_bfloat16>;
  uint32_t *const two = reinterpret_cast<uint32_t *>(target);
  float low = x[i] * scale, high = x[i + 1] * scale;
  if (more) low += E::low(*two), high += E::high(*two);
  *two = E::pack(low, high);
}

// A warp's share of a chunk's sums: four items of pairs, or the rows of x_a and what the constant feature holds, or the masses of all pairs.
template <int K, int V> struct ChunkSums {
  using T = __nv_bfloat16;
  using E = Element<T>;
  using S = FeatureState<K, V>;
  using H = SumsShape<K, V>;
  static constexpr int BLOCKS = K / 16, COLUMN_BLOCKS = H::COLUMNS / 16;
  const int lane, group, place, task;
  int block = 0, a = 0;                // of a task of pairs: the block of b, the first a
  float acc[kTaskItems][H::WIDE / 8][4];
  float masses[BLOCKS][2], values[2 * COLUMN_BLOCKS], count;  // of x_a, and of the constant feature

  __device__ __forceinline__ ChunkSums(int task) : lane(threadIdx.x & 31), group(lane >> 2), place(lane & 3), task(task) {
    if (!is_pairs()) return;
    while (block + 1 < BLOCKS && kTaskItems * task >= S::first_item(block + 1)) ++block;
    a = kTaskItems * task - S::first_item(block);
  }
  __device__ __forceinline__ bool is_pairs() const { return task < H::PAIR_TASKS; }
  __device__ __forceinline__ bool is_linear() const { return task == H::PAIR_TASKS; }
  __device__ __forceinline__ bool is_masses() const { return task == H::PAIR_TASKS + 1; }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int j = 0; j < kTaskItems; ++j)
#pragma unroll
      for (int n = 0; n < H::WIDE / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[j][n][i] = 0.f;
#pragma unroll
    for (int j = 0; j < BLOCKS; ++j) masses[j][0] = masses[j][1] = 0.f;
#pragma unroll
    for (int n = 0; n < 2 * COLUMN_BLOCKS; ++n) values[n] = 0.f;
    count = 0.f;
  }

  // 16 rows of X^T by 16 tokens.
  __device__ __forceinline__ void load(uint32_t (&x)[4], uint32_t stage, int rows, int step) const {
    ldmatrix(x, (stage + Tile<kKeys>::rows_at(rows) + lane_down<kKeys>(lane)) ^ (step << 5));
  }

  __device__ __forceinline__ void add_pairs(const unsigned char *shared, uint32_t stage) {
    const Blocks<H::COLUMNS> y_down(stage + H::ACROSS, lane_down<H::COLUMNS>(lane));
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) {
      uint32_t x[4], features[kTaskItems][4];
      load(x, stage, block, step);
#pragma unroll
      for (int j = 0; j < kTaskItems; ++j) {
        const uint32_t at = (stage + Tile<kKeys>::at(a + j, 0) + 4 * place) ^ (step << 5);
        const uint32_t near = *reinterpret_cast<const uint32_t *>(shared + at), far = *reinterpret_cast<const uint32_t *>(shared + (at ^ 16));
        features[j][0] = multiply_two(x[0], near), features[j][1] = multiply_two(x[1], near);
        features[j][2] = multiply_two(x[2], far), features[j][3] = multiply_two(x[3], far);
      }
#pragma unroll
      for (int n = 0; n < COLUMN_BLOCKS; ++n) {
        uint32_t y[4];
        ldmatrix_transposed(y, y_down.at(step, n));
#pragma unroll
        for (int j = 0; j < kTaskItems; ++j) E::mma(acc[j][2 * n], features[j], y[0], y[1]), E::mma(acc[j][2 * n + 1], features[j], y[2], y[3]);
      }
    }
  }

  __device__ __forceinline__ void add_linear(const unsigned char *shared, uint32_t stage) {
    const Blocks<H::COLUMNS> y_down(stage + H::ACROSS, lane_down<H::COLUMNS>(lane));
#pragma unroll 1
    for (int step = 0; step < kKeys / 16; ++step) {
      uint32_t x[BLOCKS][4];
      const float *const weights = reinterpret_cast<const float *>(shared + stage + H::WEIGHTS_AT) + 16 * step + 2 * place;
      const float2 near = *reinterpret_cast<const float2 *>(weights), far = *reinterpret_cast<const float2 *>(weights + 8);
      count += near.x + near.y + far.x + far.y;
#pragma unroll
      for (int j = 0; j < BLOCKS; ++j) {
        load(x[j], stage, j, step);
#pragma unroll
        for (int half = 0; half < 2; ++half)
          masses[j][half] += E::low(x[j][half]) * near.x + E::high(x[j][half]) * near.y + E::low(x[j][2 + half]) * far.x + E::high(x[j][2 + half]) * far.y;
      }
#pragma unroll
      for (int n = 0; n < COLUMN_BLOCKS; ++n) {
        uint32_t y[4];
        ldmatrix_transposed(y, y_down.at(step, n));
#pragma unroll
        for (int t = 0; t < 2; ++t) values[2 * n + t] += E::low(y[2 * t]) + E::high(y[2 * t]) + E::low(y[2 * t + 1]) + E::high(y[2 * t + 1]);
#pragma unroll
        for (int j = 0; j < BLOCKS; ++j) E::mma(acc[j][2 * n], x[j], y[0], y[1]), E::mma(acc[j][2 * n + 1], x[j], y[2], y[3]);
      }
    }
  }

  __device__ __forceinline__ void add_masses(const unsigned char *shared, uint32_t stage) {
#pragma unroll 1
    for (int step = 0; step < kKeys / 16; ++step) {
      uint32_t x[BLOCKS][4];
      const float *const weights = reinterpret_cast<const float *>(shared + stage + H::WEIGHTS_AT) + 16 * step + 2 * place;
      const uint32_t near = E::pack(weights[0], weights[1]), far = E::pack(weights[8], weights[9]);
#pragma unroll
      for (int j = 0; j < BLOCKS; ++j) {
        load(x[j], stage, j, step);
        x[j][0] = multiply_two(x[j][0], near), x[j][1] = multiply_two(x[j][1], near), x[j][2] = multiply_two(x[j][2], far), x[j][3] = multiply_two(x[j][3], far);
      }
#pragma unroll
      for (int b = 0; b < BLOCKS; ++b) {
        uint32_t y[4];
        ldmatrix(y, (stage + Tile<kKeys>::rows_at(b) + lane_across<kKeys>(lane)) ^ (step << 5));
#pragma unroll
        for (int j = 0; j <= b; ++j) E::mma(acc[j][2 * b], x[j], y[0], y[1]), E::mma(acc[j][2 * b + 1], x[j], y[2], y[3]);
      }
    }
  }

  static __device__ __forceinline__ void put(float *target, float x, bool more) { *target = more ? *target + x : x; }

  __device__ __forceinline__ void store_rows(T *rows, int j, int row, float scale, bool more) const {
#pragma unroll
    for (int n = 0; n < 2 * COLUMN_BLOCKS; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) put_two(rows + static_cast<int64_t>(row + group + 8 * half) * V + 8 * n + 2 * place, acc[j][n], 2 * half, scale, more);
  }

  __device__ __forceinline__ void add(const unsigned char *shared, uint32_t stage, int first_column) {
    if (is_pairs()) add_pairs(shared, stage);
    else if (is_linear()) add_linear(shared, stage);
    else if (is_masses() && first_column == 0) add_masses(shared, stage);
  }

  // f: of the head; rows: from the block's first column on.
  __device__ __forceinline__ void store(T *rows, float *sums, int first_column, const Coefficients &f, bool more) {
    if (is_pairs()) {
#pragma unroll
      for (int j = 0; j < kTaskItems; ++j) store_rows(rows, j, 16 * S::item(a + j, block), f.gamma, more);
    } else if (is_linear()) {
#pragma unroll
      for (int j = 0; j < BLOCKS; ++j) store_rows(rows, j, S::PAIRS + 16 * j, f.beta, more);
      const auto all = [](float x) {
        x += __shfl_xor_sync(0xffffffffu, x, 1);
        return x + __shfl_xor_sync(0xffffffffu, x, 2);
      };
#pragma unroll
      for (int n = 0; n < 2 * COLUMN_BLOCKS; ++n) {
        const float sum = all(values[n]);
        if (place == 0) put(sums + S::VALUES + first_column + 8 * n + group, f.a * sum, more);
      }
      if (first_column > 0) return;
#pragma unroll
      for (int j = 0; j < BLOCKS; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float sum = all(masses[j][half]);
          if (place == 0) put(sums + S::PAIRS + 16 * j + 8 * half + group, f.beta * sum, more);
        }
      const float sum = all(count);
      if (lane == 0) put(sums + S::COUNT, f.a * sum, more);
    } else if (is_masses() && first_column == 0) {
#pragma unroll
      for (int b = 0; b < BLOCKS; ++b)
#pragma unroll
        for (int j = 0; j <= b; ++j)
#pragma unroll
          for (int t = 0; t < 2; ++t)
#pragma unroll
            for (int i = 0; i < 4; ++i) put(sums + 16 * S::item(16 * j + group + 8 * (i >> 1), b) + 8 * t + 2 * place + (i & 1), f.gamma * acc[j][2 * b + t][i], more);
    }
  }
};

// The chunk whose sums a block makes, record `number` of the states, and its tokens on their way: of the keys, or of all query heads that share them, one after the other.
template <int K, int V, bool QUERIES> struct SumsOf {
  using T = __nv_bfloat16;
  using S = FeatureState<K, V>;
  using H = SumsShape<K, V>;
  const StateArguments &args;
  const linattn_problem &p;
  const int pair, chunk, batch, key_head, heads;
  int64_t begin;
  int steps;
  T *const rows;
  float *const sums;

  __device__ __forceinline__ SumsOf(const StateArguments &args, int number)
      : args(args), p(args.of.problem), pair(number / args.chunks), chunk(number % args.chunks), batch(pair / p.key_heads), key_head(pair % p.key_heads),
        heads(QUERIES ? p.query_heads / p.key_heads : 1), begin(chunk * args.of.chunk), steps(static_cast<int>((min(p.length - begin, args.of.chunk) + kKeys - 1) / kKeys)),
        rows(args.rows + static_cast<int64_t>(number) * S::ROWS * V), sums(args.sums + static_cast<int64_t>(number) * S::FLOATS) {
    leave_out_of_reach();
  }
  // Tiles of which a decay leaves nothing at the chunk's edge, the first ones of keys and the last ones of queries.
  __device__ __forceinline__ void leave_out_of_reach() {
    if (!p.log_decay || is_idle()) return;
    const int together = p.query_heads / p.key_heads, first = static_cast<int>(begin / kKeys);
    const GateReader decay(args.of.gates, p, QUERIES, batch, key_head * together, begin);
    const int64_t edge = QUERIES ? begin - 1 : begin + args.of.chunk - 1;
    const int found = Reach<!QUERIES, GateReader>(p, decay, edge, key_head * together, together, first, first + steps).find();
    if constexpr (QUERIES) steps = found - first;
    else steps -= found - first, begin = static_cast<int64_t>(found) * kKeys;
  }
  __device__ __forceinline__ bool is_idle() const { return chunk == (QUERIES ? 0 : args.chunks - 1); }  // nobody asks
  __device__ __forceinline__ Coefficients coefficients(int head) const {
    Coefficients f(p, QUERIES ? key_head * heads + head : 0);
    if constexpr (!QUERIES) f.a = f.beta = f.gamma = 1.f;
    return f;
  }
  template <int THREADS> __device__ __forceinline__ void fetch(uint32_t base, int iteration, int first_column, int thread) const {
    if (iteration < steps * heads) {
      const Gradients &g = args.of;
      const bool scaled = QUERIES || is_gated(p);
      const uint32_t stage = base + iteration % kSumsStages * H::STAGE;
      const int64_t head = QUERIES ? static_cast<int64_t>(batch) * p.query_heads + key_head * heads + iteration / steps : pair;
      const int64_t first = begin + iteration % steps * static_cast<int64_t>(kKeys), count = min(p.length - first, static_cast<int64_t>(kKeys));
      const T *const values = scaled ? args.scaled + (head * g.padded + first) * V : head_of<const T>(p.value, batch, key_head) + first * p.value.token_stride;
      copy_tile<kKeys, K, THREADS>(stage, args.across + (head * g.padded + first) * K, kKeys, K, thread);
      copy_tile<H::COLUMNS, kKeys, THREADS>(stage + H::ACROSS, values + first_column, scaled ? V : p.value.token_stride, static_cast<int>(count), thread);
      if (thread < kKeys / 4) copy_async(stage + H::WEIGHTS_AT + 16 * thread, args.weights + head * g.padded + first + 4 * thread, true);
    }
    copy_commit();
  }
};

template <int K, int V, bool QUERIES> __global__ void __launch_bounds__(kSumsThreads, 2) chunk_sums_kernel(const __grid_constant__ StateArguments args) {
  using H = SumsShape<K, V>;
  extern __shared__ __align__(1024) unsigned char shared[];
  const int thread = threadIdx.x, part = blockIdx.x % H::PARTS, first_column = blockIdx.x / H::PARTS % H::GROUPS * H::COLUMNS;
  const SumsOf<K, V, QUERIES> of(args, blockIdx.x / (H::PARTS * H::GROUPS));
  if (of.is_idle()) return;
  const uint32_t base = shared_address(shared);
#pragma unroll
  for (int i = 0; i < kSumsStages - 1; ++i) of.template fetch<kSumsThreads>(base, i, first_column, thread);
  ChunkSums<K, V> work(part * kSumsWarps + warp_number());
  for (int head = 0; head < of.heads; ++head) {
    work.clear();
    for (int step = 0; step < of.steps; ++step) {
      const int iteration = head * of.steps + step;
      copy_wait<kSumsStages - 2>();
      __syncthreads();  // the stage is here, and nobody reads the one that the next copies overwrite
      of.template fetch<kSumsThreads>(base, iteration + kSumsStages - 1, first_column, thread);
      work.add(shared - base, base + iteration % kSumsStages * H::STAGE, first_column);
    }
    work.store(of.rows + first_column, of.sums, first_column, of.coefficients(head), head > 0);
  }
  copy_wait<0>();
}

// Eight numbers of a row, chunk after chunk: the sum of all before, or of all behind, in place of the chunk's own. Both orders of a pair of blocks count. In S values are as
// far from the mean of those before, which a sum of small differences is to keep: their masses are many times as large as what is left of them.
template <int K, int V, bool QUERIES> __global__ void __launch_bounds__(kScanThreads) state_scan_kernel(const __grid_constant__ StateArguments args) {
  using E = Element<__nv_bfloat16>;
  using S = FeatureState<K, V>;
  constexpr int kPieces = V / 8;
  const linattn_problem &p = args.of.problem;
  const int index = blockIdx.x * kScanThreads + threadIdx.x, row = index / kPieces, piece = index % kPieces;
  const int batch = blockIdx.y / p.key_heads, head = blockIdx.y % p.key_heads * (p.query_heads / p.key_heads);
  if (row >= S::ROWS) return;
  int block = 0;
  while (block + 1 < S::BLOCKS && row / 16 >= S::first_item(block + 1)) ++block;
  const float worth = row < S::PAIRS && row / 16 - S::first_item(block) < 16 * block ? 2.f : 1.f;
  const int64_t record = static_cast<int64_t>(blockIdx.y) * args.chunks;
  uint4 *const rows = reinterpret_cast<uint4 *>(args.rows + (record * S::ROWS + row) * V) + piece;
  const float *const sums = args.sums + record * S::FLOATS;
  float *const columns = args.columns + record * S::FLOATS;
  constexpr int kRow = S::ROWS * kPieces;  // from a chunk's row to the next one's
  float sum[8] = {}, values[8] = {}, mass = 0.f, count = 0.f;
  for (int first = 0; first < args.chunks; first += kScanAhead) {
    uint4 own[kScanAhead];
    float own_mass[kScanAhead], own_count[kScanAhead], own_values[kScanAhead][8];
#pragma unroll
    for (int i = 0; i < kScanAhead; ++i) {
      const int at = first + i, chunk = QUERIES ? args.chunks - 1 - at : at;
      const bool real = at + 1 < args.chunks;
      own[i] = real ? rows[static_cast<int64_t>(chunk) * kRow] : make_uint4(0, 0, 0, 0);
      const float *const here = sums + static_cast<int64_t>(chunk) * S::FLOATS;
      own_mass[i] = real ? here[row] : 0.f, own_count[i] = real ? here[S::COUNT] : 0.f;
#pragma unroll
      for (int j = 0; j < 8; ++j) own_values[i][j] = real ? here[S::VALUES + 8 * piece + j] : 0.f;
    }
#pragma unroll
    for (int i = 0; i < kScanAhead; ++i) {
      const int at = first + i, chunk = QUERIES ? args.chunks - 1 - at : at;
      if (at >= args.chunks) break;
      if (at > 0) {
        float mean[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) mean[j] = QUERIES || count == 0.f ? 0.f : values[j] / count;
        const auto two = [&](int j) { return E::pack(worth * (sum[j] - mean[j] * mass), worth * (sum[j + 1] - mean[j + 1] * mass)); };
        rows[static_cast<int64_t>(chunk) * kRow] = make_uint4(two(0), two(2), two(4), two(6));
        float *const here = columns + static_cast<int64_t>(chunk) * S::FLOATS;
        if (piece == 0) here[row] = worth * mass;
        if (row == 0)
#pragma unroll
          for (int j = 0; j < 8; ++j) here[S::VALUES + 8 * piece + j] = QUERIES ? values[j] : mean[j];
        if (row == 0 && piece == 0) here[S::COUNT] = count;
      }
      const uint32_t words[4] = {own[i].x, own[i].y, own[i].z, own[i].w};
      const float kept = p.log_decay || p.key_segments ? kept_of(args.of, batch, head, chunk) : 1.f;
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[2 * j] = sum[2 * j] * kept + E::low(words[j]), sum[2 * j + 1] = sum[2 * j + 1] * kept + E::high(words[j]);
#pragma unroll
      for (int j = 0; j < 8; ++j) values[j] = values[j] * kept + own_values[i][j];
      mass = mass * kept + own_mass[i], count = count * kept + own_count[i];
    }
  }
}

// S of queries' chunks from their keys, or R of keys' chunks from their queries.
template <int K, int V, bool QUERIES> cudaError_t launch_state(const StateArguments &args, cudaStream_t stream) {
  using H = SumsShape<K, V>;
  const linattn_problem &p = args.of.problem;
  const unsigned records = static_cast<unsigned>(p.batch * p.key_heads), own = static_cast<unsigned>(p.batch * (QUERIES ? p.query_heads : p.key_heads));
  across_kernel<K, V, QUERIES><<<dim3(static_cast<unsigned>(args.of.padded / kKeys), own), 2 * kKeys, K *(kKeys + 8) * 2 + kKeys * 4, stream>>>(args);
  if (const cudaError_t failed = cudaPeekAtLastError()) return failed;
  if (const cudaError_t failed = cudaFuncSetAttribute(chunk_sums_kernel<K, V, QUERIES>, cudaFuncAttributeMaxDynamicSharedMemorySize, H::SHARED)) return failed;
  chunk_sums_kernel<K, V, QUERIES><<<records *static_cast<unsigned>(args.chunks * H::PARTS * H::GROUPS), kSumsThreads, H::SHARED, stream>>>(args);
  if (const cudaError_t failed = cudaPeekAtLastError()) return failed;
  constexpr int kScanBlocks = (FeatureState<K, V>::ROWS * (V / 8) + kScanThreads - 1) / kScanThreads;
  state_scan_kernel<K, V, QUERIES><<<dim3(kScanBlocks, records), kScanThreads, 0, stream>>>(args);
  return cudaPeekAtLastError();
}

// The state's rows on their way through shared memory, in the order of its items; the last stage is that of the rows of x_a.
template <int K, int V, typename H> struct StateStages {
  using S = FeatureState<K, V>;
  const __nv_bfloat16 *rows;
  const float *masses;
  uint32_t base;
  int thread, next = 0;

  __device__ __forceinline__ void fetch() {
    if (next <= H::PAIR_STAGES) {
      const int first = next * H::STAGE_ROWS, count = min(H::STAGE_ROWS, S::ROWS - first), stage = next % H::STAGES;
      copy_tile<V, H::STAGE_ROWS, kGradientThreads>(base + H::STAGES_AT + stage * H::STAGE, rows + static_cast<int64_t>(first) * V, V, count, thread);
      if (thread < count / 4) copy_async(base + H::MASSES_AT + (stage * H::STAGE_ROWS + 4 * thread) * 4, masses + first + 4 * thread, true);
    }
    ++next;
    copy_commit();
  }
  // Number of the stage that is here, the one `STAGES - 1` behind it on its way.
  __device__ __forceinline__ int turn() {
    copy_wait<H::STAGES - 2>();
    __syncthreads();
    fetch();
    return (next - H::STAGES) % H::STAGES;
  }
  __device__ __forceinline__ uint32_t rows_at(int stage) const { return base + H::STAGES_AT + stage * H::STAGE; }
  __device__ __forceinline__ const float *masses_at(const unsigned char *shared, int stage) const {
    return reinterpret_cast<const float *>(shared + H::MASSES_AT) + stage * H::STAGE_ROWS;
  }
};

// Of four neighbouring numbers of a row one, and one in both halves of a word.
__device__ __forceinline__ float number_of(uint2 four, int i) {
  const uint32_t two = i < 2 ? four.x : four.y;
  return i % 2 ? Element<__nv_bfloat16>::high(two) : Element<__nv_bfloat16>::low(two);
}
__device__ __forceinline__ uint32_t twice_of(uint2 four, int i) {
  const uint32_t two = i < 2 ? four.x : four.y;
  return i % 2 ? (two >> 16) | (two & 0xffff0000u) : (two & 0xffffu) | two << 16;
}

}  // namespace linattn_pairs
