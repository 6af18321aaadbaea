// The first degree for float32 up to head dim 128, and in bfloat16 for wide heads.
//
// All four results are one sum, over the columns n that a row i sees and over the state of the columns outside of its chunk:
//
//             rows x      columns y   gathered z   weight of a pair                 its state
//   out       q^          k^          v            b tau x.y + a                    sum k^ v
//   dq^       w = dO / g  v           k^           x.y + e_i      (times b tau)     sum v k^
//   dv        k^          q^          w            b tau x.y + a                    sum b tau q^ w, behind the chunk
//   dk^       v           w           q^           b tau (x.y + e_n)                sum b tau w q^, behind the chunk
//
// with e_i = dL/dg_i - w_i . o_i. Vectors stay in shared memory as they came, or brought near one; lengths, masses and powers of two are a number a token.
#pragma once
#include "chunks/factor.cuh"
#include "tile/launch.cuh"
#include "tile/scan.cuh"

namespace linattn_chunks {

enum class Role { kOut, kQuery, kValue, kKey };
template <Role ROLE> constexpr bool kLater = ROLE == Role::kValue || ROLE == Role::kKey;    // rows are keys, columns the queries behind them
template <Role ROLE> constexpr bool kAcross = ROLE == Role::kQuery || ROLE == Role::kKey;   // the weight is x.y plus an e, not f, and the state is held the other way round
template <Role ROLE> constexpr bool kTotals = !kLater<ROLE>;                                // sums over a row: masses, or sums of dA

// Where a tensor's rows are, and what divides them: nothing, their length, or the mass of each.
struct Vectors {
  linattn_tensor tensor;
  bool unit;
  const float *mass;
};

// What a row's sum becomes.
struct Written {
  linattn_tensor result, grad_of;  // grad_of: kQuery and kKey, q or k, whose gradient the result is
  float *mass;                     // kOut
};

struct RowArguments {
  linattn_problem problem;
  Vectors x, y, z;
  Written written;
  linattn_tensor out;           // kQuery: o, for e
  const float *grad_mass;
  float *error, *partials;
  const float *states;          // before each chunk (behind it: kValue and kKey), or null
  int64_t chunk;                // tokens
  int32_t chunks, row_tiles;
};

struct StateArguments {
  linattn_problem problem;
  Vectors y, z;
  const float *error;           // of queries
  float *states;
  int64_t chunk;
  int32_t chunks, unneeded;     // unneeded: the chunk whose own state nobody asks for, or -1
};

template <typename T, int D> struct RowShape {
  static constexpr int ROWS = 128, WARPS = ROWS / 16, THREADS = 32 * WARPS, KEYS = 64, BLOCKS = D / 16;
  static constexpr int PARTS = Factor<T>::PARTS, STAGES = kSplit<T> ? 1 : 2;
  static constexpr int X_PLANE = ROWS * D * 2, PLANE = KEYS * D * 2, TILE = PLANE * PARTS;
  static constexpr int X = 0, TILES = PARTS * X_PLANE, LANDING = TILES + STAGES * 2 * TILE, LANDING_BYTES = kSplit<T> ? 2 * KEYS * D * 4 : 0;
  struct Small {
    alignas(16) float y_worth[KEYS], z_worth[KEYS], shift[KEYS];
    float x_worth[ROWS], row_shift[ROWS], peaks[WARPS], totals[WARPS][2];
  };
  static constexpr int SHARED = LANDING + LANDING_BYTES + static_cast<int>(sizeof(Small));
};

template <typename T, int D> struct StateShape {
  static constexpr int PARTS = Factor<T>::PARTS, STAGES = kSplit<T> ? 1 : 2, LANDINGS = kSplit<T> && D <= 64 ? 2 : 1;  // LANDINGS: tiles on their way
  static constexpr int SHARES = D > 192 ? 2 : 1, FEATURES = D / SHARES;  // blocks to a chunk, features of each
  static constexpr int STRIPES = FEATURES / 16, SPLIT = STRIPES <= 4 ? 2 : 1, WARPS = STRIPES * SPLIT, THREADS = 32 * WARPS;
  static constexpr int TOKENS = 64, BLOCKS = D / 16 / SPLIT;  // blocks of columns a warp has
  static constexpr int PLANE = TOKENS * D * 2, TILE = PLANE * PARTS;
  static constexpr int LANDING = STAGES * 2 * TILE, LANDED = TOKENS * D * 4, LANDING_BYTES = kSplit<T> ? LANDINGS * 2 * LANDED : 0;
  // Both margins, y's and z's, by threads that have WIDE columns of every TURNS-th run of tokens.
  static constexpr int WIDE = kSplit<T> ? 4 : 8, SETS = 2 * D / WIDE, TURNS = THREADS / SETS;
  static_assert(THREADS % SETS == 0 && TOKENS % TURNS == 0 && TURNS * 2 * D * 4 <= LANDING, "");
  struct Small {
    alignas(16) uint16_t high[TOKENS], low[TOKENS];
    alignas(16) float product[TOKENS], column[TOKENS], line[TOKENS], peak[TOKENS];
    float counts[WARPS];
  };
  static constexpr int SHARED = LANDING + LANDING_BYTES + static_cast<int>(sizeof(Small));
};

// Starts to copy `count` rows: into the tile itself, or, where they must be split, to where the same lanes will find them. A thread's rows are
// evenly apart, so that one address leads to all.
template <typename T, int D, int TOKENS, int WARPS>
__device__ __forceinline__ void start_rows(uint32_t tile, uint32_t landing, const T *rows, int64_t stride, int count, int thread) {
  if constexpr (kSplit<T>) {
    using Mine = WarpRows<D, TOKENS, WARPS>;
    const Mine mine(thread / 32, thread % 32);
    const T *source = rows + mine.row(0) * stride + mine.lanes.column(0);
    const uint32_t place = landing + (mine.row(0) * D + mine.lanes.column(0)) * 4;
#pragma unroll
    for (int turn = 0; turn < Mine::TURNS; ++turn, source += Mine::APART * stride) {
      if (!mine.has(turn)) continue;
      const bool valid = mine.row(turn) < count;
#pragma unroll
      for (int i = 0; i < RowLanes<D>::FOURS; ++i)
        if (mine.lanes.has(i)) copy_async(place + (turn * Mine::APART * D + 4 * i * RowLanes<D>::LANES) * 4, valid ? source + 4 * i * RowLanes<D>::LANES : rows, valid);
    }
  } else {
    constexpr int kPieces = D / 8, kApart = 32 * WARPS / kPieces >= 16 ? 16 : 8;
    static_assert(kApart * kPieces <= 32 * WARPS && TOKENS % kApart == 0, "");
    if (thread >= kApart * kPieces) return;
    const int first = thread / kPieces, piece = thread % kPieces;
    const T *source = rows + first * stride + piece * 8;
    const uint32_t place = tile + Tile<D>::at(first, piece);
#pragma unroll
    for (int i = 0; i < TOKENS; i += kApart, source += kApart * stride) {
      const bool valid = first + i < count;
      copy_async(place + Tile<D>::rows_at(i / 16) + i % 16 * Tile<D>::kRowBytes, valid ? source : rows, valid);
    }
  }
}

// What a token's vector counts beside what memory holds of it, and, where it is split, how it is brought near one: a vector of unit length by
// its length, others by their largest element. All lanes of a warp ask together, for a batch of rows.
struct Worth {
  float own;
  Lift lift;
};
template <typename T, typename WarpRows, typename Row, int BATCH>
__device__ __forceinline__ void weigh(Worth (&worth)[BATCH], const Row (&x)[BATCH], const WarpRows &mine, int first, const Vectors &of, int64_t first_number, int count) {
  float measure[BATCH] = {}, mass[BATCH];
#pragma unroll
  for (int i = 0; i < BATCH; ++i) mass[i] = of.mass ? of.mass[first_number + max(min(mine.row(first + i), count - 1), 0)] : 1.f;
  if (of.unit) {
    mine.each(first, [&](int i, int) { measure[i] = x[i].dot(x[i]); });
    mine.sums(measure);
  } else if constexpr (kSplit<T>) {
    mine.each(first, [&](int i, int) { measure[i] = x[i].peak(); });
    mine.peaks(measure);
  }
  mine.each(first, [&](int i, int row) {
    const float length = of.unit ? inverse_length(measure[i]) : 1.f;
    worth[i].own = row >= count ? 0.f : of.mass ? inverse_or_zero(mass[i]) : length;
    worth[i].lift = kSplit<T> ? lift_from(of.unit ? measure[i] * length : measure[i], kPeak) : Lift{1.f, 1.f};
  });
}

}  // namespace linattn_chunks
