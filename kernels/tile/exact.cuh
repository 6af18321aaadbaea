// Products of bfloat16 that lose nothing, and the halves of words that their factors stand in. tests/emulation has a second form of this file.
#pragma once
#include <stdint.h>

namespace linattn_tile {

// The lower halves of two words, and the upper ones, x's first.
__device__ __forceinline__ uint32_t lower_halves(uint32_t x, uint32_t y) { return __byte_perm(x, y, 0x5410); }
__device__ __forceinline__ uint32_t upper_halves(uint32_t x, uint32_t y) { return __byte_perm(x, y, 0x7632); }

// Two products of two bfloat16: the nearest bfloat16, and what is left, which is one too.
__device__ __forceinline__ void multiply_two_exactly(uint32_t x, uint32_t y, uint32_t &high, uint32_t &low) {
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(high) : "r"(x), "r"(y), "r"(0x80008000u));
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(low) : "r"(x), "r"(y), "r"(high ^ 0x80008000u));
}

// x y + sum, of two bfloat16 each.
__device__ __forceinline__ uint32_t multiply_add_two(uint32_t x, uint32_t y, uint32_t sum) {
  uint32_t both;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(both) : "r"(x), "r"(y), "r"(sum));
  return both;
}

}  // namespace linattn_tile
