// The rows that a block of `apply` or `slope` works on, and what each of them sees: the state its chunk meets, and the tiles of columns in the chunk.
#pragma once
#include "generic/tile.cuh"

namespace linattn {

// Rows are queries, columns the keys up to them; or (REVERSE) rows are keys, columns the queries from them on.
template <int WIDTH, bool REVERSE>
struct Span {
  static constexpr int ROWS = Shape<WIDTH>::ROWS;
  const Job &job;
  const linattn_problem &p;
  const int64_t row_tiles, bh, tile_index, row_tile;
  const int b, row_head;
  const int64_t first_row, chunk, start, stop, own_tile;
  const int32_t *const query_segments, *const key_segments, *const row_segments, *const column_segments;

  __device__ __forceinline__ Span(const Job &job, int64_t row_tiles)
      : job(job), p(job.p), row_tiles(row_tiles), bh(blockIdx.x / row_tiles), tile_index(blockIdx.x % row_tiles),
        row_tile(REVERSE ? tile_index : row_tiles - 1 - tile_index),  // the longest first
        b(static_cast<int>(bh / heads())), row_head(static_cast<int>(bh % heads())), first_row(row_tile * ROWS), chunk(p.causal || job.direct ? first_row / job.chunk : 0),
        start(chunk * job.chunk), stop(smaller(start + job.chunk, p.length)), own_tile(first_row / TILE), query_segments(segments_of(p.query_segments, p.query_segments_stride, b)),
        key_segments(segments_of(p.key_segments, p.key_segments_stride, b)), row_segments(REVERSE ? key_segments : query_segments),
        column_segments(REVERSE ? query_segments : key_segments) {}

  __device__ __forceinline__ int heads() const { return REVERSE ? p.key_heads : p.query_heads; }
  // The states that its rows meet: those of a key head, or the query head's.
  __device__ __forceinline__ int first_state() const { return REVERSE ? row_head * job.group / job.state_group : row_head / job.state_group; }
  __device__ __forceinline__ int states() const { return REVERSE ? job.group / job.state_group : 1; }
  // The query heads of a state that its columns are of.
  __device__ __forceinline__ int query_heads() const { return REVERSE ? job.state_group : 1; }
  __device__ __forceinline__ int query_head(int state_head, int index) const { return REVERSE ? state_head * job.state_group + index : row_head; }

  // The run of row n, 0 past the end and in padding.
  __device__ __forceinline__ int run_of(int64_t n) const { return n >= p.length ? 0 : row_segments == nullptr ? 1 : max(row_segments[n], 0); }
  __device__ __forceinline__ const double *decay_tiles(int64_t bs) const { return job.decay == nullptr ? nullptr : job.decay_tiles + bs * (job.tiles + 1); }

  // Of row n: its decay since its tile began, and what it takes of the state.
  __device__ __forceinline__ void carry(float &decay, float &carried, int64_t bs, const double *tiles, int64_t n) const {
    const bool real = n < p.length && (row_segments == nullptr || row_segments[n] > 0);
    decay = real && tiles != nullptr ? job.decay[bs * p.length + n] : 0.0f;
    float carry = real ? 1.0f : 0.0f;
    if (real && p.causal && row_segments != nullptr) {
      const int run = REVERSE ? run_behind(key_segments, stop) : run_before(key_segments, start);
      if (row_segments[n] != run) carry = 0.0f;
    }
    if (tiles != nullptr) {
      const float gap = static_cast<float>(REVERSE ? tiles[(stop + TILE - 1) / TILE] - tiles[own_tile] : tiles[own_tile] - tiles[start / TILE]);
      carry *= expf(fminf(REVERSE ? gap - decay : gap + decay, 0.0f));
    }
    carried = carry;
  }

  // Whether there is a state, and the chunk is not the one where it begins.
  __device__ __forceinline__ bool meets_state() const {
    const bool nothing_carried = p.causal && (REVERSE ? chunk == job.chunks - 1 && job.grad_state == nullptr : chunk == 0 && p.initial_state == nullptr);
    return (REVERSE ? job.has_reverse : job.has_state) && !nothing_carried;
  }
  __device__ __forceinline__ const float *state(int64_t bs) const { return job.states + (bs * job.chunks + (p.causal ? chunk : 0)) * job.features * (p.value_dim + 1); }

  __device__ __forceinline__ int64_t first_tile() const { return p.causal ? (REVERSE ? own_tile : start / TILE) : 0; }
  __device__ __forceinline__ int64_t last_tile() const { return !job.direct ? -1 : p.causal ? (REVERSE ? (stop - 1) / TILE : own_tile) : job.tiles - 1; }
  // The next tile of columns at or behind `tile` that its rows see anything of.
  __device__ __forceinline__ int64_t following(int64_t tile, int64_t last_tile) const {
    return next_tile(tile, last_tile, row_segments, column_segments, first_row, smaller(first_row + ROWS, p.length) - 1, p.length);
  }
  // Decay from one tile to the other.
  __device__ __forceinline__ float gap(const double *tiles, int64_t tile) const {
    return tiles == nullptr ? 0.0f : static_cast<float>(REVERSE ? tiles[tile] - tiles[own_tile] : tiles[own_tile] - tiles[tile]);
  }
};

}  // namespace linattn
