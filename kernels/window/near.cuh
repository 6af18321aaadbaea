// Softmax over the slots of a ring that the newest token sees, by tiles of slots, so that windows may be of any length:
//   the largest score so far m, total = sum exp(s - m) and out = sum exp(s - m) v shrink by exp(m - m') when a tile has a larger one m'.
// Slots that hold no token yet are not read.
#pragma once
#include "tile/instructions.cuh"
#include "window/arguments.cuh"

namespace linattn_ring {

constexpr int LANES = 8;                                   // that share a key
constexpr int GROUPS = THREADS / LANES, KEYS_AT_ONCE = 3;  // of a group
constexpr int SLOTS = GROUPS * KEYS_AT_ONCE;               // of a tile, at most: a window of 64 tokens and 4 sinks is one
constexpr int TILE = 24 * 1024;                            // bytes of its keys and values, of which one is on its way while another is at hand

template <typename T, int HEADS> struct Near {
  static constexpr int PIECE = linattn_ring::PIECE<T>;

  struct alignas(4 * HEADS) Weights {  // of a slot, for each query head
    float of[HEADS];
  };
  struct Shared {
    alignas(16) float queries[HEADS][MAX_DIM];  // times the scaling, zeros up to a whole number of pieces
    Weights weights[SLOTS];         // scores, and then exp(score - largest)
    float largest[HEADS], total[HEADS], shrink[HEADS];
    float parts[HEADS][THREADS];
  };

  const Arguments &args;
  const linattn_window &w;
  Shared &shared;
  T *const tiles;
  const Heads heads;
  const int thread, warp, lane;
  const T *const new_key, *const new_value, *const ring_key, *const ring_value;
  const int key_pieces, value_pieces, slots;  // of a row; of a tile
  int sinks, visible, newest;                 // slots that are seen: so many sinks, these and tokens of the window, and which of the latter is the newest
  bool in_pieces;                             // whether rows begin and end on 16-byte boundaries
  float sums[HEADS];                          // this thread's, of its column

  __device__ Near(const Arguments &args, Shared &shared, unsigned char *tiles, const Heads &heads)
      : args(args), w(args.window), shared(shared), tiles(reinterpret_cast<T *>(tiles)), heads(heads), thread(threadIdx.x), warp(thread / 32), lane(thread % 32),
        new_key(row_of<T>(w.key, heads.batch, heads.key_head)), new_value(row_of<T>(w.value, heads.batch, heads.key_head)),
        ring_key(row_of<T>(w.ring_key, heads.batch, heads.key_head)), ring_value(row_of<T>(w.ring_value, heads.batch, heads.key_head)),
        key_pieces((w.head_dim + PIECE - 1) / PIECE), value_pieces((w.value_dim + PIECE - 1) / PIECE), slots(min(SLOTS, TILE / (16 * (key_pieces + value_pieces)))) {
    const int64_t seen = w.seen[heads.batch];
    sinks = static_cast<int>(min(max(seen + 1 - w.window, int64_t{0}), int64_t{w.sinks}));
    visible = sinks + static_cast<int>(min(seen + 1, int64_t{w.window})), newest = static_cast<int>(seen % w.window);
    const auto at = [](const T *row) { return reinterpret_cast<uintptr_t>(row); };
    const uintptr_t steps = (w.ring_key.token_stride | w.ring_value.token_stride | w.head_dim | w.value_dim) * sizeof(T);
    in_pieces = ((at(new_key) | at(new_value) | at(ring_key) | at(ring_value) | steps) & 15) == 0;
  }

  // The i-th of the vectors that are seen.
  __device__ const T *row(const T *ring, const T *of_newest, const linattn_tensor &tensor, int i) const {
    if (i < sinks) return ring + i * tensor.token_stride;
    return i - sinks == newest ? of_newest : ring + (w.sinks + i - sinks) * tensor.token_stride;
  }
  // A tile's rows: a slot's key, and behind it its value.
  __device__ T *tile(int number) const { return tiles + number % 2 * (TILE / static_cast<int>(sizeof(T))); }
  __device__ T *keys(int number, int slot) const { return tile(number) + slot * PIECE * (key_pieces + value_pieces); }
  __device__ T *values(int number, int slot) const { return keys(number, slot) + PIECE * key_pieces; }
  __device__ int slots_in(int number) const { return min(slots, visible - number * slots); }

  // A tile on its way, half a warp a slot.
  __device__ void send_for(int number) const {
    const int count = slots_in(number);
#pragma unroll 1
    for (int slot = thread / 16; slot < count; slot += THREADS / 16) {
      const T *const key = row(ring_key, new_key, w.ring_key, number * slots + slot), *const value = row(ring_value, new_value, w.ring_value, number * slots + slot);
#pragma unroll 1
      for (int piece = thread % 16; piece < key_pieces + value_pieces; piece += 16) {
        const bool is_key = piece < key_pieces;
        const int first = PIECE * (is_key ? piece : piece - key_pieces);
        T *const to = keys(number, slot) + PIECE * piece;
        if (in_pieces) linattn_tile::copy_async(linattn_tile::shared_address(to), (is_key ? key : value) + first, true);
        else copy_piece(to, (is_key ? key : value) + first, (is_key ? w.head_dim : w.value_dim) - first);
      }
    }
    linattn_tile::copy_commit();
  }
  __device__ void copy_piece(T *to, const T *from, int count) const {
#pragma unroll
    for (int i = 0; i < PIECE; ++i) to[i] = i < count ? from[i] : T(0.f);
  }
  __device__ void write(int head, int column, float x) const {
    if (args.has_beside) args.scratch.near[(static_cast<int64_t>(heads.batch) * w.query_heads + head) * w.value_dim + column] = x;
    else linattn::store(w.out.data, w.dtype, offset_of(w.out, heads.batch, head, 0) + column, x);
  }

  __device__ void begin() {
    for (int h = warp; h < HEADS; h += WARPS)
#pragma unroll 1
      for (int d = lane; d < PIECE * key_pieces; d += 32)
        shared.queries[h][d] = h < heads.count && d < w.head_dim ? w.scaling * linattn_ring::number(row_of<T>(w.query, heads.batch, heads.first + h)[d]) : 0.f;
    if (thread < HEADS) shared.largest[thread] = -INFINITY, shared.total[thread] = 0.f;
#pragma unroll
    for (int h = 0; h < HEADS; ++h) sums[h] = 0.f;
  }

  // The scores of a tile. Lanes of a group take the pieces of a key in turn.
  __device__ void score(int number) {
    const int group = thread / LANES, place = thread % LANES, count = slots_in(number);
    float scores[KEYS_AT_ONCE][HEADS] = {};
#pragma unroll 1
    for (int piece = place; piece < key_pieces; piece += LANES) {
      float key[KEYS_AT_ONCE][PIECE];
#pragma unroll
      for (int u = 0; u < KEYS_AT_ONCE; ++u) read_piece<T>(key[u], keys(number, min(u * GROUPS + group, count - 1)) + PIECE * piece);
#pragma unroll
      for (int h = 0; h < HEADS; ++h)
#pragma unroll
        for (int i = 0; i < PIECE; i += 4) {
          const float4 query = *reinterpret_cast<const float4 *>(shared.queries[h] + PIECE * piece + i);
#pragma unroll
          for (int u = 0; u < KEYS_AT_ONCE; ++u) {
            scores[u][h] = fmaf(query.x, key[u][i], scores[u][h]), scores[u][h] = fmaf(query.y, key[u][i + 1], scores[u][h]);
            scores[u][h] = fmaf(query.z, key[u][i + 2], scores[u][h]), scores[u][h] = fmaf(query.w, key[u][i + 3], scores[u][h]);
          }
        }
    }
#pragma unroll
    for (int u = 0; u < KEYS_AT_ONCE; ++u) {
      const float sum = sum_of_neighbors<LANES>(scores[u], place);
      if (const int slot = u * GROUPS + group; place % (LANES / HEADS) == 0 && slot < count) shared.weights[slot].of[place / (LANES / HEADS)] = sum;
    }
  }
  // A warp a head.
  __device__ void weigh(int count) {
    for (int h = warp; h < heads.count; h += WARPS) {
      const float before = shared.largest[h];
      float top = before, total = 0.f;
      for (int i = lane; i < count; i += 32) top = fmaxf(top, shared.weights[i].of[h]);
      top = warp_max(top);
      for (int i = lane; i < count; i += 32) total += shared.weights[i].of[h] = expf(shared.weights[i].of[h] - top);
      total = warp_sum(total);
      __syncwarp();  // all lanes have read the largest so far, as the sums say already, but not to racecheck
      if (lane == 0) {
        const float shrink = expf(before - top);
        shared.largest[h] = top, shared.shrink[h] = shrink, shared.total[h] = shared.total[h] * shrink + total;
      }
    }
  }

  // A thread has a column of the values, of every `parts`-th slot; one behind the last column has none.
  __device__ void add(int number) {
    const int parts = THREADS / w.value_dim, part = thread / w.value_dim, column = thread % w.value_dim, count = slots_in(number);
#pragma unroll
    for (int h = 0; h < HEADS; ++h) sums[h] *= h < heads.count ? shared.shrink[h] : 0.f;
    if (part >= parts) return;
#pragma unroll 4
    for (int slot = part; slot < count; slot += parts) {
      const float value = linattn_ring::number(values(number, slot)[column]);
      const Weights weights = shared.weights[slot];
#pragma unroll
      for (int h = 0; h < HEADS; ++h) sums[h] = fmaf(weights.of[h], value, sums[h]);
    }
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
    send_for(0);
    begin();
    for (int number = 0; slots_in(number) > 0; ++number) {
      send_for(number + 1);
      linattn_tile::copy_wait<1>();
      __syncthreads();
      score(number);
      __syncthreads();
      weigh(slots_in(number));
      __syncthreads();
      add(number);
      __syncthreads();
    }
    finish();
  }
};

}  // namespace linattn_ring
