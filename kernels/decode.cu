// architectures: sm_80 compute_80 sm_90
// One new token a sequence. The state S (F, Dv + 1) of each head is read once, takes the token in and is written once, in place:
//   S <- exp(log_decay) S + psi(k) [v, 1]^T,   num_h = phi_h(q)^T S for each query head h of the state,   out_h = num_h / (its last element).
// A warp takes rows of S, a lane its columns. A block goes from one lot of rows to the next: it sends for the lot, makes the features of those
// rows meanwhile, and multiplies when both are there. Where heads are few and rows many (the second degree), several blocks share a state's
// rows, and a second kernel adds up what they found, in a fixed order.
#include <algorithm>

#include "card.h"
#include "generic/job.cuh"
#include "plan.h"

namespace linattn {
namespace {

constexpr int WARPS = THREADS / 32, HEADS_AT_ONCE = 8;
constexpr float SMALLEST_SQUARE = 1e-24f;     // |x| <= 1e-12 has no direction: its unit vector is zero
constexpr int FEWEST_ROWS = 64;               // that are worth a block of their own

struct StepArguments {
  linattn_problem problem;
  linattn_tensor out;
  float *state, *mass, *partials;  // partials: (batch, query_heads, splits, value_dim + 1), with several blocks a state
  int32_t features, splits, rows_each;
};

int feature_count(const linattn_problem &p) { return p.head_dim + 1 + (p.degree == 2 ? p.head_dim * (p.head_dim + 1) / 2 : 0); }

int splits_of(const linattn_problem &p) {
  const int64_t heads = static_cast<int64_t>(p.batch) * p.state_heads, blocks = 4 * static_cast<int64_t>(card(cudaDevAttrMultiProcessorCount, 108));
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(blocks / heads, feature_count(p) / FEWEST_ROWS)));
}

__device__ float warp_sum(float x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

__device__ bool is_padding(const linattn_problem &p, int batch) { return p.key_segments && p.key_segments[batch * p.key_segments_stride] <= 0; }

// A vector times `scale`, of unit length first where that is asked for, into shared memory by one warp.
__device__ void fetch(float *to, const linattn_problem &p, const linattn_tensor &x, int batch, int head, float scale) {
  const int lane = threadIdx.x % 32;
  float square = 0;
  for (int i = lane; i < p.head_dim; i += 32) {
    const float element = load(x.data, p.dtype, offset_of(x, batch, head, 0) + i);
    to[i] = element, square += element * element;
  }
  square = warp_sum(square);
  if (p.normalize_qk) scale *= square > SMALLEST_SQUARE ? 1.f / sqrtf(square) : 0.f;
  for (int i = lane; i < p.head_dim; i += 32) to[i] *= scale;
}

// HEADS query heads at once, and the SLICES of 32 columns that hold Dv; the last column of S, that of ones, is apart.
template <int HEADS, int SLICES> struct Step {
  static constexpr int EACH = SLICES <= 2 ? 9 : SLICES <= 4 ? 6 : 3;  // rows of a warp in a lot: at D = 64 one lot is the whole first degree
  static constexpr int ROWS = WARPS * EACH;
  static constexpr int TOGETHER = HEADS * SLICES <= 16 ? HEADS : 16 / SLICES;  // heads whose sums are added up at once
  struct Shared {
    float key[MAX_DIM], queries[HEADS][MAX_DIM];
    float psi[ROWS], phi[HEADS][ROWS];
    float sums[WARPS][TOGETHER][32 * SLICES], masses[WARPS][HEADS];
  };

  const StepArguments &args;
  const linattn_problem &p;
  Shared &shared;
  const int thread, warp, lane;
  const int split, head, batch, width;
  float *const state;
  int first_query, heads;            // of this round
  float keep, take;                  // exp(log_decay) and 1, and in later rounds 1 and 0
  float num[HEADS][SLICES], mass[HEADS];

  __device__ __forceinline__ Step(const StepArguments &args, Shared &shared)
      : args(args), p(args.problem), shared(shared), thread(threadIdx.x), warp(thread / 32), lane(thread % 32), split(blockIdx.x % args.splits),
        head(blockIdx.x / args.splits % p.state_heads), batch(blockIdx.x / args.splits / p.state_heads), width(p.value_dim + 1),
        state(args.state + (static_cast<int64_t>(batch) * p.state_heads + head) * args.features * width) {}

  __device__ __forceinline__ int group() const { return p.query_heads / p.state_heads; }
  __device__ __forceinline__ int key_head() const { return head / (p.state_heads / p.key_heads); }
  __device__ __forceinline__ bool is_column(int slice) const { return lane + 32 * slice < p.value_dim; }
  __device__ __forceinline__ float &element(int row, int column) const { return state[static_cast<int64_t>(row) * width + column]; }

  // No new token: the state stays. With several blocks a state the second kernel writes.
  __device__ __forceinline__ void write_padding() const {
    if (args.splits > 1) return;
    const int first = head * group();
    for (int i = thread; i < group() * p.value_dim; i += THREADS) store(args.out.data, p.dtype, offset_of(args.out, batch, first + i / p.value_dim, 0) + i % p.value_dim, 0.f);
    for (int i = thread; args.mass && i < group(); i += THREADS) args.mass[batch * p.query_heads + first + i] = 0.f;
  }

  // The first round takes the token in, the others only read.
  __device__ __forceinline__ void begin_round(int base) {
    first_query = head * group() + base, heads = min(HEADS, group() - base);
    keep = base || !p.log_decay ? 1.f : expf(p.log_decay[p.log_decay_per_token ? batch * p.state_heads + head : head]), take = base ? 0.f : 1.f;
    __syncthreads();
    for (int i = warp; i <= heads; i += WARPS) {
      if (i == heads) fetch(shared.key, p, p.key, batch, key_head(), 1.f);
      else fetch(shared.queries[i], p, p.query, batch, first_query + i, p.coefficients[3 * p.query_heads + first_query + i]);
    }
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
    shared.psi[thread] = row < dim ? shared.key[row] : row == dim ? 1.f : shared.key[i] * shared.key[j];
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
      if (h >= heads) continue;
      const float *const a = p.coefficients + first_query + h, *const b = a + p.query_heads, *const c = b + p.query_heads, *const q = shared.queries[h];
      shared.phi[h][thread] = row < dim ? *b * q[row] : row == dim ? *a : *c * (i == j ? 1.f : 2.f) * q[i] * q[j];
    }
  }

  // A lot of rows on its way: this warp's, and of the column of ones one row a thread.
  struct Lot {
    float row[EACH][SLICES], one;
  };
  __device__ __forceinline__ void send_for(Lot &lot, int begin, int count) const {
#pragma unroll
    for (int u = 0; u < EACH; ++u)
#pragma unroll
      for (int t = 0; t < SLICES; ++t) lot.row[u][t] = warp + u * WARPS < count && is_column(t) ? element(begin + warp + u * WARPS, lane + 32 * t) : 0.f;
    lot.one = thread < count ? element(begin + thread, p.value_dim) : 0.f;
  }

  // The lot takes the token in, is written, and gives each head its part.
  __device__ __forceinline__ void multiply(Lot &lot, int begin, int count, const float (&value)[SLICES]) {
#pragma unroll
    for (int u = 0; u < EACH; ++u) {
      const int at = warp + u * WARPS;
      if (at >= count) break;
      const float of_key = take * shared.psi[at];
#pragma unroll
      for (int t = 0; t < SLICES; ++t) {
        lot.row[u][t] = lot.row[u][t] * keep + of_key * value[t];
        if (take != 0.f && is_column(t)) element(begin + at, lane + 32 * t) = lot.row[u][t];
      }
#pragma unroll
      for (int h = 0; h < HEADS; ++h)
#pragma unroll
        for (int t = 0; t < SLICES; ++t)
          if (h < heads) num[h][t] += shared.phi[h][at] * lot.row[u][t];
    }
    if (thread >= count) return;
    const float one = lot.one * keep + take * shared.psi[thread];
    if (take != 0.f) element(begin + thread, p.value_dim) = one;
#pragma unroll
    for (int h = 0; h < HEADS; ++h)
      if (h < heads) mass[h] += shared.phi[h][thread] * one;
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
      __syncthreads();
    }
  }
  __device__ __forceinline__ void write(int first, int h, int column) const {
    if (column >= p.value_dim) return;
    float sum = 0.f, total = 0.f;
    for (int w = 0; w < WARPS; ++w) sum += shared.sums[w][h][column], total += shared.masses[w][first + h];
    const int query_head = first_query + first + h;
    const int64_t number = static_cast<int64_t>(batch) * p.query_heads + query_head;
    if (args.splits > 1) {
      float *const part = args.partials + (number * args.splits + split) * width;
      part[column] = sum;
      if (column == 0) part[p.value_dim] = total;
      return;
    }
    store(args.out.data, p.dtype, offset_of(args.out, batch, query_head, 0) + column, sum / (total == 0.f ? 1.f : total));
    if (column == 0 && args.mass) args.mass[number] = total;
  }
};

template <int HEADS, int SLICES> __global__ void __launch_bounds__(THREADS) step_kernel(const StepArguments args) {
  __shared__ typename Step<HEADS, SLICES>::Shared shared;
  Step<HEADS, SLICES> step(args, shared);
  const linattn_problem &p = args.problem;
  if (is_padding(p, step.batch)) return step.write_padding();
  float value[SLICES];
#pragma unroll
  for (int t = 0; t < SLICES; ++t) value[t] = step.is_column(t) ? load(p.value.data, p.dtype, offset_of(p.value, step.batch, step.key_head(), 0) + step.lane + 32 * t) : 0.f;
  const int begin = step.split * args.rows_each, end = min(args.features, begin + args.rows_each);
  constexpr int ROWS = Step<HEADS, SLICES>::ROWS;
  for (int base = 0; base < step.group(); base += HEADS) {
    typename Step<HEADS, SLICES>::Lot lot;
    step.send_for(lot, begin, min(ROWS, end - begin));
    step.begin_round(base);
    for (int rows = begin; rows < end; rows += ROWS) {
      const int count = min(ROWS, end - rows);
      __syncthreads();
      if (step.thread < count) step.make_features(rows + step.thread);
      __syncthreads();
      step.multiply(lot, rows, count, value);
      if (rows + ROWS < end) step.send_for(lot, rows + ROWS, min(ROWS, end - rows - ROWS));
    }
    step.finish();
  }
}

__global__ void __launch_bounds__(THREADS) join_kernel(const StepArguments args) {
  const linattn_problem &p = args.problem;
  __shared__ float total;
  const int head = blockIdx.x % p.query_heads, batch = blockIdx.x / p.query_heads, width = p.value_dim + 1;
  const bool padding = is_padding(p, batch);
  const float *const parts = args.partials + static_cast<int64_t>(blockIdx.x) * args.splits * width;
  const auto sum = [&](int i) {
    float all = 0;
    for (int split = 0; split < args.splits; ++split) all += parts[split * width + i];
    return all;
  };
  if (threadIdx.x == 0) {
    total = padding ? 0.f : sum(p.value_dim);
    if (args.mass) args.mass[blockIdx.x] = total;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < p.value_dim; i += THREADS)
    store(args.out.data, p.dtype, offset_of(args.out, batch, head, 0) + i, padding ? 0.f : sum(i) / (total == 0.f ? 1.f : total));
}

template <int HEADS> void launch(const StepArguments &args, int blocks, cudaStream_t stream) {
  const int dim = args.problem.value_dim;
  if (dim <= 32) step_kernel<HEADS, 1><<<blocks, THREADS, 0, stream>>>(args);
  else if (dim <= 64) step_kernel<HEADS, 2><<<blocks, THREADS, 0, stream>>>(args);
  else if (dim <= 128) step_kernel<HEADS, 4><<<blocks, THREADS, 0, stream>>>(args);
  else step_kernel<HEADS, 8><<<blocks, THREADS, 0, stream>>>(args);
}

}  // namespace

bool decode_plan(const linattn_problem &problem, const linattn_forward_result &result, linattn_plan &plan) {
  if (problem.length != 1 || !problem.causal || !result.state || problem.dropout_p) return false;
  const int features = feature_count(problem);
  plan.segments = splits_of(problem), plan.chunk = (features + plan.segments - 1) / plan.segments;  // of the state's rows here
  plan.workspace_bytes = plan.segments == 1 ? 0 : 4 * static_cast<int64_t>(problem.batch) * problem.query_heads * plan.segments * (problem.value_dim + 1);
  return true;
}

cudaError_t decode(const linattn_problem &problem, const linattn_forward_result &result, const linattn_plan &plan) {
  const cudaStream_t stream = static_cast<cudaStream_t>(problem.stream);
  const StepArguments args{
      problem, result.out, result.state, result.mass, static_cast<float *>(problem.workspace), feature_count(problem), plan.segments, static_cast<int32_t>(plan.chunk)};
  const int blocks = problem.batch * problem.state_heads * args.splits, group = problem.query_heads / problem.state_heads;
  if (group == 1) launch<1>(args, blocks, stream);
  else if (group == 2) launch<2>(args, blocks, stream);
  else if (group <= 4) launch<4>(args, blocks, stream);
  else launch<HEADS_AT_ONCE>(args, blocks, stream);
  if (const cudaError_t failed = cudaPeekAtLastError()) return failed;
  if (args.splits > 1) join_kernel<<<problem.batch * problem.query_heads, THREADS, 0, stream>>>(args);
  return cudaPeekAtLastError();
}

}  // namespace linattn
