// The kernel of the backward direction in n: its arguments, its shape, what all threads of a block share, and what they fetch. See columns.cuh.
#pragma once
#include <type_traits>

#include "stream/segments.cuh"

namespace linattn_stream {

struct ColumnArguments {
  linattn_problem problem;
  linattn_tensor grad_out, grad_key, grad_value;
  const float *mass, *error, *query_scale;
  const float *states;             // of the segments after each, or null: grad_state or nothing
  const float *grad_state;
  float *grad_initial_state;       // one segment only, or null
  int32_t segments, states_each;   // states_each: of a segment, whose last is what lies behind it
  int64_t segment_length;
  Gates gates;
  float *column_sums;              // (batch, state heads, length): sum of A dA over the key's rows, or null
};

template <int D> struct ColumnShape {
  static constexpr int C = D == 32 || D == 128 ? 64 : D;
  static constexpr int STRIPES = C / 16, BLOCKS = D / 16;
  static constexpr int WARPS = 2 * STRIPES, THREADS = 32 * WARPS;
  static constexpr int SPLIT = WARPS / BLOCKS < BLOCKS ? WARPS / BLOCKS : BLOCKS;  // warps to a row block of the state
  static constexpr int PAIRS = (BLOCKS + SPLIT - 1) / SPLIT;
  static constexpr int STAGES = 2, TILE = C * D * 2, STATE_TILE = (D > C ? D : C) * D * 2;  // dv is staged there
  static constexpr int MIN_BLOCKS = D <= 64 ? 2 : 1;
  struct Small {
    alignas(16) float mixed[C], level[C], slope[C], column[D], line[D], numbers[STAGES][3][C];
    alignas(16) uint16_t high[3][C], low[3][C], zeros[C];
    float counts[WARPS], coefficients[kMaxGroup][2];
    float key_down[C], query_down[C], gradient_peaks[WARPS], state_peaks[WARPS];  // float16
  };
  struct GatedSmall : Small {
    GateTiles<C, STAGES> gates;
    alignas(16) float pull[C];  // a e
  };
  template <bool GATED> using AllSmall = std::conditional_t<GATED, GatedSmall, Small>;
  template <bool GATED> static constexpr int SHARED = STAGES * 4 * TILE + STATE_TILE + static_cast<int>(sizeof(AllSmall<GATED>));
};

// What all threads of a block know of it: where its head and segment lie, and its tiles in shared memory.
template <typename T, int D, bool GATED> struct ColumnBlock {
  using Shape = ColumnShape<D>;
  using Small = typename Shape::template AllSmall<GATED>;
  static constexpr int C = Shape::C, STAGES = Shape::STAGES, TILE = Shape::TILE;

  const ColumnArguments &args;
  unsigned char *const shared;
  Small &small;
  const uint32_t key_tiles, query_tiles, state_tile;  // (stage, k and v); (stage, q and W)
  const int head_pair, segment, batch, key_head;
  const int memory_head;                              // whose keys and values these are
  const int shares;                                   // query heads that share the state
  const int first_head, heads;                        // of them those in turn: one without a mask, as the queries are in the state alone
  const int64_t begin, end;
  const int chunks, iterations;
  const int64_t last;                                 // where the first chunk to be worked on begins

  __device__ __forceinline__ ColumnBlock(const ColumnArguments &args, unsigned char *shared)
      : args(args), shared(shared), small(*reinterpret_cast<Small *>(shared + STAGES * 4 * TILE + Shape::STATE_TILE)), key_tiles(shared_address(shared)),
        query_tiles(key_tiles + STAGES * 2 * TILE), state_tile(query_tiles + STAGES * 2 * TILE), head_pair(blockIdx.x / args.segments), segment(blockIdx.x % args.segments),
        batch(head_pair / args.problem.state_heads), key_head(head_pair % args.problem.state_heads), memory_head(key_head / (args.problem.state_heads / args.problem.key_heads)),
        shares(args.problem.query_heads / args.problem.state_heads), first_head(key_head * shares), heads(args.problem.causal ? shares : 1), begin(segment * args.segment_length),
        end(min(args.problem.length, begin + args.segment_length)), chunks(static_cast<int>((end - begin + C - 1) / C)), iterations(chunks * heads),
        last(begin + static_cast<int64_t>(chunks - 1) * C) {}

  // Before the first copies: gates that no copy brings.
  __device__ __forceinline__ void clear() const {
    if constexpr (GATED) {
      small.gates.clear(args.gates, key_head, threadIdx.x, Shape::THREADS);
      __syncthreads();
    }
  }

  __device__ __forceinline__ unsigned char *keys(int key_stage) const { return shared + key_stage * 2 * TILE; }
  __device__ __forceinline__ unsigned char *queries(int stage) const { return shared + STAGES * 2 * TILE + stage * 2 * TILE; }
};

// What they fetch, ahead of the products: keys and values for each chunk, queries and their gradients for each chunk and head.
template <typename T, int D, bool GATED> struct ColumnCopies {
  using Block = ColumnBlock<T, D, GATED>;
  using Copy = TileCopy<T, D, Block::C, Block::Shape::THREADS>;
  static constexpr int C = Block::C, STAGES = Block::STAGES, TILE = Block::TILE;
  static constexpr bool kKeeps = !GATED && (D == 64 || D == 128);  // whether addresses are kept from tile to tile: beside gates no register is left for them

  const Block &job;
  const ColumnArguments &args;
  const linattn_problem &p;
  const int thread, heads;
  int64_t begin;
  int count, iteration = 0, head = 0, stage = 0, key_stage = 0;
  const T *key, *value, *query, *grad_out;  // where the thread's next copies begin

  __device__ __forceinline__ explicit ColumnCopies(const Block &job)
      : job(job), args(job.args), p(args.problem), thread(threadIdx.x), heads(job.heads), begin(job.last), count(static_cast<int>(job.end - job.last)) {
    if constexpr (kKeeps) {
      key = Copy::source_of(p.key, job.batch, job.memory_head, begin, thread), value = Copy::source_of(p.value, job.batch, job.memory_head, begin, thread);
      query = Copy::source_of(p.query, job.batch, job.first_head, begin, thread), grad_out = Copy::source_of(args.grad_out, job.batch, job.first_head, begin, thread);
    }
  }

  // The next chunk and head, if there is one.
  __device__ __forceinline__ void prefetch() {
    if (iteration < job.iterations) {
      if (head == 0) start_keys();
      if (p.causal) start_queries();
      stage = stage == STAGES - 1 ? 0 : stage + 1;
      if constexpr (kKeeps) move_on();
      if (++head == heads) head = 0, begin -= C, count = C, key_stage = key_stage == STAGES - 1 ? 0 : key_stage + 1;
    }
    ++iteration;
    copy_commit();
  }

  // The addresses, to the group's next head or the chunk before.
  __device__ __forceinline__ void move_on() {
    if (head < heads - 1) {
      query += p.query.head_stride, grad_out += args.grad_out.head_stride;
    } else {
      key -= C * p.key.token_stride, value -= C * p.value.token_stride;
      query -= C * p.query.token_stride + (heads - 1) * p.query.head_stride, grad_out -= C * args.grad_out.token_stride + (heads - 1) * args.grad_out.head_stride;
    }
  }

  __device__ __forceinline__ void start(uint32_t tile, const linattn_tensor &tensor, const T *kept, int64_t row_head) const {
    if constexpr (kKeeps) Copy::start_at(tile, kept, static_cast<const T *>(tensor.data), tensor.token_stride, count, thread);
    else Copy::start(tile, tensor, job.batch, row_head, begin, count, thread);
  }

  __device__ __forceinline__ void start_keys() const {
    const uint32_t keys = job.key_tiles + key_stage * 2 * TILE;
    start(keys, p.key, key, job.memory_head);
    start(keys + TILE, p.value, value, job.memory_head);
    if constexpr (GATED) job.small.gates.start(args.gates, job.batch, job.head_pair, p.length, begin, count, key_stage, thread);
  }

  __device__ __forceinline__ void start_queries() const {
    const uint32_t queries = job.query_tiles + stage * 2 * TILE;
    start(queries, p.query, query, job.first_head + head);
    start(queries + TILE, args.grad_out, grad_out, job.first_head + head);
    const int64_t number = (static_cast<int64_t>(job.batch) * p.query_heads + job.first_head + head) * p.length + begin + thread;
    if (thread < C) {
      const uint32_t numbers = shared_address(job.small.numbers[stage][0] + thread);
      const bool valid = thread < count;
      copy_number_async(numbers, args.mass + (valid ? number : 0), valid);
      copy_number_async(numbers + 4 * C, args.error + (valid ? number : 0), valid);
      copy_number_async(numbers + 8 * C, args.query_scale + (valid ? number : 0), valid);
    }
  }
};

}  // namespace linattn_stream
