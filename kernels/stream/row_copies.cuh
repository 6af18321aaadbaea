// What the row kernel fetches.
#pragma once
#include "stream/row_block.cuh"

namespace linattn_stream {

// What a block fetches, a round at a time, ahead of the products: rows for each chunk and head, keys and values for each chunk.
template <typename T, int D, bool GRAD, bool GATED, RowForm FORM> struct RowCopies {
  using Block = RowBlock<T, D, GRAD, GATED, FORM>;
  using Shape = typename Block::Shape;
  using Copy = TileCopy<T, D, Block::C, Shape::STATE_THREADS>;
  static constexpr int C = Block::C, STAGES = Block::STAGES, TILE = Block::TILE, ROW_TILES = Block::ROW_TILES;

  const Block &job;
  const RowArguments &args;
  const linattn_problem &p;
  const linattn_tensor &x, &y, &z;
  const int helper, heads;
  int64_t left;
  int iteration = 0, head = 0, stage = 0, key_stage = 0;

  __device__ __forceinline__ RowCopies(const Block &job, int helper)
      : job(job), args(job.args), p(args.problem), x(GRAD ? args.grad_out : p.query), y(GRAD ? p.value : p.key), z(GRAD ? p.key : p.value), helper(helper), heads(job.heads),
        left(job.end - job.begin) {
#pragma unroll
    for (int i = 0; i < Shape::ROUNDS - 1; ++i) prefetch();
  }

  // The next chunks and heads, as far as there are any.
  __device__ __forceinline__ void prefetch() {
#pragma unroll 1
    for (int i = 0; i < Shape::GROUPS; ++i, ++iteration)
      if (iteration < job.iterations) {
        const int count = static_cast<int>(min(left, static_cast<int64_t>(C)));
        if (p.causal && head == 0) start_keys(count);
        if constexpr (GATED)
          if (head == 0) job.small.gates.start(args.gates, job.batch, job.head_pair, p.length, job.end - left, count, key_stage, helper);
        start_rows(count);
        advance();
      }
    copy_commit();
  }

  __device__ __forceinline__ void start_keys(int count) const {
    const uint32_t keys = job.key_tiles + key_stage * 2 * TILE;
    Copy::start(keys, y, job.batch, job.memory_head, job.end - left, count, helper);
    Copy::start(keys + TILE, z, job.batch, job.memory_head, job.end - left, count, helper);
  }

  __device__ __forceinline__ void start_rows(int count) const {
    const uint32_t rows = job.row_tiles + stage * ROW_TILES * TILE;
    const int64_t row_head = job.key_head * heads + head;
    Copy::start(rows, x, job.batch, row_head, job.end - left, count, helper);
    if constexpr (GRAD) {
      Copy::start(rows + TILE, args.out, job.batch, row_head, job.end - left, count, helper);
      Copy::start(rows + 2 * TILE, p.query, job.batch, row_head, job.end - left, count, helper);
      if (helper < C) {
        const bool valid = helper < count;
        const int64_t number = (static_cast<int64_t>(job.batch) * p.query_heads + row_head) * p.length + job.end - left + helper;
        copy_number_async(shared_address(job.small.numbers[stage][0] + helper), args.mass + (valid ? number : 0), valid);
        if (args.grad_mass) copy_number_async(shared_address(job.small.numbers[stage][1] + helper), args.grad_mass + (valid ? number : 0), valid);
      }
    }
  }

  __device__ __forceinline__ void advance() {
    stage = stage == STAGES - 1 ? 0 : stage + 1;
    if (++head == heads) head = 0, left -= C, key_stage = key_stage == STAGES - 1 ? 0 : key_stage + 1;
  }
};

}  // namespace linattn_stream
