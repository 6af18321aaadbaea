// One new token of a window: what its kernels share.
//
//   near     softmax over the ring and the new token, of the query heads of a key head      near.cuh
//   leaving  the token goes into the ring; the one that leaves it is made ready for the
//            step of the attention beside the window                                        leaving.cuh
//   step     of that attention                                                              decode.cu
//   mix      both outputs by the gate; the token is counted                                 mix.cuh
//
// `near` and `leaving` are blocks of one launch: `near` reads no slot that `leaving` writes, for the newest token is read where it came from, and
// a sink is looked at once it has left the window.
#pragma once
#include "generic/job.cuh"

namespace linattn_ring {

using linattn::MAX_DIM;
using linattn::offset_of;
using linattn::THREADS;

constexpr int WARPS = THREADS / 32;
constexpr int HEADS_AT_ONCE = 8;  // query heads of a key head, a block each; more take more blocks

// What the kernels leave to one another, float32 and contiguous.
struct Scratch {
  float *near;               // (batch, query_heads, value_dim)
  float *far;                // (batch, query_heads, value_dim), one column more with an input gate
  float *query, *key;        // (batch, query_heads, features), (batch, key_heads, features)
  float *value, *log_decay;  // of the token that leaves: (batch, key_heads, value_dim), as `far`; (batch, key_heads)
  int32_t *left;             // (batch): whether one does
};

struct Arguments {
  linattn_window window;
  linattn_beside beside;
  int32_t has_beside;
  Scratch scratch;
};

__device__ inline float number(float x) { return x; }
__device__ inline float number(__half x) { return __half2float(x); }
__device__ inline float number(__nv_bfloat16 x) { return __bfloat162float(x); }

// Elements of 16 bytes, by which rows are copied and read.
template <typename T> constexpr int PIECE = 16 / sizeof(T);
template <typename T> __device__ inline void read_piece(float (&to)[PIECE<T>], const T *from) {
  union {
    uint4 all;
    T each[PIECE<T>];
  } piece;
  piece.all = *reinterpret_cast<const uint4 *>(from);
#pragma unroll
  for (int i = 0; i < PIECE<T>; ++i) to[i] = number(piece.each[i]);
}

// The vector of a tensor of length 1, or that of a slot of a ring.
template <typename T> __device__ T *row_of(const linattn_tensor &x, int batch, int head, int64_t slot = 0) { return static_cast<T *>(x.data) + offset_of(x, batch, head, slot); }

__device__ inline bool is_padding(const linattn_window &w, int batch) { return w.real && w.real[batch * w.real_stride] == 0; }

__device__ inline float warp_sum(float x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}
__device__ inline float warp_max(float x) {
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}

// Adds up COUNT numbers over LANES neighbors, `place` among them: lane l is left with the sum of number l COUNT / LANES. Powers of two.
template <int LANES, int COUNT> __device__ inline float sum_of_neighbors(float (&x)[COUNT], int place) {
  int left = COUNT;
#pragma unroll
  for (int step = LANES / 2; step > 0; step /= 2) {
    const bool upper = place & step;
    if (left > 1) {
      left /= 2;
#pragma unroll
      for (int i = 0; i < left; ++i) x[i] = (upper ? x[i + left] : x[i]) + __shfl_xor_sync(0xffffffffu, upper ? x[i] : x[i + left], step);
    } else {
      x[0] += __shfl_xor_sync(0xffffffffu, x[0], step);
    }
  }
  return x[0];
}

// The query heads of a block: some of those that share a key head.
struct Heads {
  int batch, key_head, first, count;
  bool begins;  // whether they are the first of their key head
};
__device__ inline Heads heads_of(const linattn_window &w, int block, int at_once) {
  const int group = w.query_heads / w.key_heads, rounds = (group + at_once - 1) / at_once, round = block % rounds, key_head = block / rounds % w.key_heads;
  return {block / rounds / w.key_heads, key_head, key_head * group + round * at_once, min(at_once, group - round * at_once), round == 0};
}

}  // namespace linattn_ring
