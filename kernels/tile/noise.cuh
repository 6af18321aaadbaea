// The noise that stands in for dropout: the stream of hf_linattn/ops/noise.py, made again wherever it is needed.
#pragma once
#include <cuda_runtime.h>

#include "tile/instructions.cuh"
#include "linattn.h"

namespace linattn_tile {

// (1 - p) (1 + psi), psi ~ N(0, p), of each output: Philox4x32-10 keyed by the seed, counted by column / 4, token and row = batch *
// query_heads + head, then the Box-Muller transform: its first two words make columns 0 and 1 of the four, the others 2 and 3.
struct Noise {
  float kept, spread;  // 1 - p, (1 - p) sqrt(p)
  uint32_t key0, key1;

  __device__ __forceinline__ explicit Noise(const linattn_problem &problem) {
    const float p = *problem.dropout_p;
    const uint64_t seed = static_cast<uint64_t>(*problem.seed);
    kept = 1.f - p, spread = kept * sqrtf(p), key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  }
  __device__ __forceinline__ uint4 words(uint32_t row, int64_t token, int column) const {
    uint4 c = make_uint4(column / 4, static_cast<uint32_t>(token), static_cast<uint32_t>(token >> 32), row);
    uint32_t k0 = key0, k1 = key1;
#pragma unroll
    for (int round = 0; round < 10; ++round) {
      const uint64_t first = static_cast<uint64_t>(c.x) * 0xD2511F53u, second = static_cast<uint64_t>(c.z) * 0xCD9E8D57u;
      c = make_uint4(static_cast<uint32_t>(second >> 32) ^ c.y ^ k0, static_cast<uint32_t>(second), static_cast<uint32_t>(first >> 32) ^ c.w ^ k1, static_cast<uint32_t>(first));
      k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return c;
  }
  // Two factors of two words. The angle is turned by half, where the fast functions are at their best.
  __device__ __forceinline__ float2 factors(uint32_t radius, uint32_t turn) const {
    const float square = -1.3862943611f * log2_fast((static_cast<float>(radius >> 8) + 0.5f) * 0x1p-24f);
    const float angle = 6.2831853072f * ((static_cast<float>(turn >> 8) + 0.5f) * 0x1p-24f - 0.5f), length = -spread * sqrtf(fmaxf(square, 0.f));
    float sine, cosine;
    sine_and_cosine_fast(angle, sine, cosine);
    return make_float2(fmaf(length, cosine, kept), fmaf(length, sine, kept));
  }
  // For an accumulator's lanes: columns `column` (even) and the next of two tokens. Neighbouring lanes, whose columns are of one four, each
  // make one token's words and exchange halves.
  __device__ __noinline__ float4 two_rows(uint32_t row, int64_t upper, int64_t lower, int column) const {
    const bool later = column & 2;
    const uint4 own = words(row, later ? lower : upper, column);
    const uint32_t x = __shfl_xor_sync(0xffffffffu, later ? own.x : own.z, 1), y = __shfl_xor_sync(0xffffffffu, later ? own.y : own.w, 1);
    const float2 first = later ? factors(x, y) : factors(own.x, own.y), second = later ? factors(own.z, own.w) : factors(x, y);
    return make_float4(first.x, first.y, second.x, second.y);
  }
};

}  // namespace linattn_tile
