// One new token a sequence: the state of each head is read once and written once, in place. A warp goes from one lot of its rows to the next by
// itself: several are on their way to shared memory while it multiplies the one that is there.
#pragma once
#include "decode.cuh"
#include "tile/instructions.cuh"

namespace linattn {
namespace {

constexpr int LOTS = 3;  // of a warp, on their way or at hand

// COUNT numbers, all on their way before the first is looked at: number i lies at element where(i).at of where(i).data; without data it is 0.
struct Element {
  const void *data;
  int64_t at;
};
template <int COUNT, typename Where> __device__ __forceinline__ void load_all(float (&to)[COUNT], int dtype, const Where &where) {
  if (dtype == LINATTN_FLOAT32) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const Element element = where(i);
      to[i] = element.data ? static_cast<const float *>(element.data)[element.at] : 0.f;
    }
    return;
  }
  uint16_t bits[COUNT];
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const Element element = where(i);
    bits[i] = element.data ? static_cast<const uint16_t *>(element.data)[element.at] : 0;
  }
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    __half_raw half;
    half.x = bits[i];
    to[i] = dtype == LINATTN_FLOAT16 ? __half2float(__half(half)) : __uint_as_float(static_cast<uint32_t>(bits[i]) << 16);
  }
}

// HEADS query heads at once, SLICES of 32 numbers that hold D and Dv, where WHOLE Dv is all of them: then a row's width is known to the compiler,
// and a state of few rows is not worth the instructions that find out where each begins. The last column of S, that of ones, is apart.
// Of the first degree all features are made at once, of the second degree those of a lot when its turn comes.
template <int DEGREE, int HEADS, int SLICES, bool WHOLE, int WARPS> struct Step {
  static constexpr int THREADS = 32 * WARPS;
  static constexpr int EACH = SLICES <= 2 ? 9 : SLICES <= 4 ? 6 : 3;  // rows of a warp's lot: at D = 64 those of 8 warps are the whole first degree
  static constexpr int ROWS = WARPS * EACH, FEATURES = DEGREE == 1 ? 32 * SLICES + 1 : ROWS;
  static constexpr int LOT = EACH * (32 * SLICES + 1);
  static constexpr int TOGETHER = HEADS * SLICES <= 16 ? HEADS : 16 / SLICES;                       // heads whose sums are added up at once
  static constexpr int BLOCKS = (HEADS * SLICES > 16 ? 2 : HEADS * SLICES > 8 ? 3 : 4) * 8 / WARPS;  // of a multiprocessor, by registers
  static constexpr int VECTORS = (HEADS + WARPS) / WARPS;                                           // queries, and the key behind them, that a warp fetches
  static constexpr int HALF = (HEADS + 1) / 2;
  struct alignas(4 * HEADS) Heads {  // a number for each
    float of[HEADS];
  };
  struct alignas(HEADS == 1 ? 8 : 4 * HEADS) Features {  // of a row
    Heads phi;
    float psi;
  };
  struct Fixed {
    Features features[FEATURES];
    float vectors[DEGREE == 1 ? 1 : HEADS + 1][32 * SLICES], coefficients[3][HEADS], masses[WARPS][HEADS];
  };
  static constexpr int SUMS = WARPS * TOGETHER * 32 * SLICES;  // of all warps, where the lots were
  static int shared_bytes(int rows_each) { return 4 * std::max(SUMS, std::min(LOTS, (rows_each + ROWS - 1) / ROWS) * WARPS * LOT); }

  const StepArguments &args;
  const linattn_problem &p;
  Fixed &fixed;
  float *const shared;  // lots, and then sums
  const int thread, warp, lane;
  const Place at;
  const int key_head, value_dim, width, begin, end;  // rows of the block
  float *const state;
  int first_query, heads;  // of this round
  float keep;              // exp(log_decay), and 1 in later rounds
  float value[SLICES], num[HEADS][SLICES], mass[HALF];
  int left, right;  // elements whose product is the feature of this lane's row in the next lot; before the first pair, right < 0

  __device__ __forceinline__ Step(const StepArguments &args, Fixed &fixed, float *shared)
      : args(args), p(args.problem), fixed(fixed), shared(shared), thread(threadIdx.x), warp(thread / 32), lane(thread % 32), key_head(key_head_of(args, at.head)),
        value_dim(WHOLE ? 32 * SLICES : p.value_dim), width(value_dim + 1), begin(at.split * args.rows_each), end(min(args.features, begin + args.rows_each)),
        state(args.after + (static_cast<int64_t>(at.batch) * p.state_heads + at.head) * args.features * width) {}

  __device__ __forceinline__ bool is_column(int slice) const { return WHOLE || lane + 32 * slice < value_dim; }
  __device__ __forceinline__ int first_row(int number) const { return begin + (number * WARPS + warp) * EACH; }
  __device__ __forceinline__ int rows_in(int number) const { return min(EACH, end - first_row(number)); }
  __device__ __forceinline__ float *lot(int number) const { return shared + (number % LOTS * WARPS + warp) * LOT; }
  __device__ __forceinline__ int first_feature(int number) const { return DEGREE == 1 ? first_row(number) : warp * EACH; }

  // No new token: the state stays. With several blocks a state the second kernel writes.
  __device__ __forceinline__ void write_padding() const {
    if (args.splits > 1) return;
#pragma unroll 1
    for (int h = 0; h < args.group; ++h) {
      const int query_head = at.head * args.group + h;
#pragma unroll 1
      for (int i = thread; i < value_dim; i += THREADS) store(args.out.data, p.dtype, offset_of(args.out, at.batch, query_head, 0) + i, 0.f);
      if (thread == 0 && args.mass) args.mass[at.batch * p.query_heads + query_head] = 0.f;
    }
  }

  // A lot of this warp's on its way, rows and the column of ones as they lie.
  __device__ __forceinline__ void send_for(int number) const {
    const int count = rows_in(number) * width;
    const float *const from = state + static_cast<int64_t>(first_row(number)) * width + lane;
    const uint32_t to = linattn_tile::shared_address(lot(number) + lane);
    if (WHOLE && count == LOT) {
#pragma unroll
      for (int i = 0; i < LOT; i += 32)
        if (i + 32 <= LOT || lane < LOT - i) linattn_tile::copy_number_async(to + 4 * i, from + i, true);
    } else {
#pragma unroll 1
      for (int i = 0; lane + i < count; i += 32) linattn_tile::copy_number_async(to + 4 * i, from + i, true);
    }
    linattn_tile::copy_commit();
  }

  // The token: all that is read of it is on its way before the first number is looked at. A later round reads the state as the first one left it.
  __device__ __forceinline__ void begin_round(int base) {
    first_query = at.head * args.group + base, heads = min(HEADS, args.group - base);
    const float rate = base == 0 && p.log_decay ? p.log_decay[p.log_decay_per_token ? at.batch * p.state_heads + at.head : at.head] : 0.f;
    const int number = (THREADS - 1 - thread) / HEADS, of_head = thread % HEADS;  // by warps that fetch the least
    const bool has_number = number < 3 && of_head < heads;
    const float of_f = has_number ? p.coefficients[number * p.query_heads + first_query + of_head] : 0.f;
    float scale[VECTORS], x[(VECTORS + 1) * SLICES];
    int64_t from[VECTORS + 1];
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      const int i = warp + v * WARPS, query_head = first_query + i;
      from[v] = lane + (i < heads ? offset_of(p.query, at.batch, query_head, 0) : offset_of(p.key, at.batch, key_head, 0));
      scale[v] = i < heads ? p.coefficients[3 * p.query_heads + query_head] * (DEGREE == 1 ? p.coefficients[p.query_heads + query_head] : 1.f) : base == 0 ? 1.f : 0.f;
    }
    from[VECTORS] = lane + offset_of(p.value, at.batch, key_head, 0);
    load_all(x, p.dtype, [&](int n) {
      const int v = n / SLICES, i = warp + v * WARPS, slice = n % SLICES;
      const void *const data = v == VECTORS ? p.value.data : i < heads ? p.query.data : i == heads ? p.key.data : nullptr;
      return Element{lane + 32 * slice < (v == VECTORS ? value_dim : p.head_dim) ? data : nullptr, from[v] + 32 * slice};
    });
    keep = expf(rate);
    if (DEGREE == 2 && has_number) fixed.coefficients[number][of_head] = of_f;
    if (DEGREE == 1 && has_number && number == 0) fixed.features[p.head_dim].phi.of[of_head] = of_f;
    if (DEGREE == 1 && thread == 0) fixed.features[p.head_dim].psi = base == 0 ? 1.f : 0.f;
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) put_down(warp + v * WARPS, x + v * SLICES, scale[v]);
#pragma unroll
    for (int t = 0; t < SLICES; ++t) value[t] = x[VECTORS * SLICES + t];
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
      mass[h % HALF] = 0.f;
#pragma unroll
      for (int t = 0; t < SLICES; ++t) num[h][t] = 0.f;
    }
    if (DEGREE == 2) begin_features();
  }
  // A query, or behind them the key, of unit length and multiplied, where all warps find it.
  __device__ __forceinline__ void put_down(int number, const float *x, float scale) const {
    if (number > heads) return;
    if (p.normalize_qk) {
      float square = 0;
#pragma unroll
      for (int t = 0; t < SLICES; ++t) square += x[t] * x[t];
      square = warp_sum(square);
      scale *= square > SMALLEST_SQUARE ? linattn_tile::reciprocal_root(square) : 0.f;
    }
#pragma unroll
    for (int t = 0; t < SLICES; ++t) {
      const int i = lane + 32 * t;
      if (DEGREE == 2) fixed.vectors[number < heads ? number : HEADS][i] = x[t] * scale;
      else if (i < p.head_dim) (number < heads ? fixed.features[i].phi.of[number] : fixed.features[i].psi) = x[t] * scale;
    }
  }

  // psi(k) and phi(q) of the rows of a lot, [k, 1, k_i k_j] and [b q, a, c m_ij q_i q_j]: m_ij is 2 off the diagonal. A lane has a row and half of
  // the heads.
  __device__ __forceinline__ void begin_features() {
    left = 0, right = first_row(0) + lane % 16 - p.head_dim - 1;
    if (right < p.head_dim) return;
    const int2 both = pair_of(right, p.head_dim);
    left = both.x, right = both.y;
  }
  __device__ __forceinline__ void make_features(int number, bool takes_in) {
    const int dim = p.head_dim, mine = lane % 16, first = lane / 16 * HALF;
    const int row = first_row(number) + mine;
    if (mine < rows_in(number) && first < HEADS) {
      const float *const key = fixed.vectors[HEADS];
      Features &features = fixed.features[warp * EACH + mine];
      if (first == 0) features.psi = !takes_in ? 0.f : right >= 0 ? key[left] * key[right] : row < dim ? key[row] : 1.f;
#pragma unroll
      for (int h = first; h < first + HALF; ++h) {
        const float *const q = fixed.vectors[h];
        const float a = fixed.coefficients[0][h], b = fixed.coefficients[1][h], c = fixed.coefficients[2][h];
        features.phi.of[h] = h >= heads ? 0.f : right >= 0 ? c * (left == right ? 1.f : 2.f) * q[left] * q[right] : row < dim ? b * q[row] : a;
      }
    }
    right += ROWS;
#pragma unroll 1
    for (; right >= dim && left < dim; ++left) right += left + 1 - dim;
  }

  // The lot takes the token in, is written, and gives each head its part: the column of ones, and the others.
  __device__ __forceinline__ void count(int number) {
    const int mine = lane % 16, first = lane / 16 * HALF;
    if (mine >= rows_in(number) || first >= HEADS) return;
    const Features &features = fixed.features[first_feature(number) + mine];
    const float one = fmaf(lot(number)[mine * width + value_dim], keep, features.psi);
    if (first == 0) state[static_cast<int64_t>(first_row(number) + mine) * width + value_dim] = one;
#pragma unroll
    for (int h = 0; h < HALF; ++h) mass[h] = fmaf(features.phi.of[first + h], one, mass[h]);
  }
  __device__ __forceinline__ void multiply(int number) {
    const int count = rows_in(number);
    if (count == EACH) return multiply_rows<EACH>(number, 0);
#pragma unroll 1
    for (int u = 0; u < count; ++u) multiply_rows<1>(number, u);
  }
  template <int COUNT> __device__ __forceinline__ void multiply_rows(int number, int first) {
    const float *const from = lot(number) + first * width + lane;
    float *const to = state + static_cast<int64_t>(first_row(number) + first) * width + lane;
    const Features *const features = fixed.features + first_feature(number) + first;
#pragma unroll
    for (int u = 0; u < COUNT; ++u) {
      const Features of_row = features[u];
      float x[SLICES];
#pragma unroll
      for (int t = 0; t < SLICES; ++t) {
        x[t] = is_column(t) ? fmaf(of_row.psi, value[t], from[u * width + 32 * t] * keep) : 0.f;
        if (is_column(t)) to[u * width + 32 * t] = x[t];
      }
#pragma unroll
      for (int h = 0; h < HEADS; ++h)
#pragma unroll
        for (int t = 0; t < SLICES; ++t) num[h][t] = fmaf(of_row.phi.of[h], x[t], num[h][t]);
    }
  }

  // Adds up the warps, in a fixed order, and divides; or leaves the sums to the second kernel.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int h = 0; h < HALF; ++h) {
      for (int step = 8; step > 0; step /= 2) mass[h] += __shfl_xor_sync(0xffffffffu, mass[h], step);
      if (lane % 16 == 0 && lane / 16 * HALF + h < HEADS) fixed.masses[warp][lane / 16 * HALF + h] = mass[h];
    }
#pragma unroll
    for (int first = 0; first < HEADS; first += TOGETHER) {
      __syncthreads();
#pragma unroll
      for (int h = 0; h < TOGETHER; ++h)
#pragma unroll
        for (int t = 0; t < SLICES; ++t) shared[((warp * TOGETHER + h) * SLICES + t) * 32 + lane] = num[first + h][t];
      __syncthreads();
#pragma unroll 1
      for (int i = thread; i < min(TOGETHER, heads - first) * 32 * SLICES; i += THREADS) write(first, i / (32 * SLICES), i % (32 * SLICES));
    }
  }
  __device__ __forceinline__ void write(int first, int h, int column) const {
    if (!WHOLE && column >= value_dim) return;
    float sum = 0.f, total = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) sum += shared[(w * TOGETHER + h) * 32 * SLICES + column], total += fixed.masses[w][first + h];
    const int query_head = first_query + first + h;
    const int64_t number = static_cast<int64_t>(at.batch) * p.query_heads + query_head;
    if (args.splits > 1) {
      float *const part = args.partials + (number * args.splits + at.split) * width;
      part[column] = sum;
      if (column == 0) part[value_dim] = total;
      return;
    }
    store(args.out.data, p.dtype, offset_of(args.out, at.batch, query_head, 0) + column, sum / (total == 0.f ? 1.f : total));
    if (column == 0 && args.mass) args.mass[number] = total;
  }
};

}  // namespace
}  // namespace linattn
