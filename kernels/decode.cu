// architectures: sm_80 compute_80 sm_90
// One new token a sequence. The state of each head is read once and written once, in place. A warp goes from one lot of its rows to the next by
// itself: several are on their way to shared memory while it makes the features of the one that is there and multiplies.
#include "decode.cuh"
#include "tile/instructions.cuh"

namespace linattn {
namespace {

constexpr int MOST_LOTS = 3;  // of a warp, on their way or at hand

// HEADS query heads at once, and the SLICES of 32 columns that hold Dv, where WHOLE all of them: then a row's width is known to the compiler, and
// a state of few rows is not worth the instructions that find out where each begins. The last column of S, that of ones, is apart.
template <int HEADS, int SLICES, bool WHOLE> struct Step {
  static constexpr int EACH = SLICES <= 2 ? 9 : SLICES <= 4 ? 6 : 3;  // rows of a warp's lot: at D = 64 those of all warps are the whole first degree
  static constexpr int ROWS = WARPS * EACH;
  static constexpr int LOT = EACH * (32 * SLICES + 1), COPIES = (LOT + 31) / 32;
  static constexpr int TOGETHER = HEADS * SLICES <= 16 ? HEADS : 16 / SLICES;  // heads whose sums are added up at once
  static constexpr int BLOCKS = HEADS * SLICES > 16 ? 2 : HEADS * SLICES > 8 ? 3 : 4;  // of a multiprocessor, by registers
  struct alignas(4 * HEADS) Heads {  // a number for each
    float of[HEADS];
  };
  struct Fixed {
    Heads phi[WARPS][EACH];
    float psi[WARPS][EACH], key[MAX_DIM], queries[HEADS][MAX_DIM], coefficients[3][HEADS], masses[WARPS][HEADS];
  };
  static constexpr int SUMS = WARPS * TOGETHER * 32 * SLICES;  // of all warps, where the lots were
  static int lots_of(const StepArguments &args) { return std::min(MOST_LOTS, (args.rows_each + ROWS - 1) / ROWS); }
  static int shared_bytes(const StepArguments &args) { return 4 * std::max(SUMS, lots_of(args) * WARPS * LOT); }

  const StepArguments &args;
  const linattn_problem &p;
  Fixed &fixed;
  float *const shared;  // of lots, and then of sums
  const int thread, warp, lane;
  const Place at;
  const int key_head, value_dim, width, begin, end;  // rows of the block
  float *const state;
  int first_query, heads;  // of this round
  bool takes;              // whether it is the first one, which takes the token in; the others only read
  float keep;              // exp(log_decay), and 1 in later rounds
  float value[SLICES], num[HEADS][SLICES], mass[HEADS];
  int row, i, j;  // this lane's of the lot at hand, and which elements its feature is the product of; before the first pair, j < 0

  __device__ __forceinline__ Step(const StepArguments &args, Fixed &fixed, float *shared)
      : args(args), p(args.problem), fixed(fixed), shared(shared), thread(threadIdx.x), warp(thread / 32), lane(thread % 32), key_head(key_head_of(args, at.head)),
        value_dim(WHOLE ? 32 * SLICES : p.value_dim), width(value_dim + 1), begin(at.split * args.rows_each), end(min(args.features, begin + args.rows_each)),
        state(args.after + (static_cast<int64_t>(at.batch) * p.state_heads + at.head) * args.features * width) {}

  __device__ __forceinline__ bool is_column(int slice) const { return WHOLE || lane + 32 * slice < value_dim; }
  __device__ __forceinline__ int first_row(int number) const { return begin + (number * WARPS + warp) * EACH; }
  __device__ __forceinline__ int rows_in(int number) const { return min(EACH, end - first_row(number)); }
  __device__ __forceinline__ float *lot(int number) const { return shared + (number % MOST_LOTS * WARPS + warp) * LOT; }

  // No new token: the state stays. With several blocks a state the second kernel writes.
  __device__ __forceinline__ void write_padding() const {
    if (args.splits > 1) return;
    for (int h = 0; h < args.group; ++h) {
      const int query_head = at.head * args.group + h;
      for (int i = thread; i < value_dim; i += THREADS) store(args.out.data, p.dtype, offset_of(args.out, at.batch, query_head, 0) + i, 0.f);
      if (thread == 0 && args.mass) args.mass[at.batch * p.query_heads + query_head] = 0.f;
    }
  }

  // A lot of this warp's on its way, rows and the column of ones as they lie.
  __device__ __forceinline__ void send_for(int number) const {
    const int count = rows_in(number) * width;
    const float *const from = state + static_cast<int64_t>(first_row(number)) * width + lane;
    const uint32_t to = linattn_tile::shared_address(lot(number) + lane);
#pragma unroll
    for (int i = 0; i < COPIES; ++i)
      if (lane + 32 * i < count) linattn_tile::copy_number_async(to + 128 * i, from + 32 * i, true);
    linattn_tile::copy_commit();
  }

  __device__ __forceinline__ void load_value() {
    const int64_t from = offset_of(p.value, at.batch, key_head, 0) + lane;
    load_all(value, p.dtype, [&](int t) { return Element{is_column(t) ? p.value.data : nullptr, from + 32 * t}; });
  }

  __device__ __forceinline__ void begin_round(int base) {
    first_query = at.head * args.group + base, heads = min(HEADS, args.group - base), takes = base == 0;
    keep = !takes || !p.log_decay ? 1.f : expf(p.log_decay[p.log_decay_per_token ? at.batch * p.state_heads + at.head : at.head]);
    for (int i = warp; i <= heads; i += WARPS) {
      const Vector vector[] = {i == heads ? key_of(p, at.batch, key_head, 0, fixed.key) : query_of(p, at.batch, first_query + i, 0, fixed.queries[i])};
      fetch(vector, p);
    }
    const int number = (THREADS - 1 - thread) / HEADS, h = thread % HEADS;  // by warps that fetch nothing
    if (number < 3 && h < heads) fixed.coefficients[number][h] = p.coefficients[number * p.query_heads + first_query + h];
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
      mass[h] = 0.f;
#pragma unroll
      for (int t = 0; t < SLICES; ++t) num[h][t] = 0.f;
    }
    row = first_row(0) + lane % 16, i = 0, j = row - p.head_dim - 1;
    if (j >= p.head_dim) {
      const int2 both = pair_of(j, p.head_dim);
      i = both.x, j = both.y;
    }
  }

  // psi(k) and phi(q) of the rows of a lot, [k, 1, k_i k_j] and [b q, a, c m_ij q_i q_j]: m_ij is 2 off the diagonal. A lane has a row and half of
  // the heads.
  __device__ __forceinline__ void make_features(int number) {
    constexpr int HALF = (HEADS + 1) / 2;
    const int dim = p.head_dim, first = lane / 16 * HALF, mine = lane % 16;
    if (mine < rows_in(number) && first < HEADS) {
      const float psi = !takes ? 0.f : j >= 0 ? fixed.key[i] * fixed.key[j] : row < dim ? fixed.key[row] : 1.f;
      const float one = lot(number)[mine * width + value_dim] * keep + psi;
      if (first == 0) {
        fixed.psi[warp][mine] = psi;
        if (takes) state[static_cast<int64_t>(row) * width + value_dim] = one;
      }
#pragma unroll
      for (int h = 0; h < HALF; ++h) {
        const float *const q = fixed.queries[first + h];
        const float c = fixed.coefficients[2][first + h];
        float phi = 0.f;
        if (first + h < heads) phi = j >= 0 ? c * (i == j ? 1.f : 2.f) * q[i] * q[j] : row < dim ? fixed.coefficients[1][first + h] * q[row] : fixed.coefficients[0][first + h];
        fixed.phi[warp][mine].of[first + h] = phi;
        mass[h] = fmaf(phi, one, mass[h]);
      }
    }
    row += ROWS, j += ROWS;
    for (; j >= dim; ++i) j += i + 1 - dim;
  }

  // The lot takes the token in, is written, and gives each head its part.
  __device__ __forceinline__ void multiply(int number) {
    const int count = rows_in(number);
    int u = 0;
    for (; u + 3 <= count; u += 3) multiply_rows<3>(number, u);
    for (; u < count; ++u) multiply_rows<1>(number, u);
  }
  template <int COUNT> __device__ __forceinline__ void multiply_rows(int number, int first) {
    const float *const from = lot(number) + first * width + lane;
    float *const to = state + static_cast<int64_t>(first_row(number) + first) * width + lane;
#pragma unroll
    for (int u = 0; u < COUNT; ++u) {
      const float of_key = fixed.psi[warp][first + u];
      const Heads of_queries = fixed.phi[warp][first + u];
      float x[SLICES];
#pragma unroll
      for (int t = 0; t < SLICES; ++t) {
        x[t] = is_column(t) ? fmaf(of_key, value[t], from[u * width + 32 * t] * keep) : 0.f;
        if (takes && is_column(t)) to[u * width + 32 * t] = x[t];
      }
#pragma unroll
      for (int h = 0; h < HEADS; ++h)
#pragma unroll
        for (int t = 0; t < SLICES; ++t) num[h][t] = fmaf(of_queries.of[h], x[t], num[h][t]);
    }
  }

  // Adds up the warps, in a fixed order, and divides; or leaves the sums to the second kernel.
  __device__ __forceinline__ void finish() {
    constexpr int HALF = (HEADS + 1) / 2;
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

template <int HEADS, int SLICES, bool WHOLE> __global__ void __launch_bounds__(THREADS, Step<HEADS, SLICES, WHOLE>::BLOCKS) step_kernel(const StepArguments args) {
  using Work = Step<HEADS, SLICES, WHOLE>;
  extern __shared__ __align__(16) float shared[];
  __shared__ typename Work::Fixed fixed;
  Work step(args, fixed, shared);
  if (!is_taken(args.problem, step.at.batch, 0)) return step.write_padding();
  for (int base = 0; base < args.group; base += HEADS) {
#pragma unroll 1
    for (int number = 0; number < MOST_LOTS; ++number) step.send_for(number);
    if (base == 0) step.load_value();
    step.begin_round(base);
    __syncthreads();
#pragma unroll 1
    for (int number = 0; step.rows_in(number) > 0; ++number) {
      linattn_tile::copy_wait<MOST_LOTS - 1>();
      __syncwarp();
      step.make_features(number);
      __syncwarp();
      step.multiply(number);
      __syncwarp();
      step.send_for(number + MOST_LOTS);
    }
    step.finish();
    __syncthreads();
  }
}

template <int HEADS, int SLICES, bool WHOLE> void launch_step(const StepArguments &args, cudaStream_t stream) {
  using Work = Step<HEADS, SLICES, WHOLE>;
  const auto kernel = step_kernel<HEADS, SLICES, WHOLE>;
  const int bytes = Work::shared_bytes(args);
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  kernel<<<blocks_of(args), THREADS, bytes, stream>>>(args);
}

template <int HEADS, int SLICES> void launch_slices(const StepArguments &args, cudaStream_t stream) {
  if (args.problem.value_dim == 32 * SLICES) launch_step<HEADS, SLICES, true>(args, stream);
  else launch_step<HEADS, SLICES, false>(args, stream);
}

template <int HEADS> void launch(const StepArguments &args, cudaStream_t stream) {
  const int dim = args.problem.value_dim;
  if (dim <= 32) launch_slices<HEADS, 1>(args, stream);
  else if (dim <= 64) launch_slices<HEADS, 2>(args, stream);
  else if (dim <= 128) launch_slices<HEADS, 4>(args, stream);
  else launch_step<HEADS, 8, false>(args, stream);
}

}  // namespace

bool decode_plan(const linattn_problem &problem, const linattn_forward_result &result, linattn_plan &plan) {
  if (problem.length != 1 || !problem.causal || !result.state || problem.dropout_p) return false;
  plan_splits(problem, splits_of(problem), plan);
  return true;
}

cudaError_t decode(const linattn_problem &problem, const linattn_forward_result &result, const linattn_plan &plan) {
  const cudaStream_t stream = static_cast<cudaStream_t>(problem.stream);
  const StepArguments args = step_arguments(problem, result, result.state, plan);
  if (args.group == 1) launch<1>(args, stream);
  else if (args.group == 2) launch<2>(args, stream);
  else if (args.group <= 4) launch<4>(args, stream);
  else launch<HEADS_AT_ONCE>(args, stream);
  return launch_join(args, stream);
}

}  // namespace linattn
