// The noise that stands in for dropout: the stream of hf_linattn/ops/noise.py, made again wherever it is needed.
#pragma once
#include <cuda_runtime.h>

#include "linattn.h"

namespace linattn_mma {

// (1 - p) (1 + psi), psi ~ N(0, p), of the outputs `column` (even) and `column` + 1 of one token: Philox4x32-10 keyed by the seed, counted by
// column / 4, token and row = batch * query_heads + head, then the Box-Muller transform of two of its four words.
struct Noise {
  float kept, spread;  // 1 - p, (1 - p) sqrt(p)
  uint32_t key0, key1;

  __device__ __forceinline__ explicit Noise(const linattn_problem &problem) {
    const float p = *problem.dropout_p;
    const uint64_t seed = static_cast<uint64_t>(*problem.seed);
    kept = 1.f - p, spread = kept * sqrtf(p), key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  }
  __device__ __noinline__ float2 two(uint32_t row, int64_t token, int column) const {
    uint32_t c0 = column / 4, c1 = static_cast<uint32_t>(token), c2 = static_cast<uint32_t>(token >> 32), c3 = row, k0 = key0, k1 = key1;
#pragma unroll
    for (int round = 0; round < 10; ++round) {
      const uint32_t high0 = __umulhi(c0, 0xD2511F53u), low0 = c0 * 0xD2511F53u, high2 = __umulhi(c2, 0xCD9E8D57u), low2 = c2 * 0xCD9E8D57u;
      c0 = high2 ^ c1 ^ k0, c1 = low2, c2 = high0 ^ c3 ^ k1, c3 = low0;
      k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    const bool later = column & 2;
    const float radius = (static_cast<float>((later ? c2 : c0) >> 8) + 0.5f) * 0x1p-24f, turn = (static_cast<float>((later ? c3 : c1) >> 8) + 0.5f) * 0x1p-24f;
    const float length = sqrtf(-2.f * logf(radius));
    float sine, cosine;
    sincospif(2.f * turn, &sine, &cosine);
    return make_float2(kept + spread * length * cosine, kept + spread * length * sine);
  }
};

}  // namespace linattn_mma
