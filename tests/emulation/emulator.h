// CUDA's blocks, warps and barriers on a CPU, one after another in one thread: each CUDA thread is a context that runs until it has to wait.
//
// What a warp does together (shuffles, matrix instructions, __syncwarp) waits for all of its lanes that still run, as every such call in our
// kernels does. Warps take turns in an order drawn for each block, and a warp runs on until it waits for the block: what should have been
// ordered by a barrier and is not comes out in the wrong order sooner or later. Shared memory holds NaN before a block begins. A block whose
// threads wait for one another for ever ends the process with a message.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#undef __global__
#undef __device__
#undef __forceinline__
#undef __launch_bounds__
#undef __shared__
#undef __align__
#undef __grid_constant__
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after another
#define __align__(bytes) __attribute__((aligned(bytes)))  // behind `static`, too
#define __grid_constant__

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace emulation {

constexpr int kLanes = 32, kStack = 256 << 10, kShared = 227 << 10, kBarriers = 16;
alignas(1024) inline unsigned char shared_memory[kShared];

enum class Waits { nothing, warp, block, turn, over };

struct Copy {  // asynchronous: from global to shared memory, or zeros
  uint32_t to;
  const void *from;
  int bytes;
};

struct Product {  // asynchronous: of a warpgroup, a lane's part
  float *sums;
  int columns;
  bool accumulate, from_registers, along_rows;
  uint32_t fragment[4];  // of the left factor, where it is in registers
  uint64_t left, right;  // descriptors
  float (*number)(uint32_t);
  std::vector<uint16_t> issued;  // what lay in shared memory when it was issued
};
constexpr uint32_t kOnItsWay = 0xffffff0fu;  // NaN, in the place of sums

// A barrier in shared memory: its turn is over once all have arrived and the bytes that were promised are here.
struct Turn {
  int arrivals, arrived = 0, promised = 0, parity = 0;
  std::vector<Copy> copies;
  void arrive(int bytes) { ++arrived, promised += bytes; }
  bool end();
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<unsigned char[]> stack;
  Waits waits = Waits::nothing;
  int barrier = 0, parity = 0;
  uint64_t value = 0;        // what a shuffle shows the others
  uint32_t fragment[6] = {};  // what a matrix instruction does
  std::vector<std::vector<Copy>> groups;  // of copies on their way
  std::vector<Copy> open;                 // the group that is not closed yet
  std::vector<std::vector<Product>> products;  // groups as well
  std::vector<Product> open_products;
  std::map<float *, std::vector<float>> sums;  // of the products on their way
  bool begun = false;
};

struct Block {
  std::vector<Thread> threads;
  int expected[kBarriers] = {}, arrived[kBarriers] = {};
  std::map<uint32_t, Turn> turns;
  int running = 0;  // thread
  bool any = false;  // of __syncthreads_or
  bool any_before = false;
  ucontext_t scheduler;
};
inline Block *block = nullptr;

inline Thread &self() { return block->threads[block->running]; }
inline int lane() { return block->running % kLanes; }
inline Thread &neighbour(int lane) { return block->threads[block->running / kLanes * kLanes + lane % kLanes]; }

inline void require(bool holds, const char *what) {
  if (holds) return;
  std::fprintf(stderr, "emulation: %s, thread %d of block %u\n", what, block->running, blockIdx.x);
  std::abort();
}

inline void wait(Waits what) {
  const int own = block->running;
  self().waits = what;
  swapcontext(&self().context, &block->scheduler);
  block->running = own;
}
inline void sync_warp() { wait(Waits::warp); }

// Barrier `number` opens for `count` threads, those that only arrive among them.
inline void arrive(int number, int count) {
  block->expected[number] = count;
  if (++block->arrived[number] < count) return;
  block->arrived[number] = 0;
  if (number == 0) block->any_before = block->any, block->any = false;  // others may open while some wait there
  for (Thread &thread : block->threads)
    if (thread.waits == Waits::block && thread.barrier == number) thread.waits = Waits::nothing;
}
inline void sync_block(int number, int count) {
  self().barrier = number, self().waits = Waits::block;  // before it may open
  arrive(number, count);
  if (self().waits == Waits::block) wait(Waits::block);
}

inline void perform(const Copy &copy) {
  if (copy.from) std::memcpy(shared_memory + copy.to, copy.from, copy.bytes);
  else std::memset(shared_memory + copy.to, 0, copy.bytes);
}

// Whether the turn is over; copies are made then, and not before.
inline bool Turn::end() {
  const int bytes = std::accumulate(copies.begin(), copies.end(), 0, [](int sum, const Copy &copy) { return sum + copy.bytes; });
  if (arrived != arrivals || bytes != promised) return false;
  for (const Copy &copy : copies) perform(copy);
  *this = {arrivals, 0, 0, parity ^ 1};
  return true;
}
inline Turn &turn(uint32_t barrier) {
  const auto found = block->turns.find(barrier);
  require(found != block->turns.end(), "a barrier that nobody has made");
  Turn &own = found->second;
  require(own.arrived <= own.arrivals, "more arrive at a barrier than it has a place for");
  if (own.arrived == own.arrivals) own.end();
  return own;
}
inline bool is_over(uint32_t barrier, int parity) { return turn(barrier).parity != parity; }
inline void wait_for_turn(uint32_t barrier, int parity) {
  self().barrier = barrier, self().parity = parity;
  if (!is_over(barrier, parity)) wait(Waits::turn);
}

inline const std::function<void()> *body = nullptr;
inline void enter() {
  (*body)();
  self().waits = Waits::over;
  swapcontext(&self().context, &block->scheduler);
}

// Runs a warp until its lanes wait for the block or are over. Whether any of them did anything.
inline bool run_warp(int first, int lanes) {
  bool moved = false;
  for (;;) {
    bool ran = false, meets = false;
    for (int i = first; i < first + lanes; ++i) {
      Thread &thread = block->threads[i];
      if (thread.waits == Waits::turn && is_over(thread.barrier, thread.parity)) thread.waits = Waits::nothing;
      if (block->threads[i].waits != Waits::nothing) continue;
      block->running = i;
      threadIdx = {static_cast<unsigned>(i), 0, 0};
      swapcontext(&block->scheduler, &block->threads[i].context);
      ran = true;
    }
    const auto all = [&](auto test) { return std::all_of(block->threads.begin() + first, block->threads.begin() + first + lanes, test); };
    if (!ran && all([](const Thread &thread) { return thread.waits == Waits::warp || thread.waits == Waits::over; }))
      for (int i = first; i < first + lanes; ++i)
        if (block->threads[i].waits == Waits::warp) block->threads[i].waits = Waits::nothing, meets = true;
    if (!ran && !meets) return moved;
    moved = true;
  }
}

inline void run_block(int threads, std::mt19937 &random) {
  Block own;
  own.threads.resize(threads);
  block = &own;
  std::memset(shared_memory, 0xff, kShared);
  for (Thread &thread : own.threads) {
    thread.stack.reset(new unsigned char[kStack]);
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get(), thread.context.uc_stack.ss_size = kStack, thread.context.uc_link = nullptr;
    makecontext(&thread.context, enter, 0);
  }
  std::vector<int> order((threads + kLanes - 1) / kLanes);
  std::iota(order.begin(), order.end(), 0);
  for (;;) {
    std::shuffle(order.begin(), order.end(), random);
    bool moved = false;
    for (const int warp : order) moved |= run_warp(warp * kLanes, std::min(kLanes, threads - warp * kLanes));
    if (std::all_of(own.threads.begin(), own.threads.end(), [](const Thread &thread) { return thread.waits == Waits::over; })) return;
    if (moved) continue;
    std::fprintf(stderr, "emulation: the threads of a block wait for one another for ever\n");
    std::abort();
  }
}

template <typename Body> void launch(dim3 grid, int threads, const Body &kernel) {
  static std::mt19937 random(0);
  const std::function<void()> call = kernel;
  body = &call;
  blockDim = dim3(threads), gridDim = grid;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, z};
        run_block(threads, random);
      }
}

template <typename T> T shuffle(T x, int source) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof(T));
  self().value = bits;
  sync_warp();
  bits = neighbour(source).value;
  sync_warp();
  std::memcpy(&x, &bits, sizeof(T));
  return x;
}

}  // namespace emulation

inline void __syncthreads() { emulation::sync_block(0, static_cast<int>(emulation::block->threads.size())); }
inline int __syncthreads_or(int condition) {
  emulation::block->any |= condition != 0;
  __syncthreads();
  const bool any = emulation::block->any_before;
  __syncthreads();
  return any;
}
inline void __syncwarp() { emulation::sync_warp(); }
template <typename T> T __shfl_sync(unsigned, T x, int source) { return emulation::shuffle(x, source); }
template <typename T> T __shfl_xor_sync(unsigned, T x, int mask) { return emulation::shuffle(x, emulation::lane() ^ mask); }
template <typename T> T __shfl_up_sync(unsigned, T x, int step) {
  return emulation::shuffle(x, std::max(emulation::lane() - step, emulation::lane() < step ? emulation::lane() : 0));
}
template <typename T> T __shfl_down_sync(unsigned, T x, int step) {
  return emulation::shuffle(x, emulation::lane() + step < emulation::kLanes ? emulation::lane() + step : emulation::lane());
}
inline int __any_sync(unsigned mask, int x) {
  for (int step = 16; step > 0; step /= 2) x |= __shfl_xor_sync(mask, x, step);
  return x;
}
inline unsigned __ballot_sync(unsigned mask, int x) {
  unsigned bits = static_cast<unsigned>(x != 0) << emulation::lane();
  for (int step = 16; step > 0; step /= 2) bits |= __shfl_xor_sync(mask, bits, step);
  return bits;
}
template <typename T> T __reduce_max_sync(unsigned mask, T x) {
  for (int step = 16; step > 0; step /= 2) x = std::max(x, __shfl_xor_sync(mask, x, step));
  return x;
}
template <typename T> T __reduce_min_sync(unsigned mask, T x) {
  for (int step = 16; step > 0; step /= 2) x = std::min(x, __shfl_xor_sync(mask, x, step));
  return x;
}

template <typename... Arguments> cudaError_t cudaFuncSetAttribute(void (*kernel)(Arguments...), cudaFuncAttribute what, int bytes) {
  return cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel), what, bytes);
}

using std::max;
using std::min;
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
