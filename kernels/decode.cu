// architectures: sm_80 compute_80 sm_90
// One new token a sequence. The state of each head is read once and written once, in place: a block goes from one lot of rows to the next. It
// sends for the lot, makes the features of those rows meanwhile, and multiplies when both are there.
#include "decode.cuh"

namespace linattn {
namespace {

// HEADS query heads at once, and the SLICES of 32 columns that hold Dv, where WHOLE all of them: then a row's width is known to the compiler, and
// a state of few rows is not worth the instructions that find out where each begins. The last column of S, that of ones, is apart.
template <int HEADS, int SLICES, bool WHOLE> struct Step {
  static constexpr int EACH = SLICES <= 2 ? 9 : SLICES <= 4 ? 6 : 3;  // rows of a warp in a lot: at D = 64 one lot is the whole first degree
  static constexpr int ROWS = WARPS * EACH;
  static constexpr int TOGETHER = HEADS * SLICES <= 16 ? HEADS : 16 / SLICES;  // heads whose sums are added up at once
  struct Shared {
    float key[MAX_DIM], queries[HEADS][MAX_DIM], coefficients[3][HEADS];
    float psi[ROWS], phi[HEADS][ROWS];
    float sums[WARPS][TOGETHER][32 * SLICES], masses[WARPS][HEADS];
  };

  const StepArguments &args;
  const linattn_problem &p;
  Shared &shared;
  const int thread, warp, lane;
  const Place at;
  const int key_head, value_dim, width;
  float *const state;
  int first_query, heads;            // of this round
  bool takes;                        // whether it is the first one, which takes the token in; the others only read
  float keep;                        // exp(log_decay), and 1 in later rounds
  float value[SLICES], num[HEADS][SLICES], mass[HEADS];

  __device__ __forceinline__ Step(const StepArguments &args, Shared &shared)
      : args(args), p(args.problem), shared(shared), thread(threadIdx.x), warp(thread / 32), lane(thread % 32), key_head(key_head_of(args, at.head)),
        value_dim(WHOLE ? 32 * SLICES : p.value_dim), width(value_dim + 1), state(args.after + (static_cast<int64_t>(at.batch) * p.state_heads + at.head) * args.features * width) {
  }

  __device__ __forceinline__ bool is_column(int slice) const { return WHOLE || lane + 32 * slice < value_dim; }
  // This thread's element of the first row that its warp has in a lot, and that of its own row's last column.
  __device__ __forceinline__ float *own(int begin) const { return state + static_cast<int64_t>(begin + warp) * width + lane; }
  __device__ __forceinline__ float &one_of(int begin) const { return state[static_cast<int64_t>(begin + thread) * width + value_dim]; }

  // No new token: the state stays. With several blocks a state the second kernel writes.
  __device__ __forceinline__ void write_padding() const {
    if (args.splits > 1) return;
    for (int h = 0; h < args.group; ++h) {
      const int query_head = at.head * args.group + h;
      for (int i = thread; i < value_dim; i += THREADS) store(args.out.data, p.dtype, offset_of(args.out, at.batch, query_head, 0) + i, 0.f);
      if (thread == 0 && args.mass) args.mass[at.batch * p.query_heads + query_head] = 0.f;
    }
  }

  __device__ __forceinline__ void load_value() {
    const int64_t from = offset_of(p.value, at.batch, key_head, 0) + lane;
    load_all(value, p.dtype, [&](int t) { return Element{is_column(t) ? p.value.data : nullptr, from + 32 * t}; });
  }

  __device__ __forceinline__ void begin_round(int base) {
    first_query = at.head * args.group + base, heads = min(HEADS, args.group - base), takes = base == 0;
    keep = !takes || !p.log_decay ? 1.f : expf(p.log_decay[p.log_decay_per_token ? at.batch * p.state_heads + at.head : at.head]);
    __syncthreads();
    for (int i = warp; i <= heads; i += WARPS) {
      const Vector vector[] = {i == heads ? key_of(p, at.batch, key_head, 0, shared.key) : query_of(p, at.batch, first_query + i, 0, shared.queries[i])};
      fetch(vector, p);
    }
    const int number = (THREADS - 1 - thread) / HEADS, h = thread % HEADS;  // by warps that fetch nothing
    if (number < 3 && h < heads) shared.coefficients[number][h] = p.coefficients[number * p.query_heads + first_query + h];
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
      mass[h] = 0.f;
#pragma unroll
      for (int t = 0; t < SLICES; ++t) num[h][t] = 0.f;
    }
  }

  // psi(k) and phi(q) of a row, [k, 1, k_i k_j] and [b q, a, c m_ij q_i q_j]: m_ij is 2 off the diagonal.
  __device__ __forceinline__ void make_features(int row) const {
    const int dim = p.head_dim;
    int i = row, j = 0;
    if (row > dim) {
      const int2 pair = pair_of(row - dim - 1, dim);
      i = pair.x, j = pair.y;
    }
    shared.psi[thread] = !takes ? 0.f : row < dim ? shared.key[row] : row == dim ? 1.f : shared.key[i] * shared.key[j];
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
      const float *const q = shared.queries[h];
      const float a = shared.coefficients[0][h], b = shared.coefficients[1][h], c = shared.coefficients[2][h];
      shared.phi[h][thread] = h >= heads ? 0.f : row < dim ? b * q[row] : row == dim ? a : c * (i == j ? 1.f : 2.f) * q[i] * q[j];
    }
  }

  // A lot of rows on its way: this warp's, and of the column of ones one row a thread.
  struct Lot {
    float row[EACH][SLICES], one;
  };
  __device__ __forceinline__ void send_for(Lot &lot, int begin, int count) const {
    const float *const from = own(begin);
    const int left = count - warp;
#pragma unroll
    for (int u = 0; u < EACH; ++u)
#pragma unroll
      for (int t = 0; t < SLICES; ++t) lot.row[u][t] = u * WARPS < left && is_column(t) ? from[u * WARPS * width + 32 * t] : 0.f;
    lot.one = thread < count ? one_of(begin) : 0.f;
  }

  // The lot takes the token in, is written, and gives each head its part.
  __device__ __forceinline__ void multiply(Lot &lot, int begin, int count) {
    float *const to = own(begin);
    const int left = count - warp;
#pragma unroll
    for (int u = 0; u < EACH; ++u) {
      if (u * WARPS >= left) break;
      const float of_key = shared.psi[warp + u * WARPS];
#pragma unroll
      for (int t = 0; t < SLICES; ++t) {
        lot.row[u][t] = fmaf(of_key, value[t], lot.row[u][t] * keep);
        if (takes && is_column(t)) to[u * WARPS * width + 32 * t] = lot.row[u][t];
      }
#pragma unroll
      for (int h = 0; h < HEADS; ++h)
#pragma unroll
        for (int t = 0; t < SLICES; ++t) num[h][t] = fmaf(shared.phi[h][warp + u * WARPS], lot.row[u][t], num[h][t]);
    }
    if (thread >= count) return;
    const float one = lot.one * keep + shared.psi[thread];
    if (takes) one_of(begin) = one;
#pragma unroll
    for (int h = 0; h < HEADS; ++h) mass[h] += shared.phi[h][thread] * one;
  }

  // Adds up the warps, in a fixed order, and divides; or leaves the sums to the second kernel.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
      const float of_warp = warp_sum(mass[h]);
      if (lane == 0) shared.masses[warp][h] = of_warp;
    }
#pragma unroll
    for (int first = 0; first < HEADS; first += TOGETHER) {
#pragma unroll
      for (int h = 0; h < TOGETHER; ++h)
#pragma unroll
        for (int t = 0; t < SLICES; ++t) shared.sums[warp][h][lane + 32 * t] = num[first + h][t];
      __syncthreads();
      for (int i = thread; i < min(TOGETHER, heads - first) * 32 * SLICES; i += THREADS) write(first, i / (32 * SLICES), i % (32 * SLICES));
      if (first + TOGETHER < HEADS) __syncthreads();
    }
  }
  __device__ __forceinline__ void write(int first, int h, int column) const {
    if (!WHOLE && column >= value_dim) return;
    float sum = 0.f, total = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) sum += shared.sums[w][h][column], total += shared.masses[w][first + h];
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

template <int HEADS, int SLICES, bool WHOLE> __global__ void __launch_bounds__(THREADS) step_kernel(const StepArguments args) {
  using Work = Step<HEADS, SLICES, WHOLE>;
  __shared__ typename Work::Shared shared;
  Work step(args, shared);
  if (!is_taken(args.problem, step.at.batch, 0)) return step.write_padding();
  const int begin = step.at.split * args.rows_each, end = min(args.features, begin + args.rows_each);
  for (int base = 0; base < args.group; base += HEADS) {
    typename Work::Lot lot;
    step.send_for(lot, begin, min(Work::ROWS, end - begin));
    if (base == 0) step.load_value();
    step.begin_round(base);
    for (int rows = begin; rows < end; rows += Work::ROWS) {
      const int count = min(Work::ROWS, end - rows);
      __syncthreads();
      if (step.thread < count) step.make_features(rows + step.thread);
      __syncthreads();
      step.multiply(lot, rows, count);
      if (rows + Work::ROWS < end) step.send_for(lot, rows + Work::ROWS, min(Work::ROWS, end - rows - Work::ROWS));
    }
    step.finish();
  }
}

template <int HEADS, int SLICES> void launch_slices(const StepArguments &args, cudaStream_t stream) {
  if (args.problem.value_dim == 32 * SLICES) step_kernel<HEADS, SLICES, true><<<blocks_of(args), THREADS, 0, stream>>>(args);
  else step_kernel<HEADS, SLICES, false><<<blocks_of(args), THREADS, 0, stream>>>(args);
}

template <int HEADS> void launch(const StepArguments &args, cudaStream_t stream) {
  const int dim = args.problem.value_dim;
  if (dim <= 32) launch_slices<HEADS, 1>(args, stream);
  else if (dim <= 64) launch_slices<HEADS, 2>(args, stream);
  else if (dim <= 128) launch_slices<HEADS, 4>(args, stream);
  else step_kernel<HEADS, 8, false><<<blocks_of(args), THREADS, 0, stream>>>(args);
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
