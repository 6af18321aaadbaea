// How far a decay lets a query see: tiles of keys of which nothing is left are not met, neither by the query nor by them.
//
// A query sees its own token, which has not decayed and counts the least of f or more. Keys of which a decay has left so little that even the most of f, from as many keys as a
// sequence has, comes to less than kNothing of that, are out of its reach. Where f may vanish, or scores have no bound, there is no such least, and every key is met.
#pragma once
#include "pairs/gates.cuh"

namespace linattn_pairs {

constexpr float kNothing = 0x1p-24f;  // in float32

// What a decay leaves of a key, at the least, that is in reach of a query head: `some` / `of`, without a division, which blocks would wait for.
struct Least {
  float some = 0.f, of = 1.f;  // everything is
  __device__ __forceinline__ Least() {}
  __device__ __forceinline__ Least(const linattn_problem &p, int head)
      : Least(p, p.coefficients[head], p.coefficients[head + p.query_heads], p.coefficients[head + 2 * p.query_heads], p.coefficients[head + 3 * p.query_heads]) {}
  __device__ __forceinline__ Least(const linattn_problem &p, float a, float b, float c, float most_of_s) {
    const bool inside = c > 0.f && fabsf(b) < 2.f * c * most_of_s;  // f is least at -b / 2c, where it is (4 a c - b^2) / 4c
    const float unit = inside ? 4.f * c : 1.f, least = inside ? fmaf(4.f * a, c, -b * b) : fmaf(fmaf(c, most_of_s, -fabsf(b)), most_of_s, a);
    const float most = unit * (fabsf(a) + (fabsf(b) + fabsf(c) * most_of_s) * most_of_s), all = most * static_cast<float>(p.length);
    if (p.normalize_qk && least > 0x1p-20f * most && all < INFINITY) some = least * kNothing, of = all;
  }
  __device__ __forceinline__ bool reaches(double halvings) const { return exp2_fast(-static_cast<float>(halvings)) * of >= some; }
};
// Of the head that reaches farthest of those that share a key.
__device__ __forceinline__ Least farthest(const linattn_problem &p, int head, int heads) {
  Least found(p, head);
  for (int i = 1; i < heads; ++i) {
    const Least other(p, head + i);
    if (other.some * found.of < found.some * other.of) found = other;
  }
  return found;
}

// Where tiles of keys, or of queries, begin or end to be in reach of a block's own tokens: found by a warp, whose lanes look at 32 tiles at a time. What they read of the first
// ones is on its way as soon as this is made, beside other work.
template <bool KEYS, typename Reader> class Reach {
  const Reader decay;
  int begin, end;  // tiles between which the edge lies
  double edge = 0, sum = 0;
  Least least;

  __device__ __forceinline__ int step() const { return (end - begin + 31) / 32; }
  __device__ __forceinline__ int own() const { return begin + step() * static_cast<int>(threadIdx.x % 32); }
  __device__ __forceinline__ void read() {
    if (own() < end) sum = decay.sum_of(static_cast<int64_t>(own()) * kKeys + (KEYS ? kKeys - 1 : 0));
  }

 public:
  // at: the token before a block's own queries, or the last of its own keys; head, heads: the query heads whose pairs are meant; from `begin` to `end` other tiles lie away.
  __device__ __forceinline__ Reach(const linattn_problem &p, const Reader &decay, int64_t at, int head, int heads, int begin, int end) : decay(decay), begin(begin), end(end) {
    if (!p.log_decay || !p.causal || begin >= end) {
      (KEYS ? this->end : this->begin) = KEYS ? begin : end;  // all are in reach
      return;
    }
    read();
    edge = decay.sum_of(at), least = farthest(p, head, heads);
  }
  // The first tile of keys that is in reach, or of queries that is not.
  __device__ __forceinline__ int find() {
    while (begin < end) {
      const bool seen = least.reaches(KEYS ? sum - edge : edge - sum);
      const int last = __reduce_max_sync(0xffffffffu, own() < end && seen != KEYS ? own() : begin - 1), next = min(end, last + step());
      if (last < begin) return begin;
      begin = last + 1, end = next;
      read();
    }
    return end;
  }
};
template <typename Reader> __device__ __forceinline__ Reach<true, Reader> keys_in_reach(const linattn_problem &p, const Reader &decay, int head, int64_t begin, int first) {
  return {p, decay, begin - 1, head, 1, first, static_cast<int>(begin / kKeys)};
}
template <typename Reader>
__device__ __forceinline__ Reach<false, Reader> queries_in_reach(const linattn_problem &p, const Reader &decay, int head, int heads, int64_t last, int behind, int end) {
  return {p, decay, last, head, heads, behind, end};
}

}  // namespace linattn_pairs
