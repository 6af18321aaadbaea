// The gradients' kernels by Hopper's warpgroups: one owns 64 tokens, and the warps of another bring tiles of 64 others, each to a stage of its own, so that as many are
// under way. Two of a multiprocessor's warpgroups own tokens, in a block each or, where registers or shared memory are short, both in one; each goes at its own pace: the
// one's products run beside what the other one makes of its own.
//
// Products run ahead of what is made of them. A tile is taken in two steps: while a warpgroup weighs the pairs of one, the tensor cores add up the step before and multiply the step
// behind, so that there are two of each buffer. Of a pair as little is done as can be: what belongs to one token alone is put into its numbers, or into the sums once they are
// done. With s = q_i . k_n, d = w_i . v_n, E_i = e_i g_i, and x, y a pair's weights in the products for dq or dk, and for dv:
//   columns: x = (d + E_i) (B_i + 2 C_i s'), y = A_i + s' (B_i + C_i s'), s' = s / |k_n|; A, B, C are a, beta / |q_i|, gamma / |q_i|^2, all by g_i and times the query's factor
//   rows:    x = (d + E_i) f_n r_n (beta_i + 2 gamma_i t) / g_i, t = s r_n, r_n = 1 / |k_n|, f_n the key's factor
// and the own factor of a decay enters the sums once, between the tiles away from the diagonal and those on it. There, and in tiles of several runs, each pair is looked at.
#pragma once
#include "pairs/backward.cuh"
#include "tile/warpgroup.cuh"

namespace linattn_pairs {

constexpr int kGroupStages = 4, kStep = 32, kGroup = 64;  // tiles in shared memory; others of a step; own tokens of a warpgroup
constexpr int kGroupThreads = 128, kMostThreads = 2 * kGroupThreads + 32 * kGroupStages;

// A tile that is here, for each of the warpgroups that own tokens; a stage that both have read; a warpgroup's own affairs.
enum GroupBarrier { kTileHere = 1, kStageRead = kTileHere + 2 * kGroupStages, kAmongOwners = kStageRead + kGroupStages };

struct OtherNumbers {
  float4 numbers[kGroupStages][kKeys];
  float exponent[kGroupStages][kKeys];
  int32_t run[kGroupStages][kKeys], told[kGroupStages];  // told: what there is to know of a tile, see TileNote
  int32_t lowest[kMostThreads / 32], highest[kMostThreads / 32], first[kMostThreads / 32], last[kMostThreads / 32];
};

template <int K, int V, bool GATED> struct GroupShape {
  static constexpr int GROUPS = V > 64 || (GATED && K > 32) ? 2 : 1, TOKENS = kGroup * GROUPS;  // warpgroups that own tokens, and these
  static constexpr int OWNERS = kGroupThreads * GROUPS, THREADS = OWNERS + 32 * kGroupStages, BLOCKS = 3 - GROUPS;
  static constexpr int OWNER_REGISTERS = GROUPS == 1 ? 224 : 232, BRINGER_REGISTERS = GROUPS == 1 ? 32 : 40;  // together a multiprocessor's 65,536 at most
  static constexpr bool LOOKS_AHEAD = !GATED || K <= 32;  // to numbers of others, before products are waited for: where there are registers for it
  static constexpr bool KEEPS_ROWS = V <= 64;  // own tokens, in registers
  static constexpr int COLUMNS_BUFFERS = V <= 64 ? 2 : 1, ROWS_BUFFERS = 2;
  static constexpr int OWN_KEY = TOKENS * K * 2, OWN_VALUE = TOKENS * V * 2, OWN = OWN_KEY + OWN_VALUE, TILE = kKeys * K * 2, STAGE = TILE + kKeys * V * 2;
  static constexpr int NUMBERS_AT = OWN + kGroupStages * STAGE, TOTALS_AT = NUMBERS_AT + sizeof(OtherNumbers), SHARED = TOTALS_AT + OWNERS / 32 * 3 * 4;
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

// 64 tokens of a head into a tile, by THREADS; those that are not `real` read as zero: behind the last one, or padding, NaN in memory or not.
template <int D, int THREADS, typename T> __device__ __forceinline__ void copy_real(uint32_t tile, const T *rows, int64_t stride, uint64_t real, int thread, int pieces) {
  constexpr int kPieces = D / 8;
#pragma unroll 4
  for (int index = thread; index < kKeys * kPieces; index += THREADS) {
    const int row = index / kPieces, piece = index % kPieces;
    const bool valid = piece < pieces && real >> row & 1;
    copy_async(tile + Tile<D>::at(row, piece), rows + (valid ? row * stride : 0) + piece * 8, valid);
  }
}

// A warpgroup's own tokens, from each of the two tensors, into its part of the block's tiles.
template <typename S, int K, int V, typename T>
__device__ __forceinline__ void copy_own(uint32_t tile, const T *keys, int64_t key_stride, const T *values, int64_t value_stride, uint64_t real, int thread, int pieces) {
  const int group = thread / kGroupThreads, number = thread % kGroupThreads;
  copy_real<K, kGroupThreads>(tile + group * Tile<K>::rows_at(kGroup / 16), keys, key_stride, real, number, pieces);
  copy_real<V, kGroupThreads>(tile + S::OWN_KEY + group * Tile<V>::rows_at(kGroup / 16), values, value_stride, real, number, V / 8);
  copy_commit();
  copy_wait<0>();
  warpgroup_publish();
  barrier_sync<kGroupThreads>(kAmongOwners + group);
}

// A warp's copy of a tile, of which most are whole.
template <int D, typename T> __device__ __forceinline__ void copy_others(uint32_t tile, const T *rows, int64_t stride, uint64_t real, int lane, int pieces) {
  constexpr int kPieces = D / 8, kRowsAtOnce = 32 / kPieces;
  if (~real || pieces < kPieces) {
    copy_real<D, 32>(tile, rows, stride, real, lane, pieces);
    return;
  }
  const T *source = rows + static_cast<int64_t>(lane / kPieces) * stride + lane % kPieces * 8;
#pragma unroll
  for (int i = 0; i < kKeys / kRowsAtOnce; ++i, source += kRowsAtOnce * stride) copy_async(tile + Tile<D>::at(lane / kPieces + i * kRowsAtOnce, lane % kPieces), source, true);
}

// The gates of a tile on their way, two tokens a lane.
struct TileGates {
  double sum[2];
  int32_t run[2];
  uint64_t real;  // tokens that are not padding
  __device__ __forceinline__ void load(const GateReader &from, int64_t first, int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) sum[half] = from.sum_of(first + 32 * half + lane), run[half] = from.run_of(first + 32 * half + lane);
    real = real_tokens(run);
  }
  static __device__ __forceinline__ uint64_t real_tokens(const int32_t (&run)[2]) {
    return static_cast<uint64_t>(__ballot_sync(0xffffffffu, run[1] > 0)) << 32 | __ballot_sync(0xffffffffu, run[0] > 0);
  }
  __device__ __forceinline__ float exponent(int half, bool queries, double edge) const { return static_cast<float>(queries ? sum[half] - edge : edge - sum[half]); }
  __device__ __forceinline__ void store(OtherNumbers &others, bool queries, double edge, int stage, int lane) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) others.exponent[stage][32 * half + lane] = exponent(half, queries, edge), others.run[stage][32 * half + lane] = run[half];
  }
  // Whether not all are of the one run that all of the block's own are of.
  __device__ __forceinline__ bool is_mixed(int32_t low, int32_t high) const { return __any_sync(0xffffffffu, run[0] != low || run[0] != high || run[1] != low || run[1] != high); }
};
// Of the 64 tokens from `first` on those that are not padding.
__device__ __forceinline__ uint64_t real_tokens(const GateReader &from, int64_t first, int lane) {
  const int32_t run[2] = {from.run_of(first + lane), from.run_of(first + 32 + lane)};
  return TileGates::real_tokens(run);
}

// What a query's pairs are measured in: 1 / g, so that e by it is finite; some small number where g is 0 and yet has a gradient.
__device__ __forceinline__ float share_of(float inverse, float error) { return inverse == 0.f && error != 0.f ? 0x1p-40f : inverse; }

// Which runs a block's own tokens are of, from the lowest to the highest, and between which tiles of the others, of those from `begin` to `end`, these are found.
template <int THREADS>
__device__ __forceinline__ void find_runs(OtherNumbers &found, const GateReader &own, const GateReader &others, int64_t begin, int rows, int &tile_begin, int &tile_end,
                                          int32_t &low, int32_t &high, int thread) {
  const auto over_block = [&](int32_t &least, int32_t &most, int32_t *leasts, int32_t *mosts) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) least = min(least, __shfl_xor_sync(0xffffffffu, least, step)), most = max(most, __shfl_xor_sync(0xffffffffu, most, step));
    if (thread % 32 == 0) leasts[thread / 32] = least, mosts[thread / 32] = most;
    __syncthreads();
#pragma unroll
    for (int warp = 0; warp < THREADS / 32; ++warp) least = min(least, leasts[warp]), most = max(most, mosts[warp]);
  };
  if (!own.runs) {
    low = high = 1;
    return;
  }
  high = thread < rows ? own.run_of(begin + thread) : 0, low = high > 0 ? high : INT32_MAX;
  over_block(low, high, found.lowest, found.highest);
  int32_t first = INT32_MAX, last = -1;
  for (int64_t token = static_cast<int64_t>(tile_begin) * kKeys + thread; token < static_cast<int64_t>(tile_end) * kKeys; token += THREADS) {
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

// What those who own tokens are told of a tile of others.
struct TileNote {
  int32_t told;
  static __device__ __forceinline__ int32_t of(const Cursor &at, bool near, bool mixed) { return at.tile << 2 | (mixed ? 2 : 0) | (near ? 1 : 0); }
  __device__ __forceinline__ int first() const { return (told >> 2) * kKeys; }
  __device__ __forceinline__ bool near() const { return told & 1; }
  __device__ __forceinline__ bool mixed() const { return told & 2; }
};

// The loop of a warp that brings tiles, to its own stage: a tile's numbers leave memory, and its tokens do as soon as its predecessor there has been read.
template <typename S, typename Load, typename Copy, typename Store> __device__ __forceinline__ void bring_tiles(const Walk &walk, int stage, Load load, Copy copy, Store store) {
  const int count = walk.count();
  Cursor at(walk);
  for (int i = 0; i < stage; ++i) at.advance(walk);
#pragma unroll 1
  for (int i = stage; i < count; i += kGroupStages) {
    load(at);
    if (i >= kGroupStages) barrier_sync<S::OWNERS + 32>(kStageRead + stage);
    copy(at);
    copy_commit();
    store(at);
    copy_wait<0>();
    warpgroup_publish();
#pragma unroll
    for (int group = 0; group < S::GROUPS; ++group) barrier_arrive<kGroupThreads + 32>(kTileHere + 2 * stage + group);
#pragma unroll
    for (int step = 0; step < kGroupStages; ++step) at.advance(walk);
  }
}

// The loop over tiles. `work` multiplies, weighs and adds.
template <typename Work> __device__ __forceinline__ void walk_tiles(Work &work, const Walk &walk) {
  const uint32_t count = __reduce_max_sync(0xffffffffu, walk.count());  // all lanes' is the same: what the loop counts is kept in registers of the whole warp
  const int here = kTileHere + work.warp / 4;
  uint32_t number = 0;
  TileNote at;
  const auto leave = [&](uint32_t tile) {
    if (tile + kGroupStages < count) barrier_arrive<Work::S::OWNERS + 32>(kStageRead + tile % kGroupStages);
  };
  // Tile `number`, or the next one with something to do.
  const auto arrive = [&] {
    for (; number < count; ++number) {
      barrier_sync<kGroupThreads + 32>(here + 2 * (number % kGroupStages));
      at.told = __reduce_max_sync(0xffffffffu, work.others.told[number % kGroupStages]);
      if (!work.passes(at.first())) return;
      leave(number);
    }
  };
  arrive();
  bool own = false;  // whether the sums have the own factors
  uint32_t before = count;
  if (number == count) return;
  work.keep_sums();
  work.template multiply<0>(number % kGroupStages);
  warpgroup_wait<0>();
#pragma unroll 1
  do {
    const TileNote now = at;
    const uint32_t tile = number, stage = tile % kGroupStages;
    if (work.kGated && now.near() && !own) own = true, work.take_own_factors();
    work.template look<0>(stage);
    if constexpr (Work::BUFFERS == 2) work.template multiply<1>(stage);
    work.template weigh<0>(now, stage);
    warpgroup_wait<0>();
    leave(before);
    work.template add<0>(stage);
    if constexpr (Work::BUFFERS == 1) work.template multiply<1>(stage);
    ++number;
    arrive();
    work.template look<1>(stage);
    if constexpr (Work::BUFFERS == 2) work.template multiply<0>(number % kGroupStages);  // of no tile, behind the last: nobody looks at it
    else warpgroup_wait<0>();
    work.template weigh<1>(now, stage);
    if constexpr (Work::BUFFERS == 2) warpgroup_wait<0>();
    work.template add<1>(stage);
    if constexpr (Work::BUFFERS == 1) {
      work.template multiply<0>(number % kGroupStages);
      warpgroup_wait<0>();
    }
    before = tile;
  } while (number < count);
  warpgroup_wait<0>();
  work.keep_sums();
  if (work.kGated && !own) work.take_own_factors();
}

}  // namespace linattn_pairs
