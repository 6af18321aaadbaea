// architectures: sm_80 compute_80 sm_90
// One new token a sequence. The state of each head is read once and written once, in place. A warp goes from one lot of its rows to the next by
// itself: several are on their way to shared memory while it makes the features of the one that is there and multiplies.
#include "decode.cuh"
#include "tile/instructions.cuh"

namespace linattn {
namespace {

constexpr int FEW = 4, MANY = 8;  // warps
constexpr int LOTS = 2;           // of a warp, on their way or at hand

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

// HEADS query heads at once, and the SLICES of 32 numbers that hold D and Dv, where WHOLE Dv is all of them: then a row's width is known to the compiler, and
// a state of few rows is not worth the instructions that find out where each begins. The last column of S, that of ones, is apart.
template <int HEADS, int SLICES, bool WHOLE, int WARPS> struct Step {
  static constexpr int THREADS = 32 * WARPS;
  static constexpr int EACH = SLICES <= 2 ? 9 : SLICES <= 4 ? 6 : 3;  // rows of a warp's lot: at D = 64 those of all warps are the whole first degree
  static constexpr int ROWS = WARPS * EACH;
  static constexpr int LOT = EACH * (32 * SLICES + 1), COPIES = (LOT + 31) / 32;
  static constexpr int TOGETHER = HEADS * SLICES <= 16 ? HEADS : 16 / SLICES;  // heads whose sums are added up at once
  static constexpr int BLOCKS = (HEADS * SLICES > 16 ? 2 : HEADS * SLICES > 8 ? 3 : 4) * MANY / WARPS;  // of a multiprocessor, by registers
  static constexpr int VECTORS = (HEADS + WARPS) / WARPS;  // queries, and the key behind them, that a warp fetches
  struct alignas(4 * HEADS) Heads {  // a number for each
    float of[HEADS];
  };
  struct Fixed {
    Heads phi[WARPS][EACH];
    float psi[WARPS][EACH], vectors[HEADS + 1][32 * SLICES], coefficients[3][HEADS], masses[WARPS][HEADS];
  };
  static constexpr int SUMS = WARPS * TOGETHER * 32 * SLICES;  // of all warps, where the lots were
  static int lots_of(const StepArguments &args) { return std::min(LOTS, (args.rows_each + ROWS - 1) / ROWS); }
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
  int row;                 // this lane's of the lot at hand,
  int left, right;         // and which elements its feature is the product of; before the first pair, right < 0

  __device__ __forceinline__ Step(const StepArguments &args, Fixed &fixed, float *shared)
      : args(args), p(args.problem), fixed(fixed), shared(shared), thread(threadIdx.x), warp(thread / 32), lane(thread % 32), key_head(key_head_of(args, at.head)),
        value_dim(WHOLE ? 32 * SLICES : p.value_dim), width(value_dim + 1), begin(at.split * args.rows_each), end(min(args.features, begin + args.rows_each)),
        state(args.after + (static_cast<int64_t>(at.batch) * p.state_heads + at.head) * args.features * width) {}

  __device__ __forceinline__ bool is_column(int slice) const { return WHOLE || lane + 32 * slice < value_dim; }
  __device__ __forceinline__ int first_row(int number) const { return begin + (number * WARPS + warp) * EACH; }
  __device__ __forceinline__ int rows_in(int number) const { return min(EACH, end - first_row(number)); }
  __device__ __forceinline__ float *lot(int number) const { return shared + (number % LOTS * WARPS + warp) * LOT; }

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
      for (int i = 0; i < COPIES; ++i)
        if (i + 1 < COPIES || LOT % 32 == 0 || lane < LOT % 32) linattn_tile::copy_number_async(to + 128 * i, from + 32 * i, true);
    } else {
#pragma unroll 1
      for (int i = 0; lane + i < count; i += 32) linattn_tile::copy_number_async(to + 4 * i, from + i, true);
    }
    linattn_tile::copy_commit();
  }

  // The token: all that is read of it is on its way before the first number is looked at.
  __device__ __forceinline__ void begin_round(int base) {
    first_query = at.head * args.group + base, heads = min(HEADS, args.group - base), takes = base == 0;
    const bool decays = takes && p.log_decay;
    const float rate = decays ? p.log_decay[p.log_decay_per_token ? at.batch * p.state_heads + at.head : at.head] : 0.f;
    const int number = (THREADS - 1 - thread) / HEADS, of_head = thread % HEADS;  // by warps that fetch the least
    const bool has_number = number < 3 && of_head < heads;
    const float of_f = has_number ? p.coefficients[number * p.query_heads + first_query + of_head] : 0.f;
    float scale[VECTORS], x[(VECTORS + 1) * SLICES];
    int64_t from[VECTORS + 1];
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      const int i = warp + v * WARPS;
      from[v] = lane + (i < heads ? offset_of(p.query, at.batch, first_query + i, 0) : offset_of(p.key, at.batch, key_head, 0));
      scale[v] = i < heads ? p.coefficients[3 * p.query_heads + first_query + i] : 1.f;
    }
    from[VECTORS] = lane + offset_of(p.value, at.batch, key_head, 0);
    load_all(x, p.dtype, [&](int n) {
      const int v = n / SLICES, i = warp + v * WARPS, slice = n % SLICES;
      const void *const data = v == VECTORS ? p.value.data : i < heads ? p.query.data : i == heads ? p.key.data : nullptr;
      return Element{lane + 32 * slice < (v == VECTORS ? value_dim : p.head_dim) ? data : nullptr, from[v] + 32 * slice};
    });
    keep = expf(rate);
    if (has_number) fixed.coefficients[number][of_head] = of_f;
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) put_down(warp + v * WARPS, x + v * SLICES, scale[v]);
#pragma unroll
    for (int t = 0; t < SLICES; ++t) value[t] = x[VECTORS * SLICES + t];
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
      mass[h] = 0.f;
#pragma unroll
      for (int t = 0; t < SLICES; ++t) num[h][t] = 0.f;
    }
    row = first_row(0) + lane % 16, left = 0, right = row - p.head_dim - 1;
    if (right >= p.head_dim) {
      const int2 both = pair_of(right, p.head_dim);
      left = both.x, right = both.y;
    }
  }
  // A query, or behind them the key, of unit length and multiplied, where all warps find it.
  __device__ __forceinline__ void put_down(int number, const float *x, float scale) const {
    constexpr float SMALLEST_SQUARE = 1e-24f;  // |x| <= 1e-12 has no direction: its unit vector is zero
    if (number > heads) return;
    if (p.normalize_qk) {
      float square = 0;
#pragma unroll
      for (int t = 0; t < SLICES; ++t) square += x[t] * x[t];
      square = warp_sum(square);
      scale *= square > SMALLEST_SQUARE ? linattn_tile::reciprocal_root(square) : 0.f;
    }
#pragma unroll
    for (int t = 0; t < SLICES; ++t) fixed.vectors[number < heads ? number : HEADS][lane + 32 * t] = x[t] * scale;
  }

  // psi(k) and phi(q) of the rows of a lot, [k, 1, k_i k_j] and [b q, a, c m_ij q_i q_j]: m_ij is 2 off the diagonal. A lane has a row and half of
  // the heads.
  __device__ __forceinline__ void make_features(int number) {
    constexpr int HALF = (HEADS + 1) / 2;
    const int dim = p.head_dim, first = lane / 16 * HALF, mine = lane % 16;
    if (mine < rows_in(number) && first < HEADS) {
      const float psi = !takes ? 0.f : right >= 0 ? fixed.vectors[HEADS][left] * fixed.vectors[HEADS][right] : row < dim ? fixed.vectors[HEADS][row] : 1.f;
      const float one = lot(number)[mine * width + value_dim] * keep + psi;
      if (first == 0) {
        fixed.psi[warp][mine] = psi;
        if (takes) state[static_cast<int64_t>(row) * width + value_dim] = one;
      }
#pragma unroll
      for (int h = 0; h < HALF; ++h) {
        const float *const q = fixed.vectors[first + h];
        const float c = fixed.coefficients[2][first + h];
        float phi = 0.f;
        if (first + h < heads)
          phi = right >= 0 ? c * (left == right ? 1.f : 2.f) * q[left] * q[right] : row < dim ? fixed.coefficients[1][first + h] * q[row] : fixed.coefficients[0][first + h];
        fixed.phi[warp][mine].of[first + h] = phi;
        mass[h] = fmaf(phi, one, mass[h]);
      }
    }
    row += ROWS, right += ROWS;
#pragma unroll 1
    for (; right >= dim && left < dim; ++left) right += left + 1 - dim;
  }

  // The lot takes the token in, is written, and gives each head its part.
  __device__ __forceinline__ void multiply(int number) {
    const int count = rows_in(number);
    int u = 0;
#pragma unroll 1
    for (; u + 3 <= count; u += 3) multiply_rows<3>(number, u);
#pragma unroll 1
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

template <int HEADS, int SLICES, bool WHOLE, int WARPS>
__global__ void __launch_bounds__(32 * WARPS, Step<HEADS, SLICES, WHOLE, WARPS>::BLOCKS) step_kernel(const StepArguments args) {
  using Work = Step<HEADS, SLICES, WHOLE, WARPS>;
  extern __shared__ __align__(16) float shared[];
  __shared__ typename Work::Fixed fixed;
  Work step(args, fixed, shared);
  const bool takes_in = is_taken(args.problem, step.at.batch, 0);
  for (int base = 0; base < args.group; base += HEADS) {
#pragma unroll 1
    for (int number = 0; number < LOTS; ++number) step.send_for(number);
    step.begin_round(base);
    if (!takes_in) {
      linattn_tile::copy_wait<0>();
      return step.write_padding();
    }
    __syncthreads();
#pragma unroll 1
    for (int number = 0; step.rows_in(number) > 0; ++number) {
      linattn_tile::copy_wait<LOTS - 1>();
      __syncwarp();
      step.make_features(number);
      __syncwarp();
      step.multiply(number);
      __syncwarp();
      step.send_for(number + LOTS);
    }
    step.finish();
    __syncthreads();
  }
}

template <int HEADS, int SLICES, bool WHOLE, int WARPS> cudaError_t launch_step(const StepArguments &args, cudaStream_t stream) {
  using Work = Step<HEADS, SLICES, WHOLE, WARPS>;
  const auto kernel = step_kernel<HEADS, SLICES, WHOLE, WARPS>;
  const int bytes = Work::shared_bytes(args);
  if (const cudaError_t failed = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)) return failed;
  kernel<<<blocks_of(args), Work::THREADS, bytes, stream>>>(args);
  return cudaPeekAtLastError();
}

// Where small states are many, what each of a block's warps must know first is most of the time.
bool by_few(const linattn_problem &p) { return p.degree == 1 && static_cast<int64_t>(p.batch) * p.state_heads > 4 * card(cudaDevAttrMultiProcessorCount, 108); }

template <int HEADS, int SLICES, int WARPS> cudaError_t launch_warps(const StepArguments &args, cudaStream_t stream) {
  return args.problem.value_dim == 32 * SLICES ? launch_step<HEADS, SLICES, true, WARPS>(args, stream) : launch_step<HEADS, SLICES, false, WARPS>(args, stream);
}

template <int HEADS> cudaError_t launch(const StepArguments &args, cudaStream_t stream) {
  const linattn_problem &p = args.problem;
  const int dim = std::max(p.head_dim, p.value_dim);
  if (dim <= 32) return by_few(p) ? launch_warps<HEADS, 1, FEW>(args, stream) : launch_warps<HEADS, 1, MANY>(args, stream);
  if (dim <= 64) return by_few(p) ? launch_warps<HEADS, 2, FEW>(args, stream) : launch_warps<HEADS, 2, MANY>(args, stream);
  if (dim <= 128) return by_few(p) ? launch_warps<HEADS, 4, FEW>(args, stream) : launch_warps<HEADS, 4, MANY>(args, stream);
  return launch_step<HEADS, 8, false, MANY>(args, stream);
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
  const auto launch_heads = args.group == 1 ? launch<1> : args.group == 2 ? launch<2> : args.group <= 4 ? launch<4> : launch<HEADS_AT_ONCE>;
  if (const cudaError_t failed = launch_heads(args, stream)) return failed;
  return launch_join(args, stream);
}

}  // namespace linattn
