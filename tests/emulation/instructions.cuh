// kernels/instructions.cuh on a CPU: the same functions with the same results, but for the last places of the fast ones.
#pragma once
#include "emulator.h"

namespace linattn_tile {

inline int remade(int x) { return x; }

inline uint32_t bits_of(__nv_bfloat16 x) {
  uint16_t bits;
  std::memcpy(&bits, &x, 2);
  return bits;
}
inline uint32_t bits_of(__half x) {
  uint16_t bits;
  std::memcpy(&bits, &x, 2);
  return bits;
}
template <typename T> float number(uint32_t bits) {
  const uint16_t half = static_cast<uint16_t>(bits);
  T x;
  std::memcpy(&x, &half, 2);
  return static_cast<float>(x);
}

inline uint32_t pack_bf16(float low, float high) { return bits_of(__float2bfloat16_rn(low)) | bits_of(__float2bfloat16_rn(high)) << 16; }
inline uint32_t pack_fp16(float low, float high) { return bits_of(__float2half_rn(low)) | bits_of(__float2half_rn(high)) << 16; }

inline uint32_t multiply_two(uint32_t x, uint32_t y) {
  return pack_bf16(number<__nv_bfloat16>(x) * number<__nv_bfloat16>(y), number<__nv_bfloat16>(x >> 16) * number<__nv_bfloat16>(y >> 16));
}
inline uint32_t multiply_two_halves(uint32_t x, uint32_t y) { return pack_fp16(number<__half>(x) * number<__half>(y), number<__half>(x >> 16) * number<__half>(y >> 16)); }

template <typename Two> struct OneOf;
template <> struct OneOf<__nv_bfloat162> {
  using type = __nv_bfloat16;
  static uint32_t pack(float low, float high) { return pack_bf16(low, high); }
};
template <> struct OneOf<__half2> {
  using type = __half;
  static uint32_t pack(float low, float high) { return pack_fp16(low, high); }
};
template <typename Two> uint32_t scale_pair(uint32_t x, uint32_t high, uint32_t low) {
  using T = typename OneOf<Two>::type;
  const auto one = [&](int shift) {
    const float value = number<T>(x >> shift), rest = number<T>(OneOf<Two>::pack(value * number<T>(low >> shift), 0.f));
    return value * number<T>(high >> shift) + rest;
  };
  return OneOf<Two>::pack(one(0), one(16));
}

// Products summed in double: the tensor cores' own order is not known, and their sums are as good as float32's.
template <typename T> void mma_16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  uint32_t (&own)[6] = emulation::self().fragment;
  std::copy(a, a + 4, own), own[4] = b0, own[5] = b1;
  emulation::sync_warp();
  const int group = emulation::lane() / 4, place = emulation::lane() % 4;
  double exact[4];
  for (int i = 0; i < 4; ++i) {
    exact[i] = sum[i];
    for (int k = 0; k < 16; ++k) {
      const uint32_t left = emulation::neighbour(4 * group + k % 8 / 2).fragment[k / 8 * 2 + i / 2];
      const uint32_t right = emulation::neighbour(4 * (2 * place + i % 2) + k % 8 / 2).fragment[4 + k / 8];
      exact[i] += static_cast<double>(number<T>(left >> k % 2 * 16)) * number<T>(right >> k % 2 * 16);
    }
  }
  emulation::sync_warp();
  for (int i = 0; i < 4; ++i) sum[i] = static_cast<float>(exact[i]);
}
inline void mma_bf16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { mma_16<__nv_bfloat16>(sum, a, b0, b1); }
inline void mma_fp16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { mma_16<__half>(sum, a, b0, b1); }

// ---- shared memory: an address is a distance from its beginning

inline uint32_t shared_address(const void *pointer) { return static_cast<uint32_t>(static_cast<const unsigned char *>(pointer) - emulation::shared_memory); }

// Element (row, column) of one of four 8 x 8 corners, whose rows' addresses lanes 8 corner to 8 corner + 7 hold.
inline unsigned char *element(int corner, int row, int column) {
  const uint32_t address = emulation::neighbour(8 * corner + row).fragment[0];
  emulation::require(address % 16 == 0 && address + 16 <= emulation::kShared, "a matrix's row lies outside of shared memory");
  return emulation::shared_memory + address + 2 * column;
}

inline void load_matrix(uint32_t (&r)[4], uint32_t address, bool transposed) {
  emulation::self().fragment[0] = address;
  emulation::sync_warp();
  const int group = emulation::lane() / 4, pair = emulation::lane() % 4 * 2;
  for (int corner = 0; corner < 4; ++corner) {
    uint16_t two[2];
    for (int i = 0; i < 2; ++i) std::memcpy(&two[i], transposed ? element(corner, pair + i, group) : element(corner, group, pair + i), 2);
    r[corner] = two[0] | static_cast<uint32_t>(two[1]) << 16;
  }
  emulation::sync_warp();
}
inline void ldmatrix(uint32_t (&r)[4], uint32_t address) { load_matrix(r, address, false); }
inline void ldmatrix_transposed(uint32_t (&r)[4], uint32_t address) { load_matrix(r, address, true); }
inline void stmatrix(uint32_t address, const uint32_t (&r)[4], int) {
  emulation::self().fragment[0] = address;
  emulation::sync_warp();
  for (int corner = 0; corner < 4; ++corner) std::memcpy(element(corner, emulation::lane() / 4, emulation::lane() % 4 * 2), &r[corner], 4);
  emulation::sync_warp();
}

// A copy arrives when it is waited for, and its bytes are NaN until then.
inline void copy_later(uint32_t to, const void *from, int bytes, bool valid) {
  emulation::require(to % bytes == 0 && to + bytes <= emulation::kShared, "a copy goes outside of shared memory");
  emulation::require(reinterpret_cast<uintptr_t>(from) % bytes == 0, "a copy begins off its boundary");
  std::memset(emulation::shared_memory + to, 0xff, bytes);
  emulation::self().open.push_back({to, valid ? from : nullptr, bytes});
}
inline void copy_async(uint32_t shared, const void *global, bool valid) { copy_later(shared, global, 16, valid); }
inline void copy_number_async(uint32_t shared, const float *global, bool valid) { copy_later(shared, global, 4, valid); }
inline void copy_commit() {
  emulation::self().groups.push_back(std::move(emulation::self().open));
  emulation::self().open.clear();
}
template <int PENDING> void copy_wait() {
  std::vector<std::vector<emulation::Copy>> &groups = emulation::self().groups;
  for (; groups.size() > PENDING; groups.erase(groups.begin()))
    for (const emulation::Copy &copy : groups.front()) emulation::perform(copy);
}

enum Barrier { kScalesReady = 1, kScalesShared, kStateRead, kHalvesExchanged, kRowsWeighed, kFirstGroup, kSecondGroup };
template <Barrier NUMBER, int THREADS> void barrier_sync() { emulation::sync_block(NUMBER, THREADS); }
template <Barrier NUMBER, int THREADS> void barrier_arrive() { emulation::arrive(NUMBER, THREADS); }
template <int THREADS> void barrier_sync(int number) { emulation::sync_block(number, THREADS); }
template <int THREADS> void barrier_arrive(int number) { emulation::arrive(number, THREADS); }

inline float reciprocal(float x) { return 1.f / x; }
inline float reciprocal_root(float x) { return 1.f / std::sqrt(x); }
inline float exp2_fast(float x) { return std::exp2(x); }
inline float log2_fast(float x) { return std::log2(x); }
inline void sine_and_cosine_fast(float x, float &sine, float &cosine) { sine = std::sin(x), cosine = std::cos(x); }

}  // namespace linattn_tile

namespace linattn {

inline float round_to_tf32(float x) { return __uint_as_float((__float_as_uint(x) + 0x1000u) & 0xffffe000u); }

inline void mma_tf32(float (&sum)[4], const float (&a)[4], const float (&b)[2]) {
  uint32_t (&own)[6] = emulation::self().fragment;
  for (int i = 0; i < 4; ++i) own[i] = __float_as_uint(a[i]) & 0xffffe000u;
  for (int i = 0; i < 2; ++i) own[4 + i] = __float_as_uint(b[i]) & 0xffffe000u;
  emulation::sync_warp();
  const int group = emulation::lane() / 4, place = emulation::lane() % 4;
  double exact[4];
  for (int i = 0; i < 4; ++i) {
    exact[i] = sum[i];
    for (int k = 0; k < 8; ++k) {
      const uint32_t left = emulation::neighbour(4 * group + k % 4).fragment[k / 4 * 2 + i / 2], right = emulation::neighbour(4 * (2 * place + i % 2) + k % 4).fragment[4 + k / 4];
      exact[i] += static_cast<double>(__uint_as_float(left)) * __uint_as_float(right);
    }
  }
  emulation::sync_warp();
  for (int i = 0; i < 4; ++i) sum[i] = static_cast<float>(exact[i]);
}

}  // namespace linattn
