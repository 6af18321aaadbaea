// Softmax over the slots of a ring that the newest token sees, by tiles of slots, so that windows may be of any length:
//   the largest score so far m, total = sum exp(s - m) and out = sum exp(s - m) v shrink by exp(m - m') when a tile has a larger one m'.
// Slots that hold no token yet are not read.
#pragma once
#include "window/arguments.cuh"

namespace linattn_ring {

constexpr int LANES = 8;                                  // that share a key
constexpr int GROUPS = THREADS / LANES, KEYS_AT_ONCE = 3;  // of a group: a window of 64 tokens and 4 sinks is one round
constexpr int SLOTS = 2 * GROUPS * KEYS_AT_ONCE;           // of a tile

template <typename T, int HEADS> struct Near {
  static constexpr int AHEAD = 24;  // values of a thread that are on their way while keys are looked at

  struct Shared {
    float queries[HEADS][MAX_DIM];  // times the scaling
    float weights[HEADS][SLOTS];    // scores, and then exp(score - largest)
    float largest[HEADS], total[HEADS], shrink[HEADS];
    float parts[HEADS][THREADS];
  };

  const Arguments &args;
  const linattn_window &w;
  Shared &shared;
  const Heads heads;
  const int thread, warp, lane;
  const T *const new_key, *const new_value, *const ring_key, *const ring_value;
  int sinks, visible, newest;  // slots that are seen: so many sinks, these and tokens of the window, and which of the latter is the newest
  float sums[HEADS];           // this thread's, of its column

  __device__ Near(const Arguments &args, Shared &shared, const Heads &heads)
      : args(args), w(args.window), shared(shared), heads(heads), thread(threadIdx.x), warp(thread / 32), lane(thread % 32), new_key(row_of<T>(w.key, heads.batch, heads.key_head)),
        new_value(row_of<T>(w.value, heads.batch, heads.key_head)), ring_key(row_of<T>(w.ring_key, heads.batch, heads.key_head)),
        ring_value(row_of<T>(w.ring_value, heads.batch, heads.key_head)) {
    const int64_t seen = w.seen[heads.batch];
    sinks = static_cast<int>(min(max(seen + 1 - w.window, int64_t{0}), int64_t{w.sinks}));
    visible = sinks + static_cast<int>(min(seen + 1, int64_t{w.window})), newest = static_cast<int>(seen % w.window);
  }

  // The i-th of the vectors that are seen.
  __device__ const T *row(const T *ring, const T *of_newest, const linattn_tensor &tensor, int i) const {
    if (i < sinks) return ring + i * tensor.token_stride;
    return i - sinks == newest ? of_newest : ring + (w.sinks + i - sinks) * tensor.token_stride;
  }

  __device__ void write(int head, int column, float x) const {
    if (args.has_beside) args.scratch.near[(static_cast<int64_t>(heads.batch) * w.query_heads + head) * w.value_dim + column] = x;
    else linattn::store(w.out.data, w.dtype, offset_of(w.out, heads.batch, head, 0) + column, x);
  }

  __device__ void begin() {
    for (int i = thread; i < HEADS * w.head_dim; i += THREADS) {
      const int h = i / w.head_dim, d = i % w.head_dim;
      shared.queries[h][d] = h < heads.count ? w.scaling * number(row_of<T>(w.query, heads.batch, heads.first + h)[d]) : 0.f;
    }
    if (thread < HEADS) shared.largest[thread] = -INFINITY, shared.total[thread] = 0.f;
#pragma unroll
    for (int h = 0; h < HEADS; ++h) sums[h] = 0.f;
  }

  // The scores of a tile. Lanes of a group take the elements of a key in turn; a group beyond the last key does it over.
  __device__ void score(int begin, int count) {
    const int group = thread / LANES, place = thread % LANES;
    for (int base = 0; base < count; base += GROUPS * KEYS_AT_ONCE) {
      const T *keys[KEYS_AT_ONCE];
      float scores[KEYS_AT_ONCE][HEADS] = {};
#pragma unroll
      for (int u = 0; u < KEYS_AT_ONCE; ++u) keys[u] = row(ring_key, new_key, w.ring_key, begin + min(base + u * GROUPS + group, count - 1));
#pragma unroll 8
      for (int d = place; d < w.head_dim; d += LANES) {
        float key[KEYS_AT_ONCE];
#pragma unroll
        for (int u = 0; u < KEYS_AT_ONCE; ++u) key[u] = number(keys[u][d]);
#pragma unroll
        for (int h = 0; h < HEADS; ++h)
#pragma unroll
          for (int u = 0; u < KEYS_AT_ONCE; ++u) scores[u][h] += shared.queries[h][d] * key[u];
      }
#pragma unroll
      for (int u = 0; u < KEYS_AT_ONCE; ++u)
#pragma unroll
        for (int h = 0; h < HEADS; ++h) {
          float sum = scores[u][h];
#pragma unroll
          for (int step = LANES / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
          const int slot = base + u * GROUPS + group;
          if (place == 0 && slot < count) shared.weights[h][slot] = sum;
        }
    }
  }

  // A warp a head.
  __device__ void weigh(int count) {
    for (int h = warp; h < heads.count; h += WARPS) {
      float *const weights = shared.weights[h];
      const float before = shared.largest[h];
      float top = before, total = 0.f;
      for (int i = lane; i < count; i += 32) top = fmaxf(top, weights[i]);
      top = warp_max(top);
      for (int i = lane; i < count; i += 32) total += weights[i] = expf(weights[i] - top);
      total = warp_sum(total);
      __syncwarp();  // all lanes have read the largest so far, as the sums say already, but not to racecheck
      if (lane == 0) {
        const float shrink = expf(before - top);
        shared.largest[h] = top, shared.shrink[h] = shrink, shared.total[h] = shared.total[h] * shrink + total;
      }
    }
  }

  // A thread has a column of the values, of every `parts`-th slot; one behind the last column has none.
  struct Part {
    int parts, first, column;
    __device__ Part(int thread, int value_dim, int count) : parts(THREADS / value_dim), first(thread / value_dim), column(thread % value_dim) {
      if (first >= parts) first = count;
    }
  };
  __device__ void send_for(T (&ahead)[AHEAD], int begin, int count) const {
    const Part part(thread, w.value_dim, count);
#pragma unroll
    for (int u = 0; u < AHEAD; ++u) {
      const int i = part.first + u * part.parts;
      if (i < count) ahead[u] = row(ring_value, new_value, w.ring_value, begin + i)[part.column];
    }
  }
  __device__ void add(const T (&ahead)[AHEAD], int begin, int count) {
    const Part part(thread, w.value_dim, count);
#pragma unroll
    for (int h = 0; h < HEADS; ++h) sums[h] *= h < heads.count ? shared.shrink[h] : 0.f;
#pragma unroll
    for (int u = 0; u < AHEAD; ++u)
      if (const int i = part.first + u * part.parts; i < count) add_one(i, number(ahead[u]));
#pragma unroll 8
    for (int i = part.first + AHEAD * part.parts; i < count; i += part.parts) add_one(i, number(row(ring_value, new_value, w.ring_value, begin + i)[part.column]));
  }
  __device__ void add_one(int i, float value) {
#pragma unroll
    for (int h = 0; h < HEADS; ++h)
      if (h < heads.count) sums[h] += shared.weights[h][i] * value;
  }

  __device__ void finish() {
    const int parts = THREADS / w.value_dim;
#pragma unroll
    for (int h = 0; h < HEADS; ++h) shared.parts[h][thread] = sums[h];
    __syncthreads();
    for (int i = thread; i < heads.count * w.value_dim; i += THREADS) {
      const int h = i / w.value_dim, column = i % w.value_dim;
      float sum = 0.f;
      for (int part = 0; part < parts; ++part) sum += shared.parts[h][part * w.value_dim + column];
      write(heads.first + h, column, sum / shared.total[h]);
    }
  }

  __device__ void run() {
    if (is_padding(w, heads.batch)) {
      for (int i = thread; i < heads.count * w.value_dim; i += THREADS) write(heads.first + i / w.value_dim, i % w.value_dim, 0.f);
      return;
    }
    begin();
    for (int at = 0; at < visible; at += SLOTS) {
      const int count = min(SLOTS, visible - at);
      T ahead[AHEAD];
      send_for(ahead, at, count);
      __syncthreads();
      score(at, count);
      __syncthreads();
      weigh(count);
      __syncthreads();
      add(ahead, at, count);
    }
    finish();
  }
};

}  // namespace linattn_ring
