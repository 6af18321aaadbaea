// kernels/tile/warpgroup.cuh on a CPU: each warp makes its own 16 rows of a product, from the descriptors as the hardware reads them.
//
// A product is done when it is waited for. Until then its sums are NaN; afterwards, too, where an operand in shared memory is not what it was when
// the product was issued: it came late, or was overwritten early. Sums touched on the way end the process, and so does a product without
// warpgroup_begin. What no test here finds is a missing warpgroup_publish.
#pragma once
#include "tile/tile.cuh"

namespace linattn_tile {

template <int D> constexpr bool kWarpgroups = false;  // of the engines whose code is that of sm_80 here
template <int D> constexpr bool kStateByGroups = false;

inline void warpgroup_publish() {}
template <int COUNT> void give_registers() {}
template <int COUNT> void take_registers() {}
template <int TILES> void warpgroup_keep(float (&)[TILES][4]) {}
template <int COUNT> void warpgroup_keep(uint32_t (&)[COUNT][4]) {}
template <int TILES> void warpgroup_overwrites(float (&d)[TILES][4]) {
  for (auto &sums : d)
    for (float &x : sums) x = NAN;
}

template <int D> uint64_t warpgroup_operand(uint32_t address, uint32_t panel = 0) {
  constexpr uint64_t kEightRows = 8 * Tile<D>::kRowBytes, kSwizzle = Tile<D>::kRowBytes == 32 ? 3 : Tile<D>::kRowBytes == 64 ? 2 : 1;
  return static_cast<uint64_t>((address & 0x3FFFF) >> 4) | static_cast<uint64_t>(panel >> 4) << 16 | kEightRows >> 4 << 32 | kSwizzle << 62;
}
inline uint64_t warpgroup_moved(uint64_t operand, uint32_t bytes) { return operand + (bytes >> 4); }

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
inline namespace hopper {  // not the functions of sm_80's code, which are in the same library

// Two bytes of an operand, `step` along the contraction and `other` along the rows of the result or its columns.
inline uint16_t element_of(uint64_t operand, int step, int other, bool along_rows) {
  const uint32_t begin = (operand & 0x3FFF) << 4, panel = (operand >> 16 & 0x3FFF) << 4, eight_rows = (operand >> 32 & 0x3FFF) << 4;
  const int swizzle = static_cast<int>(operand >> 62), row_bytes = swizzle == 1 ? 128 : swizzle == 2 ? 64 : 32;
  const int row = along_rows ? step : other, column = 2 * (along_rows ? other : step);
  emulation::require(swizzle != 0 && begin % (8 * row_bytes) < static_cast<uint32_t>(row_bytes), "an operand does not begin in the first of eight rows");
  emulation::require(along_rows ? panel != 0 || column < row_bytes : begin % row_bytes + column < row_bytes, "an operand is wider than its rows");
  uint32_t address = begin + row / 8 * eight_rows + row % 8 * row_bytes + column / row_bytes * panel + column % row_bytes;
  address ^= (address >> 7 & (row_bytes / 16 - 1)) << 4;
  emulation::require(address + 2 <= emulation::kShared, "an operand lies outside of shared memory");
  uint16_t bits;
  std::memcpy(&bits, emulation::shared_memory + address, 2);
  return bits;
}

// What a lane's part of a product takes from shared memory: the steps of its columns of B, then of its two rows of A.
inline std::vector<uint16_t> operands_of(const emulation::Product &product) {
  const int group = emulation::lane() / 4, place = emulation::lane() % 4, first = 16 * (emulation::block->running / emulation::kLanes % 4);
  std::vector<uint16_t> all;
  for (int n = 0; n < product.columns; ++n)
    if (n % 8 / 2 == place)
      for (int step = 0; step < 16; ++step) all.push_back(element_of(product.right, step, n, product.along_rows));
  if (!product.from_registers)
    for (int half = 0; half < 2; ++half)
      for (int step = 0; step < 16; ++step) all.push_back(element_of(product.left, step, first + 8 * half + group, false));
  return all;
}

// The lane's part of product `number` of its warp's oldest group but `group`, added to its sums.
inline void multiply(int group, int number) {
  emulation::Thread &self = emulation::self();
  const emulation::Product &product = self.products[group][number];
  const std::vector<uint16_t> operands = operands_of(product);
  std::vector<float> &sums = self.sums[product.sums];
  float left[2][16];
  for (int half = 0; half < 2; ++half)
    for (int step = 0; step < 16; ++step)
      left[half][step] = product.number(product.from_registers
                                            ? emulation::neighbour(emulation::lane() / 4 * 4 + step % 8 / 2).products[group][number].fragment[step / 8 * 2 + half] >> step % 2 * 16
                                            : operands[product.columns * 4 + 16 * half + step]);
  for (int i = 0; i < product.columns / 2; ++i) {
    double exact = product.accumulate ? sums[i] : 0.0;
    for (int step = 0; step < 16; ++step) exact += static_cast<double>(left[i % 4 / 2][step]) * product.number(operands[(i / 4 * 2 + i % 2) * 16 + step]);
    sums[i] = operands == product.issued ? static_cast<float>(exact) : NAN;
  }
}

inline void warpgroup_begin() { emulation::self().begun = true; }
inline void warpgroup_commit() {
  emulation::Thread &self = emulation::self();
  self.products.push_back(std::move(self.open_products)), self.open_products.clear();
  self.begun = false;
}
template <int PENDING> void warpgroup_wait() {
  std::vector<std::vector<emulation::Product>> &groups = emulation::self().products;
  const int done = std::max(static_cast<int>(groups.size()) - PENDING, 0);
  emulation::sync_warp();
  for (int group = 0; group < done; ++group)
    for (int number = 0; number < static_cast<int>(groups[group].size()); ++number) multiply(group, number);
  emulation::sync_warp();
  groups.erase(groups.begin(), groups.begin() + done);
  std::map<float *, std::vector<float>> &sums = emulation::self().sums;
  for (auto it = sums.begin(); it != sums.end();) {
    const auto is_to_come = [&](const std::vector<emulation::Product> &group) {
      return std::any_of(group.begin(), group.end(), [&](const emulation::Product &product) { return product.sums == it->first; });
    };
    if (std::any_of(groups.begin(), groups.end(), is_to_come) || is_to_come(emulation::self().open_products)) {
      ++it;
      continue;
    }
    for (size_t i = 0; i < it->second.size(); ++i) {
      emulation::require(__float_as_uint(it->first[i]) == emulation::kOnItsWay, "sums are written while a product is on its way");
      it->first[i] = it->second[i];
    }
    it = sums.erase(it);
  }
}

template <typename T, int N, bool ALONG_ROWS> struct WarpgroupProduct {
  static void run(float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    emulation::Product product{&d[0][0], N, accumulate, true, ALONG_ROWS};
    std::copy(a, a + 4, product.fragment);
    issue(product, b);
  }
  static void run(float (&d)[N / 8][4], uint64_t a, uint64_t b, bool accumulate) {
    emulation::Product product{&d[0][0], N, accumulate, false, ALONG_ROWS};
    product.left = a;
    issue(product, b);
  }
  static void issue(emulation::Product &product, uint64_t b) {
    emulation::Thread &self = emulation::self();
    emulation::require(self.begun, "a warpgroup's product without warpgroup_begin");
    product.right = b, product.number = &number<T>, product.issued = operands_of(product);
    std::vector<float> &sums = self.sums[product.sums];
    if (sums.empty()) {
      sums.assign(product.sums, product.sums + N / 2);
      std::fill(product.sums, product.sums + N / 2, __uint_as_float(emulation::kOnItsWay));
    }
    self.open_products.push_back(product);
  }
};

}  // namespace hopper
#else
inline void warpgroup_begin() {}
inline void warpgroup_commit() {}
template <int PENDING> void warpgroup_wait() {}
template <typename T, int N, bool ALONG_ROWS> struct WarpgroupProduct {
  template <typename A> static void run(float (&)[N / 8][4], const A &, uint64_t, bool) {}
};
#endif

}  // namespace linattn_tile
