// kernels/tile/exact.cuh on a CPU.
#pragma once
#include "tile/instructions.cuh"

namespace linattn_tile {

inline uint32_t lower_halves(uint32_t x, uint32_t y) { return (x & 0xffffu) | y << 16; }
inline uint32_t upper_halves(uint32_t x, uint32_t y) { return x >> 16 | (y & 0xffff0000u); }
inline void multiply_two_exactly(uint32_t x, uint32_t y, uint32_t &high, uint32_t &low) {
  const auto product = [&](int shift) { return number<__nv_bfloat16>(x >> shift) * number<__nv_bfloat16>(y >> shift); };
  high = pack_bf16(product(0), product(16));
  low = pack_bf16(product(0) - number<__nv_bfloat16>(high), product(16) - number<__nv_bfloat16>(high >> 16));
}
inline uint32_t multiply_add_two(uint32_t x, uint32_t y, uint32_t sum) {
  const auto one = [&](int shift) { return number<__nv_bfloat16>(x >> shift) * number<__nv_bfloat16>(y >> shift) + number<__nv_bfloat16>(sum >> shift); };
  return pack_bf16(one(0), one(16));
}

}  // namespace linattn_tile
