// architectures: sm_80 compute_80 sm_90
// Up to 16 new tokens a sequence, as chunks of a prompt, drafts that are verified and the turns of a conversation bring them. What is computed,
// and in which order, is what single tokens one after the other compute, but the state comes from memory once and goes back once.
//
// A block's rows of the state lie in shared memory, where no thread needs another's elements. TOGETHER tokens at a time are taken in: their
// vectors, the features of the block's rows, each row through these tokens in registers, and the sums of the warps.
#include "decode.cuh"
#include "tile/instructions.cuh"

namespace linattn {
namespace {

constexpr int MOST_TOKENS = 16, MOST_SHARED = 96 << 10;  // bytes: a block on the smaller cards, two on Hopper

// How many tokens: each has HEADS sums and a value for each of a thread's SLICES columns, in registers.
constexpr int together(int heads, int slices) {
  int tokens = 8;
  while (tokens > 1 && (tokens * slices * (heads + 1) > 72 || tokens * heads > 32)) tokens /= 2;
  return tokens;
}

// Between vectors in shared memory: each ends with a 1, and the same element of several lies in different banks.
__host__ __device__ constexpr int pitch_of(int dim, int tokens) { return (dim + 32) / 32 * 32 + 32 / tokens; }

// COUNT numbers in as few reads or writes as there are fours of them.
template <int COUNT> __device__ __forceinline__ void load_row(float (&to)[COUNT], const float *from) {
  if constexpr (COUNT % 4 == 0) {
#pragma unroll
    for (int i = 0; i < COUNT; i += 4) {
      const float4 four = *reinterpret_cast<const float4 *>(from + i);
      to[i] = four.x, to[i + 1] = four.y, to[i + 2] = four.z, to[i + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) to[i] = from[i];
  }
}
template <int COUNT> __device__ __forceinline__ void store_row(float *to, const float (&from)[COUNT]) {
  if constexpr (COUNT % 4 == 0) {
#pragma unroll
    for (int i = 0; i < COUNT; i += 4) *reinterpret_cast<float4 *>(to + i) = make_float4(from[i], from[i + 1], from[i + 2], from[i + 3]);
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) to[i] = from[i];
  }
}

// HEADS query heads at once, and the SLICES of 32 columns that hold Dv; the last column of S, that of ones, is a register of the row's thread.
template <int HEADS, int SLICES> struct Tokens {
  static constexpr int TOGETHER = together(HEADS, SLICES), PAIRS = TOGETHER * HEADS, WIDTH = 32 * SLICES;
  static constexpr int SUMMED = PAIRS * SLICES <= 16 ? PAIRS : 16 / SLICES;  // pairs of a token and a head whose sums are added up at once
  static constexpr int READ = HEADS >= 4 ? 1 : 4 / HEADS;                    // tokens whose features are read at once
  static constexpr int AT_ONCE = 2;  // vectors that a warp has on their way
  static constexpr int ROW_BYTES = 4 * (WIDTH + PAIRS + TOGETHER + 1);
  static_assert(PAIRS % SUMMED == 0 && TOGETHER % READ == 0 && PAIRS % 4 == 0);
  struct Fixed {
    alignas(16) float keep[TOGETHER];  // exp(log_decay), and 0 where a run begins
    bool taken[TOGETHER], seeing[TOGETHER];
    float coefficients[HEADS][3];
    float masses[WARPS][PAIRS];
  };
  // Vectors until the features are made, and then sums.
  static __host__ __device__ constexpr int scratch(int dim) {
    const int vectors = TOGETHER * (HEADS + 1) * pitch_of(dim, TOGETHER), sums = WARPS * SUMMED * WIDTH;
    return vectors > sums ? vectors : sums;
  }
  static constexpr int most_rows(int dim) {
    const int rows = (MOST_SHARED - static_cast<int>(sizeof(Fixed)) - 4 * (TOGETHER * WIDTH + scratch(dim))) / ROW_BYTES;
    return rows < THREADS ? rows : THREADS;
  }
  static constexpr int shared_bytes(int dim, int rows) { return 4 * (TOGETHER * WIDTH + scratch(dim)) + rows * ROW_BYTES; }

  const StepArguments &args;
  const linattn_problem &p;
  Fixed &fixed;
  const int thread, warp, lane;
  const Place at;
  const int key_head, width, pitch;
  const int begin, rows, tokens;
  const int64_t first_element;               // of the block's rows, in the state
  float *const state, *const phi, *const psi, *const values, *const vectors, *const sums;
  short2 *const factors;                     // a row's feature is the product of two elements of a vector that ends with a 1
  int first_query, heads;                    // of this round
  int first, count;                          // tokens that are taken in together
  float one;
  float value[TOGETHER * SLICES], num[PAIRS][SLICES];

  __device__ __forceinline__ Tokens(const StepArguments &args, Fixed &fixed, float *shared)
      : args(args), p(args.problem), fixed(fixed), thread(threadIdx.x), warp(thread / 32), lane(thread % 32), key_head(key_head_of(args, at.head)), width(p.value_dim + 1),
        pitch(pitch_of(p.head_dim, TOGETHER)), begin(at.split * args.rows_each), rows(max(0, min(args.features - begin, args.rows_each))), tokens(static_cast<int>(p.length)),
        first_element(((static_cast<int64_t>(at.batch) * p.state_heads + at.head) * args.features + begin) * width), state(shared), phi(state + args.rows_each * WIDTH),
        psi(phi + args.rows_each * PAIRS), values(psi + args.rows_each * TOGETHER), vectors(values + TOGETHER * WIDTH), sums(vectors),
        factors(reinterpret_cast<short2 *>(vectors + scratch(p.head_dim))) {}

  __device__ __forceinline__ bool is_column(int slice) const { return lane + 32 * slice < p.value_dim; }
  __device__ __forceinline__ int64_t element(int row, int column) const { return first_element + static_cast<int64_t>(row) * width + column; }

  // A token's query of a head, or, behind all heads, its key.
  __device__ __forceinline__ float *vector(int head, int token) const { return vectors + (head * TOGETHER + token) * pitch; }

  // Which elements of a vector the features are: k_i, 1 and k_i k_j.
  __device__ __forceinline__ void find_factors() const {
    const int dim = p.head_dim, row = begin + thread;
    if (thread >= rows) return;
    int2 pair = make_int2(min(row, dim), dim);
    if (row > dim) pair = pair_of(row - dim - 1, dim);
    factors[thread] = make_short2(pair.x, pair.y);
  }

  // Every round of heads begins with the state before the tokens; the last one leaves that behind them.
  __device__ __forceinline__ void begin_round(int base) {
    first_query = at.head * args.group + base, heads = min(HEADS, args.group - base);
    for (int row = warp; row < rows; row += WARPS)
#pragma unroll
      for (int s = 0; s < SLICES; ++s) {
        float *const at = state + row * WIDTH + lane + 32 * s;
        if (!args.before) *at = 0.f;
        else linattn_tile::copy_number_async(linattn_tile::shared_address(at), args.before + element(row, is_column(s) ? lane + 32 * s : 0), is_column(s));
      }
    linattn_tile::copy_commit();
    one = args.before && thread < rows ? args.before[element(thread, p.value_dim)] : 0.f;
    for (int i = thread; i < 3 * heads; i += THREADS) fixed.coefficients[i / 3][i % 3] = p.coefficients[i % 3 * p.query_heads + first_query + i / 3];
  }

  // The next tokens: what is said of them, and their keys, queries and values in shared memory.
  __device__ __forceinline__ void gather(int token) {
    first = token, count = min(TOGETHER, tokens - token);
    if (thread < count) {
      const int place = first + thread, state_head = at.batch * p.state_heads + at.head;
      const bool begins = place > 0 && run_of(p, at.batch, place) != run_of(p, at.batch, place - 1);
      const float rate = !p.log_decay ? 0.f : p.log_decay_per_token ? p.log_decay[static_cast<int64_t>(state_head) * tokens + place] : p.log_decay[at.head];
      fixed.keep[thread] = begins ? 0.f : expf(rate);
      fixed.taken[thread] = is_taken(p, at.batch, place), fixed.seeing[thread] = sees(p, at.batch, place);
    }
    for (int i = warp; i < TOGETHER * (HEADS + 2); i += WARPS * AT_ONCE) fetch_some(i);
  }
  // Every WARPSth vector from `next` on, AT_ONCE of them: TOGETHER queries of each head, and behind them the keys and the values.
  __device__ __forceinline__ void fetch_some(int next) const {
    Vector some[AT_ONCE];
#pragma unroll
    for (int v = 0; v < AT_ONCE; ++v) {
      const int t = (next + v * WARPS) % TOGETHER, h = (next + v * WARPS) / TOGETHER;
      some[v].to = nullptr;
      if (t >= count || h > HEADS + 1 || (h >= heads && h < HEADS)) continue;
      if (h > HEADS) {
        const void *const from = is_taken(p, at.batch, first + t) ? p.value.data : nullptr;
        some[v] = {from, offset_of(p.value, at.batch, key_head, first + t), p.value_dim, false, 1.f, values + t * WIDTH};
        continue;
      }
      some[v] = h == HEADS ? key_of(p, at.batch, key_head, first + t, vector(h, t)) : query_of(p, at.batch, first_query + h, first + t, vector(h, t));
      if (lane == 0) some[v].to[p.head_dim] = 1.f;
    }
    fetch(some, p);
  }

  __device__ __forceinline__ float weight(const float *coefficients, short2 factor) const {
    if (factor.y < p.head_dim) return factor.x == factor.y ? coefficients[2] : 2.f * coefficients[2];
    return factor.x < p.head_dim ? coefficients[1] : coefficients[0];
  }

  // psi(k) and phi(q) of every row and token, [k, 1, k_i k_j] and [b q, a, c m_ij q_i q_j]: m_ij is 2 off the diagonal.
  __device__ __forceinline__ void make_features() const {
    for (int i = thread; i < rows * TOGETHER; i += THREADS) {
      const int row = i / TOGETHER, t = i % TOGETHER;
      if (t >= count) continue;
      const short2 factor = factors[row];
      const float *const key = vector(HEADS, t);
      psi[i] = fixed.taken[t] ? key[factor.x] * key[factor.y] : 0.f;
      float of_queries[HEADS];
#pragma unroll
      for (int h = 0; h < HEADS; ++h) {
        const float *const query = vector(h, t), *const f = fixed.coefficients[h];
        of_queries[h] = 0.f;
        if (h < heads) of_queries[h] = weight(f, factor) * query[factor.x] * query[factor.y];
      }
      store_row<HEADS>(phi + i * HEADS, of_queries);
    }
  }

  // Each row takes these tokens in, gives each head its part of every one, and waits for the next ones; or is written behind the last.
  __device__ __forceinline__ void multiply(bool is_last) {
#pragma unroll
    for (int i = 0; i < TOGETHER * SLICES; ++i) value[i] = i / SLICES < count && is_column(i % SLICES) ? values[lane + 32 * i] : 0.f;
#pragma unroll
    for (int i = 0; i < PAIRS; ++i)
#pragma unroll
      for (int s = 0; s < SLICES; ++s) num[i][s] = 0.f;
#pragma unroll 1
    for (int row = warp; row < rows; row += WARPS) {
      float *const own = state + row * WIDTH + lane;
      float x[SLICES];
#pragma unroll
      for (int s = 0; s < SLICES; ++s) x[s] = own[32 * s];
      take_in(x, row);
      if (is_last && !args.after) continue;
#pragma unroll
      for (int s = 0; s < SLICES; ++s) {
        if (!is_last) own[32 * s] = x[s];
        else if (is_column(s)) args.after[element(row, lane + 32 * s)] = x[s];
      }
    }
    take_in_ones(is_last);
  }
  __device__ __forceinline__ void take_in(float (&x)[SLICES], int row) {
#pragma unroll
    for (int next = 0; next < TOGETHER; next += READ) {
      if (next >= count) break;
      float of_queries[READ * HEADS], of_keys[READ], keep[READ];
      load_row(of_queries, phi + (row * TOGETHER + next) * HEADS), load_row(of_keys, psi + row * TOGETHER + next), load_row(keep, fixed.keep + next);
#pragma unroll
      for (int t = next; t < next + READ; ++t) {
        if (t >= count) break;
#pragma unroll
        for (int s = 0; s < SLICES; ++s) {
          x[s] = fmaf(of_keys[t - next], value[t * SLICES + s], x[s] * keep[t - next]);
#pragma unroll
          for (int h = 0; h < HEADS; ++h) num[t * HEADS + h][s] = fmaf(of_queries[(t - next) * HEADS + h], x[s], num[t * HEADS + h][s]);
        }
      }
    }
  }
  __device__ __forceinline__ void take_in_ones(bool is_last) {
    const bool has_row = thread < rows;
#pragma unroll
    for (int t = 0; t < TOGETHER; ++t) {
      if (t >= count) break;
      if (has_row) one = fmaf(psi[thread * TOGETHER + t], 1.f, one * fixed.keep[t]);
#pragma unroll
      for (int h = 0; h < HEADS; ++h) {
        const float of_warp = warp_sum(has_row ? phi[(thread * TOGETHER + t) * HEADS + h] * one : 0.f);
        if (lane == 0) fixed.masses[warp][t * HEADS + h] = of_warp;
      }
    }
    if (is_last && args.after && has_row) args.after[element(thread, p.value_dim)] = one;
  }

  // Adds up the warps, in a fixed order, and divides; or leaves the sums to the second kernel.
  __device__ __forceinline__ void finish() const {
#pragma unroll
    for (int pair = 0; pair < PAIRS; pair += SUMMED) {
      if (pair >= count * HEADS) break;
#pragma unroll
      for (int i = 0; i < SUMMED; ++i)
#pragma unroll
        for (int s = 0; s < SLICES; ++s) sums[(warp * SUMMED + i) * WIDTH + lane + 32 * s] = num[pair + i][s];
      __syncthreads();
      for (int i = thread; i < SUMMED * WIDTH; i += THREADS) write(pair, i / WIDTH, i % WIDTH);
      __syncthreads();
    }
  }
  __device__ __forceinline__ void write(int first_pair, int number_of_pair, int column) const {
    const int pair = first_pair + number_of_pair, t = pair / HEADS, h = pair % HEADS, query_head = first_query + h;
    if (t >= count || h >= heads || column >= p.value_dim) return;
    float sum = 0.f, total = 0.f;
    for (int w = 0; w < WARPS; ++w) sum += sums[(w * SUMMED + number_of_pair) * WIDTH + column], total += fixed.masses[w][pair];
    const int64_t number = (static_cast<int64_t>(at.batch) * p.query_heads + query_head) * tokens + first + t;
    if (args.splits > 1) {
      float *const part = args.partials + (number * args.splits + at.split) * width;
      part[column] = sum;
      if (column == 0) part[p.value_dim] = total;
      return;
    }
    const float mass = fixed.seeing[t] ? total : 0.f;
    store(args.out.data, p.dtype, offset_of(args.out, at.batch, query_head, first + t) + column, mass == 0.f ? 0.f : sum / mass);
    if (column == 0 && args.mass) args.mass[number] = mass;
  }
};

template <int HEADS, int SLICES> __global__ void __launch_bounds__(THREADS, HEADS *SLICES <= 2 ? 3 : SLICES < 8 ? 2 : 1) tokens_kernel(const StepArguments args) {
  using Work = Tokens<HEADS, SLICES>;
  extern __shared__ __align__(16) float shared[];
  __shared__ typename Work::Fixed fixed;
  Work work(args, fixed, shared);
  work.find_factors();
  for (int base = 0; base < args.group; base += HEADS) {
    const bool is_last_round = base + HEADS >= args.group;
    work.begin_round(base);
    for (int token = 0; token < work.tokens; token += Work::TOGETHER) {
      work.gather(token);
      __syncthreads();
      work.make_features();
      linattn_tile::copy_wait<0>();
      __syncthreads();
      work.multiply(is_last_round && token + Work::TOGETHER >= work.tokens);
      work.finish();
    }
  }
}

// The kernel for a call: how many rows a block can have, the shared memory it asks for, and its launch.
struct Kernel {
  int (*most_rows)(int dim);
  int (*shared_bytes)(int dim, int rows);
  void (*kernel)(StepArguments);
};
template <int HEADS, int SLICES> Kernel kernel_of() { return {Tokens<HEADS, SLICES>::most_rows, Tokens<HEADS, SLICES>::shared_bytes, tokens_kernel<HEADS, SLICES>}; }
template <int HEADS> Kernel kernel_of(int dim) {
  return dim <= 32 ? kernel_of<HEADS, 1>() : dim <= 64 ? kernel_of<HEADS, 2>() : dim <= 128 ? kernel_of<HEADS, 4>() : kernel_of<HEADS, 8>();
}
Kernel kernel_of(const linattn_problem &p) {
  const int group = p.query_heads / p.state_heads;
  return group == 1 ? kernel_of<1>(p.value_dim) : group == 2 ? kernel_of<2>(p.value_dim) : group <= 4 ? kernel_of<4>(p.value_dim) : kernel_of<HEADS_AT_ONCE>(p.value_dim);
}

bool plan_tokens(const linattn_problem &problem, linattn_plan &plan) {
  if (problem.length > MOST_TOKENS || !problem.causal || problem.dropout_p) return false;
  const Kernel kernel = kernel_of(problem);
  const int most = kernel.most_rows(problem.head_dim);
  plan_splits(problem, std::max(splits_of(problem), (feature_count(problem) + most - 1) / most), plan);
  plan.shared_bytes = kernel.shared_bytes(problem.head_dim, static_cast<int>(plan.chunk));
  return true;
}

cudaError_t run_tokens(const linattn_problem &problem, const linattn_forward_result &result, const float *before, const linattn_plan &plan) {
  const cudaStream_t stream = static_cast<cudaStream_t>(problem.stream);
  const StepArguments args = step_arguments(problem, result, before, plan);
  const auto kernel = kernel_of(problem).kernel;
  if (const cudaError_t failed = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes)) return failed;
  kernel<<<blocks_of(args), THREADS, plan.shared_bytes, stream>>>(args);
  return launch_join(args, stream);
}

}  // namespace

bool tokens_plan_forward(const linattn_problem &problem, const linattn_forward_result &result, linattn_plan &plan) {
  return (problem.initial_state || result.state) && plan_tokens(problem, plan);
}
bool tokens_plan_step(const linattn_problem &problem, const linattn_forward_result &result, linattn_plan &plan) { return result.state && plan_tokens(problem, plan); }

cudaError_t tokens_forward(const linattn_problem &problem, const linattn_forward_result &result, const linattn_plan &plan) {
  return run_tokens(problem, result, problem.initial_state, plan);
}
cudaError_t tokens_step(const linattn_problem &problem, const linattn_forward_result &result, const linattn_plan &plan) { return run_tokens(problem, result, result.state, plan); }

}  // namespace linattn
