// The gradients' kernels by Hopper's warpgroups: two a block, 64 of its 128 own tokens each, and tiles of 64 others.
//
// Products run ahead of what is made of them. A tile is taken in two steps: while a warpgroup weighs the pairs of one, the tensor cores add up the step before and multiply the step
// behind, so that there are two of each buffer. Of a pair as little is done as can be: what belongs to one token alone is put into its numbers, or into the sums once they are
// done. With s = q_i . k_n, d = w_i . v_n, E_i = e_i g_i, and x, y a pair's weights in the products for dq or dk, and for dv:
//   columns: x = (d + E_i) (B_i + 2 C_i s'), y = A_i + s' (B_i + C_i s'), s' = s / |k_n|; A, B, C are a, beta / |q_i|, gamma / |q_i|^2, all by g_i and times the query's factor
//   rows:    x = (d + E_i) f_n r_n (beta_i + 2 gamma_i t), t = s r_n, r_n = 1 / |k_n|, f_n the key's factor; the sums take 1 / g_i last
// and the own factor of a decay enters the sums once, between the tiles away from the diagonal and those on it. There, and in tiles of several runs, each pair is looked at.
#pragma once
#include "pairs/backward.cuh"
#include "tile/warpgroup.cuh"

namespace linattn_pairs {

constexpr int kGroupStages = 3, kStep = 32, kGroup = 64;  // tiles in shared memory; others of a step; own tokens of a warpgroup

struct OtherNumbers {
  float4 numbers[kGroupStages][kKeys];
  float exponent[kGroupStages][kKeys];
  int32_t run[kGroupStages][kKeys], mixed[kGroupStages][kKeys / 32];  // mixed: not all are of the one run that all of the block's own are of
  int32_t lowest[kWarps], highest[kWarps], first[kWarps], last[kWarps];
};

template <int K, int V> struct GroupShape {
  static constexpr bool KEEPS_ROWS = V <= 64;  // own tokens, in registers
  static constexpr int COLUMNS_BUFFERS = V <= 64 ? 2 : 1, ROWS_BUFFERS = 2;
  static constexpr int OWN_KEY = kRows * K * 2, OWN_VALUE = kRows * V * 2, OWN = OWN_KEY + OWN_VALUE, TILE = kKeys * K * 2, STAGE = TILE + kKeys * V * 2;
  static constexpr int NUMBERS_AT = OWN + kGroupStages * STAGE, TOTALS_AT = NUMBERS_AT + sizeof(OtherNumbers), SHARED = TOTALS_AT + kWarps * 3 * 4;
};

// The tiles that a block meets: those away from the diagonal first, of every head, then those on it.
struct Walk {
  int off_begin, off_end, near_begin, near_end, heads;
  __device__ __forceinline__ int off() const { return heads * max(off_end - off_begin, 0); }
  __device__ __forceinline__ int count() const { return off() + heads * max(near_end - near_begin, 0); }
};
struct Cursor {
  int head, tile;
  bool near;
  __device__ __forceinline__ explicit Cursor(const Walk &walk) : head(0), tile(walk.off() > 0 ? walk.off_begin : walk.near_begin), near(walk.off() == 0) {}
  __device__ __forceinline__ int first() const { return tile * kKeys; }
  __device__ __forceinline__ void advance(const Walk &walk) {
    if (++tile < (near ? walk.near_end : walk.off_end)) return;
    if (++head == walk.heads) near = true, head = 0;
    tile = near ? walk.near_begin : walk.off_begin;
  }
};

// ROWS tokens of a head into a tile; those from `count` on read as zero, and so does padding, NaN in memory or not, where there are runs.
template <int D, int ROWS, typename T>
__device__ __forceinline__ void copy_real(uint32_t tile, const T *rows, int64_t stride, const int32_t *runs, int count, int thread, int pieces) {
  constexpr int kPieces = D / 8, kAll = ROWS * kPieces;
#pragma unroll
  for (int i = 0; i < (kAll + kGradientThreads - 1) / kGradientThreads; ++i) {
    const int index = thread + i * kGradientThreads, row = index / kPieces, piece = index % kPieces;
    if (kAll % kGradientThreads != 0 && index >= kAll) break;
    const bool valid = row < count && piece < pieces && (!runs || runs[row] > 0);
    copy_async(tile + Tile<D>::at(row, piece), rows + (valid ? row * stride : 0) + piece * 8, valid);
  }
}

// A thread's part in copying tiles of others, of which most are whole.
template <int D> struct OtherCopy {
  static constexpr int kPieces = D / 8, kStep = kGradientThreads / kPieces;  // rows from one piece of a thread to its next
  uint32_t place, offset;  // in the tile, in bytes; in memory, in elements
  __device__ __forceinline__ OtherCopy(int64_t stride, int thread)
      : place(Tile<D>::at(thread / kPieces, thread % kPieces)), offset(static_cast<uint32_t>(thread / kPieces * stride) + thread % kPieces * 8) {}
  template <typename T> __device__ __forceinline__ void start(uint32_t tile, const T *rows, int64_t stride, const int32_t *runs, int count, int thread, int pieces) const {
    if (count < kKeys || pieces < kPieces || runs) {
      copy_real<D, kKeys>(tile, rows, stride, runs, count, thread, pieces);
      return;
    }
#pragma unroll
    for (int i = 0; i < (kKeys + kStep - 1) / kStep; ++i)
      if (kStep <= kKeys || thread < kKeys * kPieces) copy_async(tile + place + i * kStep * Tile<D>::kRowBytes, rows + i * kStep * stride + offset, true);
  }
};

// The gate of a token of a tile on its way, as the one thread that brings it has it.
struct TokenGate {
  double sum;
  int32_t run;
  __device__ __forceinline__ void load(const GateReader &from, int64_t token) { sum = from.sum_of(token), run = from.run_of(token); }
  __device__ __forceinline__ float exponent(const GateReader &from) const { return static_cast<float>(from.queries ? sum - from.edge() : from.edge() - sum); }
  __device__ __forceinline__ float factor(const GateReader &from) const { return exp2_fast(fminf(exponent(from), 0.f)); }
  __device__ __forceinline__ void store(OtherNumbers &others, const GateReader &from, int stage, int32_t low, int32_t high, int thread) const {
    others.exponent[stage][thread] = exponent(from), others.run[stage][thread] = run;
    const bool mixed = __any_sync(0xffffffffu, run != low || run != high);
    if (thread % 32 == 0) others.mixed[stage][thread / 32] = mixed;
  }
};

// What a query's pairs are measured in: 1 / g, so that e by it is finite; some small number where g is 0 and yet has a gradient.
__device__ __forceinline__ float share_of(float inverse, float error) { return inverse == 0.f && error != 0.f ? 0x1p-40f : inverse; }

// Which runs a block's own tokens are of, from the lowest to the highest, and between which tiles of the others, of those from `begin` to `end`, these are found.
__device__ __forceinline__ void find_runs(OtherNumbers &found, const GateReader &own, const GateReader &others, int64_t begin, int rows, int &tile_begin, int &tile_end,
                                          int32_t &low, int32_t &high, int thread) {
  const auto over_block = [&](int32_t &least, int32_t &most, int32_t *leasts, int32_t *mosts) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) least = min(least, __shfl_xor_sync(0xffffffffu, least, step)), most = max(most, __shfl_xor_sync(0xffffffffu, most, step));
    if (thread % 32 == 0) leasts[thread / 32] = least, mosts[thread / 32] = most;
    __syncthreads();
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) least = min(least, leasts[warp]), most = max(most, mosts[warp]);
  };
  if (!own.runs) {
    low = high = 1;
    return;
  }
  high = thread < rows ? own.run_of(begin + thread) : 0, low = high > 0 ? high : INT32_MAX;
  over_block(low, high, found.lowest, found.highest);
  int32_t first = INT32_MAX, last = -1;
  for (int64_t token = static_cast<int64_t>(tile_begin) * kKeys + thread; token < static_cast<int64_t>(tile_end) * kKeys; token += kGradientThreads) {
    const int32_t run = others.run_of(token), tile = static_cast<int32_t>(token / kKeys);
    if (run > 0 && run >= low && run <= high) first = min(first, tile), last = max(last, tile);
  }
  over_block(first, last, found.first, found.last);
  tile_begin = max(tile_begin, min(first, tile_end)), tile_end = min(tile_end, last + 1);
}

// An operand `offset` bytes into a tile: what is the same in all of a tile's is made once.
template <int D, bool ALONG_ROWS = false> __device__ __forceinline__ uint64_t operand_in(uint32_t tile, uint32_t offset) {
  return warpgroup_operand<D>(0, ALONG_ROWS && Tile<D>::kPanels ? Tile<D>::kPanelBytes : 0) | ((tile >> 4) + (offset >> 4));
}

// sums = A B: A the warpgroup's own tokens, as fragments where they are kept, B a step of a tile along its columns.
template <int D, bool KEPT, int COUNT>
__device__ __forceinline__ void multiply_step(float (&sums)[kStep / 8][4], const uint32_t (&kept)[COUNT][4], uint32_t own, uint32_t tile, int step) {
#pragma unroll
  for (int block = 0; block < D / 16; ++block) {
    const uint64_t others = operand_in<D>(tile, Tile<D>::rows_at(kStep / 16 * step) + Tile<D>::columns_at(2 * block));
    if constexpr (KEPT) WarpgroupProduct<__nv_bfloat16, kStep, false>::run(sums, kept[block], others, block > 0);
    else WarpgroupProduct<__nv_bfloat16, kStep, false>::run(sums, operand_in<D>(own, Tile<D>::columns_at(2 * block)), others, block > 0);
  }
}
// The same along its rows, which the fragments' columns stand for.
template <int D> __device__ __forceinline__ void add_step(float (&sums)[D / 8][4], const uint32_t (&weights)[kStep / 16][4], uint32_t tile, int step) {
#pragma unroll
  for (int block = 0; block < kStep / 16; ++block)
    WarpgroupProduct<__nv_bfloat16, D, true>::run(sums, weights[block], operand_in<D, true>(tile, Tile<D>::rows_at(kStep / 16 * step + block)), true);
}

template <int STEPS, int TILES> __device__ __forceinline__ void clear(float (&sums)[STEPS][TILES][4]) {
#pragma unroll
  for (int i = 0; i < STEPS * TILES * 4; ++i) sums[i / (TILES * 4)][i / 4 % TILES][i % 4] = 0.f;
}

// The loop over tiles. `work` multiplies, weighs and adds; `arrive` has the tile behind the one in work come in, and the one behind that begin its way.
template <typename Work, typename Arrive> __device__ __forceinline__ void walk_tiles(Work &work, const Walk &walk, Arrive arrive) {
  const int count = walk.count(), off = walk.off();
  Cursor at(walk);
  int stage = 0, i = 0;
  if (count == 0) return;
  work.keep_sums();
  work.template multiply<0>(0);
  warpgroup_wait<0>();
#pragma unroll 1
  do {
    if (work.kGated && i == off) work.take_own_factors();
    const int next = stage == kGroupStages - 1 ? 0 : stage + 1;
    if constexpr (Work::BUFFERS == 2) work.template multiply<1>(stage);
    work.template weigh<0>(at, stage);
    warpgroup_wait<0>();  // and nobody reads the tile that the next copies overwrite
    work.template add<0>(stage);
    if constexpr (Work::BUFFERS == 1) work.template multiply<1>(stage);
    arrive(i, next);
    if constexpr (Work::BUFFERS == 2) work.template multiply<0>(next);  // of no tile, behind the last: nobody looks at it
    else warpgroup_wait<0>();
    work.template weigh<1>(at, stage);
    if constexpr (Work::BUFFERS == 2) warpgroup_wait<0>();
    work.template add<1>(stage);
    if constexpr (Work::BUFFERS == 1) {
      work.template multiply<0>(next);
      warpgroup_wait<0>();
    }
    at.advance(walk), stage = next;
  } while (++i < count);
  warpgroup_wait<0>();
  work.keep_sums();
  if (work.kGated && off == count) work.take_own_factors();
}

}  // namespace linattn_pairs
