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

  // Writes this thread's element of the new token, as a sink as well if it is one.
  __device__ T *slots_of(const linattn_tensor &ring) const { return row_of<T>(ring, heads.batch, heads.key_head) + thread; }
  __device__ void put(const linattn_tensor &ring, T incoming) const {
    slots_of(ring)[(w.sinks + newest) * ring.token_stride] = incoming;
    if (seen < w.sinks) slots_of(ring)[seen * ring.token_stride] = incoming;
  }
  // Where a number that each token has is kept.
  __device__ float &kept(int row) const {
    const int numbers = (beside.log_decay_per_token != 0) + (beside.log_input_gate != nullptr);
    return beside.kept[((static_cast<int64_t>(heads.batch) * numbers + row) * w.key_heads + heads.key_head) * w.window + newest];
  }

  // The numbers of the token that leaves, and of the new one, by one thread.
  __device__ void exchange_numbers() const {
    const bool decays = beside.log_decay_per_token != 0, gated = beside.log_input_gate != nullptr;
    const float decay = decays ? kept(0) : 0.f, gate = gated ? kept(decays) : 0.f;
    const float new_decay = decays ? beside.log_decay[of_key()] : 0.f, new_gate = gated ? beside.log_input_gate[of_key()] : 0.f;
    if (decays) args.scratch.log_decay[of_key()] = decay, kept(0) = new_decay;
    if (gated) shared.weight = expf(gate), kept(decays) = new_gate;
    if (heads.key_head == 0) args.scratch.left[heads.batch] = seen >= w.window;
  }

  // A thread has an element of the key and one of the value; all are on their way before the first is looked at.
  __device__ void exchange_all() const {
    static_assert(MAX_DIM <= THREADS);
    const bool has_key = thread < w.head_dim, has_value = thread < w.value_dim, gated = args.has_beside && beside.log_input_gate, centered = has_key && beside.key_center;
    T new_key(0.f), key(0.f), new_value(0.f), value(0.f), center(0.f);
    if (has_key) new_key = row_of<T>(w.key, heads.batch, heads.key_head)[thread], key = slots_of(w.ring_key)[(w.sinks + newest) * w.ring_key.token_stride];
    if (has_value) new_value = row_of<T>(w.value, heads.batch, heads.key_head)[thread], value = slots_of(w.ring_value)[(w.sinks + newest) * w.ring_value.token_stride];
    if (centered) center = static_cast<const T *>(beside.key_center)[heads.key_head * w.head_dim + thread];
    if (args.has_beside && thread == 0) exchange_numbers();
    if (has_key) put(w.ring_key, new_key), shared.rows[heads.count][thread] = number(key) - number(center);
    if (has_value) put(w.ring_value, new_value);
    if (gated) __syncthreads();
    float *const to = args.scratch.value + of_key() * (w.value_dim + gated);
    if (has_value && args.has_beside) to[thread] = gated ? shared.weight * number(value) : number(value);
    if (gated && thread == 0) to[w.value_dim] = shared.weight;
  }

  // Where the features of a row go.
  __device__ float *features_of(int row) const {
    if (row == heads.count) return args.scratch.key + of_key() * beside.features;
    return args.scratch.query + (static_cast<int64_t>(heads.batch) * w.query_heads + heads.first + row) * beside.features;
  }

  // x W of a row and column, a part of it: every `parts`-th element of x from `part` on.
  __device__ float product(int row, int column, int columns, int part, int parts) const {
    const int head = row == heads.count ? heads.key_head : heads.first + row;
    const T *const matrix = static_cast<const T *>(row == heads.count ? beside.key_matrix : beside.query_matrix) + static_cast<int64_t>(head) * w.head_dim * columns + column;
    float sum = 0.f;
#pragma unroll 16
    for (int d = part; d < w.head_dim; d += parts) sum += shared.rows[row][d] * number(matrix[d * columns]);
    return sum;
  }
  // Threads that have nothing else to do share a product, neighbors of a warp.
  __device__ void write_products(int rows, int columns) const {
    const int products = rows * columns;
    int parts = 1;
    while (parts < 32 && 2 * parts * products <= THREADS) parts *= 2;
    for (int base = 0; base < products * parts; base += THREADS) {
      const int number = (base + thread) / parts, part = thread % parts;
      float sum = number < products ? product(number / columns, number % columns, columns, part, parts) : 0.f;
      for (int step = parts / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
      if (part == 0 && number < products) write_feature(number / columns, number % columns, sum);
    }
  }
  __device__ void write_feature(int row, int column, float x) const {
    if (beside.is_map) shared.products[row][column] = x;
    else features_of(row)[column] = x;
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

  __device__ void load_queries() const {
    for (int i = thread; i < heads.count * w.head_dim; i += THREADS)
      shared.rows[i / w.head_dim][i % w.head_dim] = number(row_of<T>(w.query, heads.batch, heads.first + i / w.head_dim)[i % w.head_dim]);
  }
  __device__ void write_features() const {
    const int rows = heads.count + heads.begins, columns = beside.is_map ? beside.features / 2 : beside.features;
    __syncthreads();
    if (beside.query_matrix) write_products(rows, columns);
    else
      for (int i = thread; i < rows * columns; i += THREADS) write_feature(i / columns, i % columns, shared.rows[i / columns][i % columns]);
    if (!beside.is_map) return;
    __syncthreads();
    write_softmax(rows, columns);
  }

  __device__ void run() const {
    if (is_padding(w, heads.batch)) {
      if (args.has_beside && heads.begins && heads.key_head == 0 && thread == 0) args.scratch.left[heads.batch] = 0;
      return;
    }
    if (args.has_beside) load_queries();
    if (heads.begins) exchange_all();
    if (args.has_beside && seen >= w.window) write_features();
  }
};

}  // namespace linattn_ring
