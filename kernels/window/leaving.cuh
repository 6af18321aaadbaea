// The new token takes its slots of the ring, and what the attention beside the window needs of the one that leaves is put into scratch memory, with
// the queries: as they are, x W of them, or softmax([x W, -x W]).
#pragma once
#include "window/arguments.cuh"

namespace linattn_ring {

constexpr float LEAST_FEATURE = 0x1p-24f;  // as forms/feature_map.py has it

template <typename T> struct Leaving {
  struct Shared {
    float rows[HEADS_AT_ONCE + 1][MAX_DIM];      // the queries, and behind them the key that leaves
    float products[HEADS_AT_ONCE + 1][MAX_DIM];  // x W of them
    float weight;                                // exp(log_input_gate) of the token that leaves
  };

  const Arguments &args;
  const linattn_window &w;
  const linattn_beside &beside;
  Shared &shared;
  const Heads heads;
  const int thread;
  const int64_t seen, newest;  // the newest token's place in the window

  __device__ Leaving(const Arguments &args, Shared &shared, const Heads &heads)
      : args(args), w(args.window), beside(args.beside), shared(shared), heads(heads), thread(threadIdx.x), seen(w.seen[heads.batch]), newest(seen % w.window) {}

  __device__ int64_t of_key() const { return static_cast<int64_t>(heads.batch) * w.key_heads + heads.key_head; }

  // Writes element i of the new token, as a sink as well if it is one, and returns what was in its place.
  __device__ T exchange(const linattn_tensor &ring, T incoming, int i) const {
    T *const slots = row_of<T>(ring, heads.batch, heads.key_head) + i, &slot = slots[(w.sinks + newest) * ring.token_stride];
    const T before = slot;
    slot = incoming;
    if (seen < w.sinks) slots[seen * ring.token_stride] = incoming;
    return before;
  }
  // The same of a number that each token has.
  __device__ float exchange(int row, float incoming) const {
    const int numbers = (beside.log_decay_per_token != 0) + (beside.log_input_gate != nullptr);
    float &slot = beside.kept[((static_cast<int64_t>(heads.batch) * numbers + row) * w.key_heads + heads.key_head) * w.window + newest], before = slot;
    slot = incoming;
    return before;
  }

  __device__ void exchange_numbers() const {
    if (thread == 0 && beside.log_decay_per_token) args.scratch.log_decay[of_key()] = exchange(0, beside.log_decay[of_key()]);
    if (thread == 0 && beside.log_input_gate) shared.weight = expf(exchange(beside.log_decay_per_token != 0, beside.log_input_gate[of_key()]));
    if (thread == 0 && heads.key_head == 0) args.scratch.left[heads.batch] = seen >= w.window;
    __syncthreads();
  }

  __device__ void exchange_vectors() const {
    const bool gated = args.has_beside && beside.log_input_gate;
    float *const value = args.scratch.value + of_key() * (w.value_dim + gated);
    for (int i = thread; i < w.head_dim; i += THREADS) {
      const float before = number(exchange(w.ring_key, row_of<T>(w.key, heads.batch, heads.key_head)[i], i));
      shared.rows[heads.count][i] = beside.key_center ? before - number(static_cast<const T *>(beside.key_center)[heads.key_head * w.head_dim + i]) : before;
    }
    for (int i = thread; i < w.value_dim; i += THREADS) {
      const float before = number(exchange(w.ring_value, row_of<T>(w.value, heads.batch, heads.key_head)[i], i));
      if (args.has_beside) value[i] = gated ? shared.weight * before : before;
    }
    if (gated && thread == 0) value[w.value_dim] = shared.weight;
  }

  // Where the features of a row go.
  __device__ float *features_of(int row) const {
    if (row == heads.count) return args.scratch.key + of_key() * beside.features;
    return args.scratch.query + (static_cast<int64_t>(heads.batch) * w.query_heads + heads.first + row) * beside.features;
  }

  __device__ const T *matrix_of(int row, int columns) const {
    const int head = row == heads.count ? heads.key_head : heads.first + row;
    return static_cast<const T *>(row == heads.count ? beside.key_matrix : beside.query_matrix) + static_cast<int64_t>(head) * w.head_dim * columns;
  }
  __device__ float product(int row, int column, int columns) const {
    const T *const matrix = matrix_of(row, columns) + column;
    float sum = 0.f;
#pragma unroll 8
    for (int d = 0; d < w.head_dim; ++d) sum += shared.rows[row][d] * number(matrix[d * columns]);
    return sum;
  }
  // The same by all lanes of a piece's columns together: each has every PIECE-th row of the matrix, for all of them.
  __device__ float product_of_lanes(int row, int column, int columns) const {
    const int place = column % PIECE<T>;
    const T *const matrix = matrix_of(row, columns) + column - place;
    float sums[PIECE<T>] = {}, piece[PIECE<T>];
#pragma unroll 8
    for (int d = place; d < w.head_dim; d += PIECE<T>) {
      read_piece<T>(piece, matrix + d * columns);
#pragma unroll
      for (int i = 0; i < PIECE<T>; ++i) sums[i] = fmaf(shared.rows[row][d], piece[i], sums[i]);
    }
    return sum_of_neighbors<PIECE<T>>(sums, place);
  }
  __device__ bool matrices_lie_in_pieces(int columns) const {
    return ((reinterpret_cast<uintptr_t>(beside.query_matrix) | reinterpret_cast<uintptr_t>(beside.key_matrix) | columns * sizeof(T)) & 15) == 0;
  }

  // A warp a row.
  __device__ void write_softmax(int rows, int columns) const {
    const int lane = thread % 32;
    for (int row = thread / 32; row < rows; row += WARPS) {
      const float *const x = shared.products[row];
      float *const to = features_of(row), top = 0.f, total = 0.f;
      for (int i = lane; i < columns; i += 32) top = fmaxf(top, fabsf(x[i]));
      top = warp_max(top);
      for (int i = lane; i < columns; i += 32) total += expf(x[i] - top) + expf(-x[i] - top);
      total = warp_sum(total);
      for (int i = lane; i < columns; i += 32) to[i] = fmaxf(expf(x[i] - top) / total, LEAST_FEATURE), to[columns + i] = fmaxf(expf(-x[i] - top) / total, LEAST_FEATURE);
    }
  }

  __device__ void write_features() const {
    const int rows = heads.count + heads.begins, columns = beside.is_map ? beside.features / 2 : beside.features;
    for (int i = thread; i < heads.count * w.head_dim; i += THREADS)
      shared.rows[i / w.head_dim][i % w.head_dim] = number(row_of<T>(w.query, heads.batch, heads.first + i / w.head_dim)[i % w.head_dim]);
    __syncthreads();
    const bool by_lanes = beside.query_matrix && matrices_lie_in_pieces(columns);
    for (int first = 0; first < rows * columns; first += THREADS) {
      const int i = first + thread, row = min(i / columns, rows - 1), column = i % columns;  // those beyond the last row do its products over
      const float x = by_lanes ? product_of_lanes(row, column, columns) : beside.query_matrix ? product(row, column, columns) : shared.rows[row][column];
      if (i >= rows * columns) continue;
      if (beside.is_map) shared.products[row][column] = x;
      else features_of(row)[column] = x;
    }
    if (!beside.is_map) return;
    __syncthreads();
    write_softmax(rows, columns);
  }

  __device__ void run() const {
    if (is_padding(w, heads.batch)) {
      if (args.has_beside && heads.begins && heads.key_head == 0 && thread == 0) args.scratch.left[heads.batch] = 0;
      return;
    }
    if (heads.begins) {
      if (args.has_beside) exchange_numbers();
      exchange_vectors();
    }
    if (args.has_beside && seen >= w.window) write_features();
  }
};

}  // namespace linattn_ring
