// Tiles of keys and values on their way into a block of Hopper's, and what is to know of their gates.
//
// One thread asks for a tile three ahead of the one in work; a barrier a stage tells when it is here, and another when all have read what it held.
#pragma once
#include "tile/bulk.cuh"
#include "tile/gates.cuh"
#include "tile/warpgroup.cuh"
#include "pairs/reach.cuh"

namespace linattn_pairs {

constexpr int kKeyStages = 5;  // a tile that a warpgroup behind still reads, one whose values are read, one in work, two on their way
constexpr int kAhead = 3;      // tiles between the one whose values are read and the one that is asked for

constexpr int kGroupThreads = 256;  // two warpgroups

enum Gates { NO_GATES, DECAY, RUNS };  // what multiplies weights: nothing; a decay alone; runs of tokens, with a decay or without

// The sum of a decay that is the same at every token needs no memory.
struct RateReader : GateReader {
  float log_decay;  // of every token
  __device__ __forceinline__ RateReader(const SequenceGates &gates, const linattn_problem &p, bool queries, int64_t batch, int64_t state, int64_t edge_token)
      : GateReader(gates.decay ? gates.decay + (batch * p.state_heads + state) * p.length : nullptr, p, queries, batch, edge_token),
        log_decay(gates.rate ? gates.rate[state] : 0.f) {}
  __device__ __forceinline__ double rate() const { return kLog2E * real_decay(log_decay); }
  __device__ __forceinline__ double edge() const { return edge_token >= 0 ? sum_of(edge_token) : 0.0; }
  __device__ __forceinline__ double sum_of(int64_t token) const { return decay ? GateReader::sum_of(token) : token < length ? rate() * static_cast<double>(token + 1) : 0.0; }
};

// The gates of a tile of keys, the same for all who read them. With G the running sum of log2 decay, a key has the factor exp2(kLevel level - G), at most 1, where the
// level is that of the tile's last token: sums are in units of 2^(-kLevel level), and take a power of two where it falls, every few tiles.
constexpr int kLevel = 32;
struct alignas(16) KeyGates {
  float2 scale_and_factor[kKeys / 2][2];  // of two neighbours: 1 / |k|, then their factors
  float exponent[kKeys];                  // from the tile's last token on, E - G
  int32_t run[kKeys];                     // 0: padding, or behind the last token
  int4 told;                              // its level; HOLES, FAST, BEHIND; the lowest and the highest run of its real tokens, INT32_MAX and 0 where there are none
  double edge, unused;                    // E; up to 16 bytes, which are copied
};
// Not all pairs of a tile are gated alike, in a bit a warpgroup; some keys are padding; the decay within it is beyond what factors may be; some keys lie behind the last token.
enum OfTile : int32_t { NEAR_TILE = 1, HOLES = 4, FAST = 8, BEHIND = 16 };
constexpr int kLevelShift = 4;

struct KeyMaps {
  TensorMap keys, values, queries;
};

// Of a query, what is not needed at every tile.
struct OwnRow {
  float size, exponent;  // the unit that its weights are in; from the warpgroup's edge on, G - R
  int32_t run;           // -1: padding, or behind the last token
};

// What a block's threads share behind its tiles.
template <int K, Gates GATES> struct KeyStages {
  static constexpr bool GATED = GATES != NO_GATES;
  static constexpr int MOST_TILES = GATED ? (K < 32 ? 32 : K) * (K < 32 ? 32 : K) * 8 / kKeys : 0;  // of sequences whose pairs are all formed
  alignas(16) float scales[GATED ? 1 : kKeyStages][kKeys];
  KeyGates gates[GATED ? kKeyStages : 1];
  uint64_t here[kKeyStages], read[kKeyStages], queries;
  double edge[2];  // R, the sum of the decay before a warpgroup's own tokens
  OwnRow rows[kRows];
  int32_t begin[kGroupThreads / 32], behind[kGroupThreads / 32], second[kGroupThreads / 32];
  int32_t told[MOST_TILES + 2];  // of each tile: its level, shifted, and NEAR_TILE, HOLES, FAST
};

template <int K, int V, Gates GATES> struct OutputShape {
  using Stages = KeyStages<K, GATES>;
  static constexpr int MIN_BLOCKS = V <= 64 ? 2 : 1;
  static constexpr int ROW_TILE = kRows * (K > V ? K : V) * 2;  // queries, and then results
  static constexpr int KEYS = kKeys * K * 2, STAGE = KEYS + kKeys * V * 2;
  static constexpr int STAGES_AT = ROW_TILE + kKeyStages * STAGE, SHARED = STAGES_AT + sizeof(Stages);
};

// A stage, and the parity of its turn.
struct Stage {
  int number = 0, parity = 0;
  __device__ __forceinline__ Stage next(int tiles = 1) const {
    const bool round = number + tiles >= kKeyStages;
    return {number + tiles - (round ? kKeyStages : 0), parity ^ static_cast<int>(round)};
  }
};

template <int K, int V, Gates GATES> struct KeyStream {
  using S = OutputShape<K, V, GATES>;
  using Stages = typename S::Stages;
  const KeyMaps &maps;
  const float *const scales;    // of the head
  const KeyGates *const gates;  // of the head
  const uint32_t shared;
  Stages *const stages;
  const int batch, head;  // as the maps have them

  __device__ __forceinline__ KeyStream(const Arguments &args, const KeyMaps &maps, const Place &own, unsigned char *shared)
      : maps(maps), scales(args.key_scale + (static_cast<int64_t>(own.batch) * args.problem.key_heads + own.key_head) * args.padded),
        gates(GATES ? args.key_gates + (static_cast<int64_t>(own.batch) * args.problem.state_heads + args.by_state.of(own.head)) * (args.padded / kKeys) : nullptr),
        shared(shared_address(shared)), stages(reinterpret_cast<Stages *>(shared + S::STAGES_AT)), batch(own.batch), head(own.key_head) {}

  __device__ __forceinline__ uint32_t tile_at(Stage stage) const { return shared + S::ROW_TILE + stage.number * S::STAGE; }
  __device__ __forceinline__ uint32_t here(Stage stage) const { return shared_address(&stages->here[stage.number]); }
  __device__ __forceinline__ uint32_t read(Stage stage) const { return shared_address(&stages->read[stage.number]); }
  __device__ __forceinline__ uint32_t queries() const { return shared_address(&stages->queries); }

  // By one thread, before the block's barrier; `warps` read tiles.
  __device__ __forceinline__ void make_barriers(int warps) const {
    for (int number = 0; number < kKeyStages; ++number) bulk_barrier(here({number}), 1), bulk_barrier(read({number}), warps);
    bulk_barrier(queries(), 1);
    bulk_barriers_made();
  }
  // By the same thread: the block's queries; and by all, behind the block's barrier.
  __device__ __forceinline__ void ask_for_queries(const linattn_problem &p, const Place &own) const {
    bulk_arrive_with(queries(), kRows * K * 2);
#pragma unroll
    for (int group = 0; group < kRows / kKeys; ++group)
      bulk_copy_tile<K>(shared + Tile<K>::rows_at(group * kKeys / 16), maps.queries, own.begin + group * kKeys, p.query.head_stride ? own.head : 0,
                        p.query.batch_stride ? own.batch : 0, queries());
  }
  __device__ __forceinline__ void wait_for_queries() const { bulk_wait(queries(), 0); }
  // By one thread, into a stage that nobody reads.
  __device__ __forceinline__ void ask(const linattn_problem &p, int tile, Stage stage) const {
    const uint32_t to = tile_at(stage), barrier = here(stage);
    const auto at = [](int64_t stride, int number) { return stride ? number : 0; };
    bulk_arrive_with(barrier, S::STAGE + (GATES ? static_cast<int>(sizeof(KeyGates)) : kKeys * 4));
    bulk_copy_tile<K>(to, maps.keys, static_cast<int64_t>(tile) * kKeys, at(p.key.head_stride, head), at(p.key.batch_stride, batch), barrier);
    bulk_copy_tile<V>(to + S::KEYS, maps.values, static_cast<int64_t>(tile) * kKeys, at(p.value.head_stride, head), at(p.value.batch_stride, batch), barrier);
    if constexpr (GATES == NO_GATES) bulk_copy(shared_address(stages->scales[stage.number]), scales + tile * kKeys, kKeys * 4, barrier);
    else bulk_copy(shared_address(&stages->gates[stage.number]), gates + tile, sizeof(KeyGates), barrier);
  }
};

}  // namespace linattn_pairs
