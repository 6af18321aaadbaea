// Up to 16 new tokens a sequence of the first degree where models live, in bfloat16, and where heads share a state: a block has one as a whole in shared
// memory, and each warp 16 of its columns, of all rows, as right factors in registers: the nearest bfloat16 and what is left. Past them go all
// pairs of a query head and a token, 16 at a time, as left factors: queries as they are, since what makes them of unit length multiplies the sums.
// What the tokens bring is a product by tf32 (values are exact in it, keys in two parts), added to the state in float32.
#pragma once
#include "decode.cuh"
#include "tile/exact.cuh"
#include "tile/instructions.cuh"
#include "tokens/decays.cuh"
#include "tokens/kernels.h"

namespace linattn {
namespace {

// STEPS of 8 tokens.
template <int DIM, int STEPS> struct Columns {
  static constexpr int TOKENS = 8 * STEPS, WARPS = DIM / 16, THREADS = 32 * WARPS, MOST_PAIRS = 128;
  static constexpr int WIDTH = DIM + 1, STATE = WIDTH * WIDTH, SLICES = DIM / 16;
  static constexpr int PITCH = 2 * DIM + 16;       // bytes from one vector to the next: their 16-byte parts in other banks
  static constexpr int BLOCKS = DIM == 128 ? 2 : 5;  // of a multiprocessor, by registers

  struct Fixed : Decays {
    float numbers[4][MOST_PAIRS];                      // of f: a, b, c and the temperature of each pair
    float scales[MOST_PAIRS], key_scales[MOST_TOKENS];  // what makes vectors of unit length
    float token_masses[MOST_PAIRS];                    // sums of the tokens' weights
    float of_state[MOST_PAIRS], of_one[MOST_PAIRS], inverses[MOST_PAIRS];  // what sums of a pair are multiplied by; those with the row of the feature 1
    float weighed[MOST_TOKENS];                        // what is left of a token, and makes its key of unit length
  };
  // Where a block's arrays begin in shared memory, in bytes.
  struct Layout {
    int keys, values, brought, weights, queries, end;
    __host__ __device__ Layout(int tiles) {
      keys = (4 * STATE + 31) / 16 * 16, values = keys + TOKENS * PITCH, brought = values + TOKENS * PITCH, weights = brought + DIM / 8 * STEPS * 512;
      queries = weights + tiles * 1024, end = queries + 16 * tiles * PITCH;
    }
  };
  static int shared_bytes(int tiles) { return Layout(tiles).end; }

  const SeveralArguments &args;
  const linattn_problem &p;
  Fixed &fixed;
  unsigned char *const shared;
  const int thread, warp, lane, group, place;
  const Place at;
  const int key_head, tokens, pairs, tiles, first_query;
  const int64_t state;
  const int shift;  // a state lies in shared memory as far from a boundary of 16 bytes as in memory, before and behind the tokens
  const Layout lies;
  float *const rows;
  uint32_t high[SLICES][2][2], low[SLICES][2][2];  // of this warp's columns
  uint32_t value[2][STEPS];                        // of them, two tokens to a word
  float one[2][2];                                 // the row of the feature 1, columns of sums

  __device__ __forceinline__ Columns(const SeveralArguments &args, Fixed &fixed, unsigned char *shared)
      : args(args), p(args.problem), fixed(fixed), shared(shared), thread(threadIdx.x), warp(__shfl_sync(0xffffffffu, thread / 32, 0)), lane(thread % 32), group(lane / 4),
        place(lane % 4), key_head(key_head_of(args, at.head)), tokens(static_cast<int>(p.length)), pairs(args.group * tokens), tiles((pairs + 15) / 16),
        first_query(at.head * args.group), state((static_cast<int64_t>(at.batch) * p.state_heads + at.head) * STATE),
        shift(static_cast<int>(reinterpret_cast<uintptr_t>((args.before ? args.before : args.after) + state) / 4 % 4)), lies(tiles),
        rows(reinterpret_cast<float *>(shared) + shift) {}

  __device__ __forceinline__ int head_of(int pair) const { return pair * args.one_token >> 16; }  // a pair is head * tokens + token
  __device__ __forceinline__ unsigned char *query(int pair) const { return shared + lies.queries + pair * PITCH; }
  __device__ __forceinline__ const uint16_t *key(int token) const { return reinterpret_cast<const uint16_t *>(shared + lies.keys + token * PITCH); }
  __device__ __forceinline__ const uint16_t *value_of(int token) const { return reinterpret_cast<const uint16_t *>(shared + lies.values + token * PITCH); }
  // Column `lane` of one of this warp's two eights, so that lanes of a product are in 32 banks of rows that lie one behind the other.
  __device__ __forceinline__ int column_of(int eight, int lane) const { return warp / 2 * 32 + lane / 2 * 8 + lane % 2 + warp % 2 * 4 + eight * 2; }
  // Which token of the block: number i, the second number of a fragment's two, of step `step`, of a place.
  static __device__ __forceinline__ int token_of(int place, int step, int i) { return 2 * STEPS * place + 2 * step + i; }
  static __device__ __forceinline__ float number(uint32_t bits) { return __uint_as_float(bits << 16); }
  static __device__ __forceinline__ float upper(uint32_t bits) { return __uint_as_float(bits & 0xffff0000u); }

  // ---- what is fetched

  __device__ __forceinline__ void send_for_vectors() const;
  // Fours of the state's numbers that lie on 16 bytes, and those at the ends that share theirs with others, one by one.
  template <typename Memory, typename Four, typename Single> __device__ __forceinline__ void for_all_slots(Memory *memory, const Four &four, const Single &single) const {
    float *const slots = rows - shift;
    Memory *const from = memory - shift;
    const int end = shift + STATE, whole = end / 4;
#pragma unroll 4
    for (int slot = thread + (shift != 0 && thread == 0 ? THREADS : 0); slot < whole; slot += THREADS) four(slots + 4 * slot, from + 4 * slot);
    if (shift != 0 && thread < 4 && thread >= shift) single(slots + thread, from + thread);
    if (thread < end % 4) single(slots + 4 * whole + thread, from + 4 * whole + thread);
  }
  __device__ __forceinline__ void send_for_state() const;
  __device__ __forceinline__ void begin() const;

  // ---- what is known of the tokens

  __device__ __forceinline__ void measure() const;
  __device__ __forceinline__ void note_pair(int pair, float scale) const;

  // A tile's queries as a left factor, 16 dims of them.
  __device__ __forceinline__ void load_queries(uint32_t (&left)[4], int tile, int slice) const {
    linattn_tile::ldmatrix(left, linattn_tile::shared_address(query(16 * tile + lane % 16) + 32 * slice + lane / 16 * 16));
  }
  static __device__ __forceinline__ void split(float x, float y, uint32_t &high, uint32_t &low) {
    high = linattn_tile::pack_bf16(x, y);
    low = linattn_tile::pack_bf16(x - number(high), y - upper(high));
  }

  __device__ __forceinline__ void weigh_tokens() const;
  __device__ __forceinline__ uint4 *weights_of(int tile) const { return reinterpret_cast<uint4 *>(shared + lies.weights) + (tile * 32 + lane) * 2; }

  // What the tokens bring to eight rows of the state, but for values: keys times what is left of them, as right factors in two parts.
  __device__ __forceinline__ float4 *brought(int eight, int step) const { return reinterpret_cast<float4 *>(shared + lies.brought) + (eight * STEPS + step) * 32 + lane; }
  __device__ __forceinline__ void make_keys() const;

  // ---- the state

  __device__ __forceinline__ void take_in();
  __device__ __forceinline__ void weigh_state() const;
  __device__ __forceinline__ void note_mass(int pair, float mass) const;
  __device__ __forceinline__ uint32_t part_of(float x, float y) const {
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const uint32_t high = linattn_tile::pack_bf16(x, y);
      if (group > part) x -= number(high), y -= upper(high);
    }
    return group < 3 ? linattn_tile::pack_bf16(x, y) : 0u;
  }
  __device__ __forceinline__ void take_in_ones() const;
  __device__ __forceinline__ void write_state() const;

  // ---- results

  __device__ __forceinline__ void write() const;
};

}  // namespace
}  // namespace linattn
