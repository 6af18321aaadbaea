// The state of each chunk alone: of keys and values, or of queries and their gradients, summed over the heads that share a key head.
#pragma once
#include "chunks/sum.cuh"

namespace linattn_chunks {

// A tile of tokens at work: where it lies in memory and in the block, and the coefficients of its head.
struct StateTokens {
  int head, count;
  int64_t first_number;
  unsigned char *y_tile, *z_tile;
  const float *y_landed, *z_landed;
  float a, b_tau;
};

// The work of a block: a chunk's state, or a share of its features. A warp has 16 features of y and BLOCKS blocks of 16 columns of z. Every step is
// made part of `run`, and every member is a register.
template <typename T, int D, bool QUERIES> struct States {
  using S = StateShape<T, D>;
  using Mine = WarpRows<D, S::TOKENS, S::WARPS>;
  using Sums = float[2 * S::BLOCKS][4];
  using Margins = float[S::WIDE];
  static constexpr int STEPS = S::TOKENS / 16;

  const StateArguments &args;
  const linattn_problem &p;
  unsigned char *const shared;
  typename S::Small &small;
  const int thread, lane_id, warp, group, place;
  const uint32_t base;
  const int share, chunk, pair, batch, key_head, heads;
  const int64_t from, to;
  const int tiles, iterations;
  const int stripe, first_block, feature_block;
  const uint32_t down, across;
  const Mine mine;
  const int set, turn;  // a thread's columns of y and z in a row, and its tokens, for the margins
  float count_sum = 0.f;

  __device__ __forceinline__ States(const StateArguments &args, unsigned char *shared, int share, int chunk, int pair)
      : args(args), p(args.problem), shared(shared), small(*reinterpret_cast<typename S::Small *>(shared + S::LANDING + S::LANDING_BYTES)), thread(threadIdx.x),
        lane_id(thread & 31), warp(warp_number()), group(lane_id >> 2), place(lane_id & 3), base(shared_address(shared)), share(share), chunk(chunk), pair(pair),
        batch(pair / p.key_heads), key_head(pair % p.key_heads), heads(QUERIES ? p.query_heads / p.key_heads : 1), from(chunk * args.chunk), to(min(p.length, from + args.chunk)),
        tiles(static_cast<int>((to - from + S::TOKENS - 1) / S::TOKENS)), iterations(tiles * heads), stripe(warp % S::STRIPES), first_block(warp / S::STRIPES * S::BLOCKS),
        feature_block(share * S::STRIPES + stripe), down(lane_down<D>(lane_id)), across(lane_across<D>(lane_id)), mine(warp, lane_id), set(thread % S::SETS * S::WIDE),
        turn(thread / S::SETS) {}

  __device__ __forceinline__ void run() {
    Sums sum = {};
    Margins margins = {};
    start_first();
    for (int iteration = 0; iteration < iterations; ++iteration) {
      const StateTokens of = tokens(iteration);
      copy_wait<S::LANDINGS - 1>();
      warpgroup_publish();
      __syncthreads();  // everything has landed, and everyone has left the tile before this one
      if constexpr (!kSplit<T>)
        if (iteration + 1 < iterations) start(iteration + 1);
      weigh_tokens(of);
      __syncthreads();
      const Lift lift = lift_tile(of);
      if (share == 0) add_margins(margins, of);
      if constexpr (kSplit<T>) {
        __syncthreads();  // y is written, and what landed was read
        if (iteration + S::LANDINGS < iterations) start(iteration + S::LANDINGS);
        else copy_commit();
      }
      if constexpr (kSplit<T>) add_split(sum, of, lift);
      else add(sum, of);
    }
    store(sum, margins);
  }

  __device__ __forceinline__ int64_t token_of(int iteration) const { return from + static_cast<int64_t>(iteration % tiles) * S::TOKENS; }
  __device__ __forceinline__ int count_of(int64_t token) const { return static_cast<int>(min(p.length - token, static_cast<int64_t>(S::TOKENS))); }

  __device__ __forceinline__ StateTokens tokens(int iteration) const {
    const int stage = iteration % S::STAGES, head = key_head * heads + iteration / tiles;
    const int64_t token = token_of(iteration);
    unsigned char *const y_tile = shared + stage * 2 * S::TILE;
    const float *const y_landed = reinterpret_cast<const float *>(shared + S::LANDING + iteration % S::LANDINGS * 2 * S::LANDED);
    return {head,
            count_of(token),
            (static_cast<int64_t>(batch) * p.query_heads + head) * p.length + token,
            y_tile,
            y_tile + S::TILE,
            y_landed,
            y_landed + S::TOKENS * D,
            QUERIES ? p.coefficients[head] : 1.f,
            QUERIES ? p.coefficients[p.query_heads + head] * p.coefficients[3 * p.query_heads + head] : 1.f};
  }

  __device__ __forceinline__ void start_first() const {
    start(0);
    if constexpr (S::LANDINGS == 2) {
      if (iterations > 1) start(1);
      else copy_commit();
    }
  }

  __device__ __forceinline__ void start(int iteration) const {
    const int64_t token = token_of(iteration);
    const int head = key_head * heads + iteration / tiles, count = count_of(token);
    const uint32_t tile = base + iteration % S::STAGES * 2 * S::TILE, landing = base + S::LANDING + iteration % S::LANDINGS * 2 * S::LANDED;
    start_rows<T, D, S::TOKENS, S::WARPS>(tile, landing, head_of<const T>(args.y.tensor, batch, head) + token * args.y.tensor.token_stride, args.y.tensor.token_stride, count,
                                          thread);
    start_rows<T, D, S::TOKENS, S::WARPS>(tile + S::TILE, landing + S::LANDED, head_of<const T>(args.z.tensor, batch, head) + token * args.z.tensor.token_stride,
                                          args.z.tensor.token_stride, count, thread);
    copy_commit();
  }

  // What a token counts in the sum of products and in either margin.
  __device__ __forceinline__ void weigh_tokens(const StateTokens &of) {
    mine.batches([&](int first) {
      Row<D> y[Mine::BATCH], z[Mine::BATCH];
      Worth y_worth[Mine::BATCH], z_worth[Mine::BATCH];
      float error[Mine::BATCH];
#pragma unroll
      for (int i = 0; i < Mine::BATCH; ++i) error[i] = QUERIES ? args.error[of.first_number + min(mine.row(first + i), of.count - 1)] : 1.f;
      if constexpr (kSplit<T>) mine.each(first, [&](int i, int row) { y[i].read(of.y_landed + row * D, mine.lanes, true), z[i].read(of.z_landed + row * D, mine.lanes, true); });
      else if (args.y.unit) mine.each(first, [&](int i, int) { y[i].read_tile(of.y_tile, mine, first + i); });
      weigh<T>(y_worth, y, mine, first, args.y, of.first_number, of.count);
      weigh<T>(z_worth, z, mine, first, args.z, of.first_number, of.count);
      mine.each(first, [&](int i, int row) {
        if constexpr (kSplit<T>) z[i].put(of.z_tile, S::PLANE, mine, first + i, z_worth[i].lift.up);
        if (mine.lanes.lane == 0) {
          const float own = y_worth[i].own * of.b_tau, product = own * z_worth[i].own * z_worth[i].lift.down;
          small.product[row] = product, small.column[row] = own * error[i], small.line[row] = z_worth[i].own * of.a;
          if constexpr (kSplit<T>) small.peak[row] = y_worth[i].lift.down * fabsf(product);  // of y times its factor, in units of 2^15
          else store_split(reinterpret_cast<T *>(small.high), reinterpret_cast<T *>(small.low), row, product);
          if (QUERIES && row < of.count) count_sum = fmaf(of.a, error[i], count_sum);
        }
      });
    });
  }

  // Split factors: y times its tokens' factors, as one tile with one lift.
  __device__ __forceinline__ Lift lift_tile(const StateTokens &of) const {
    Lift lift{1.f, 1.f};
    if constexpr (kSplit<T>) {
      const float peak = fmaxf(small.peak[lane_id], small.peak[lane_id + 32]);
      lift = lift_from(warp_peak(peak), kPeak - 15);
      mine.batches([&](int first) {
        Row<D> y[Mine::BATCH];
        mine.each(first, [&](int i, int row) { y[i].read(of.y_landed + row * D, mine.lanes, true); });
        mine.each(first, [&](int i, int row) { y[i].put(of.y_tile, S::PLANE, mine, first + i, small.product[row] * lift.up); });
      });
    }
    return lift;
  }

  __device__ __forceinline__ void add_margins(Margins &margins, const StateTokens &of) const {
    const bool of_z = set >= D;
    const float *const weights = of_z ? small.line : small.column;
    const int column = of_z ? set - D : set;
#pragma unroll 4
    for (int n = turn * (S::TOKENS / S::TURNS); n < (turn + 1) * (S::TOKENS / S::TURNS); ++n) {
      const float weight = weights[n];
      if constexpr (kSplit<T>) {
        const float4 x = four_of((of_z ? of.z_landed : of.y_landed) + n * D + column);
        margins[0] = fmaf(weight, x.x, margins[0]), margins[1] = fmaf(weight, x.y, margins[1]), margins[2] = fmaf(weight, x.z, margins[2]),
        margins[3] = fmaf(weight, x.w, margins[3]);
      } else {
        using E = Element<T>;
        const uint4 x = *reinterpret_cast<const uint4 *>((of_z ? of.z_tile : of.y_tile) + Tile<D>::at(n, column / 8));
        const uint32_t two[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) margins[2 * i] = fmaf(weight, E::low(two[i]), margins[2 * i]), margins[2 * i + 1] = fmaf(weight, E::high(two[i]), margins[2 * i + 1]);
      }
    }
  }

  // The tile's products; those of split factors in a sum of their own first.
  __device__ __forceinline__ void add_split(Sums &sum, const StateTokens &of, const Lift &lift) const {
    const Blocks<D> y_blocks(shared_address(of.y_tile), across), z_blocks(shared_address(of.z_tile), down);
    constexpr int GROUP = 2;
#pragma unroll
    for (int begin = 0; begin < S::BLOCKS; begin += GROUP) {
      float fresh[2 * GROUP][4] = {};
#pragma unroll
      for (int step = 0; step < STEPS; ++step) {
        Fragment<T> y, z;
        y.load_transposed(y_blocks.at_column(step, feature_block), S::PLANE);
#pragma unroll
        for (int q = 0; q < GROUP; ++q) {
          if (begin + q >= S::BLOCKS) continue;
          z.load_transposed(z_blocks.at_column(step, first_block + begin + q), S::PLANE);
          multiply(fresh[2 * q], y, z, 0);
          multiply(fresh[2 * q + 1], y, z, 1);
        }
      }
#pragma unroll
      for (int n = 0; n < 2 * GROUP; ++n)
        if (begin + n / 2 < S::BLOCKS)
#pragma unroll
          for (int i = 0; i < 4; ++i) sum[2 * begin + n][i] = fmaf(fresh[n][i], lift.down, sum[2 * begin + n][i]);
    }
  }

  __device__ __forceinline__ void add(Sums &sum, const StateTokens &of) const {
    const Blocks<D> y_blocks(shared_address(of.y_tile), across), z_blocks(shared_address(of.z_tile), down);
    const SplitWeights<T> products{reinterpret_cast<const T *>(small.high), reinterpret_cast<const T *>(small.low)};
    const WeightReader<T> scale(products, products.high, lane_id);
    Fragment<T> y[STEPS];
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      y[step].load_transposed(y_blocks.at_column(step, feature_block), S::PLANE);
      scale.scale(y[step].part[0], 16 * step);
    }
    if constexpr (kWarpgroups<D>) {
      constexpr float kWhole[2] = {1.f, 1.f};
      gather_by_group<T, D, STEPS>(sum, shared_address(of.z_tile), S::PLANE, kWhole, y);
    } else {
#pragma unroll
      for (int step = 0; step < STEPS; ++step)
#pragma unroll
        for (int q = 0; q < S::BLOCKS; ++q) {
          Fragment<T> z;
          z.load_transposed(z_blocks.at_column(step, first_block + q), S::PLANE);
          multiply(sum[2 * q], y[step], z, 0);
          multiply(sum[2 * q + 1], y[step], z, 1);
        }
    }
  }

  // Where the scan finds it: the sum, y's margin, z's, the count.
  __device__ __forceinline__ void store(const Sums &sum, const Margins &margins) {
    float *const state = args.states + (static_cast<int64_t>(pair) * args.chunks + chunk) * kStateFloats<D>;
#pragma unroll
    for (int n = 0; n < 2 * S::BLOCKS; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        *reinterpret_cast<float2 *>(state + (16 * feature_block + group + 8 * half) * D + 16 * first_block + 8 * n + 2 * place) =
            make_float2(sum[n][2 * half], sum[n][2 * half + 1]);
    if (share > 0) return;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) count_sum += __shfl_xor_sync(0xffffffffu, count_sum, step);
    if (lane_id == 0) small.counts[warp] = count_sum;
    copy_wait<0>();
    __syncthreads();  // the tiles make room for what each turn has summed
    float *const turns = reinterpret_cast<float *>(shared);
#pragma unroll
    for (int i = 0; i < S::WIDE; ++i) turns[turn * 2 * D + set + i] = margins[i];
    __syncthreads();
    for (int i = thread; i < 2 * D; i += S::THREADS) {
      float all = 0.f;
      for (int t = 0; t < S::TURNS; ++t) all += turns[t * 2 * D + i];
      state[D * D + i] = all;
    }
    if (thread == 0) {
      float all = 0.f;
      for (int w = 0; w < S::WARPS; ++w) all += small.counts[w];
      state[D * D + 2 * D] = QUERIES ? all : static_cast<float>(to - from);
    }
  }
};

template <typename T, int D, bool QUERIES> __global__ void __launch_bounds__(StateShape<T, D>::THREADS) states_kernel(const __grid_constant__ StateArguments args) {
  using S = StateShape<T, D>;
  extern __shared__ __align__(1024) unsigned char shared[];
  const int share = blockIdx.x % S::SHARES, chunk = blockIdx.x / S::SHARES % args.chunks, pair = blockIdx.x / S::SHARES / args.chunks;
  if (chunk != args.unneeded) States<T, D, QUERIES>(args, shared, share, chunk, pair).run();
}

}  // namespace linattn_chunks
