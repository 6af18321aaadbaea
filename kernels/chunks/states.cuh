// The state of each chunk alone: of keys and values, or of queries and their gradients, summed over the heads that share a key head.
#pragma once
#include "chunks/sum.cuh"

namespace linattn_chunks {

template <typename T, int D, bool QUERIES> __global__ void __launch_bounds__(StateShape<T, D>::THREADS) states_kernel(const __grid_constant__ StateArguments args) {
  using S = StateShape<T, D>;
  constexpr int STEPS = S::TOKENS / 16;
  extern __shared__ __align__(1024) unsigned char shared[];
  auto &small = *reinterpret_cast<typename S::Small *>(shared + S::LANDING + S::LANDING_BYTES);
  const linattn_problem &p = args.problem;
  const int thread = threadIdx.x, lane_id = thread & 31, warp = warp_number(), group = lane_id >> 2, place = lane_id & 3;
  const uint32_t base = shared_address(shared);
  const int share = blockIdx.x % S::SHARES, chunk = blockIdx.x / S::SHARES % args.chunks, pair = blockIdx.x / S::SHARES / args.chunks;
  if (chunk == args.unneeded) return;
  const int batch = pair / p.key_heads, key_head = pair % p.key_heads, heads = QUERIES ? p.query_heads / p.key_heads : 1;
  const int64_t from = chunk * args.chunk, to = min(p.length, from + args.chunk);
  const int tiles = static_cast<int>((to - from + S::TOKENS - 1) / S::TOKENS), iterations = tiles * heads;
  const auto token_of = [&](int iteration) { return from + static_cast<int64_t>(iteration % tiles) * S::TOKENS; };
  const auto count_of = [&](int64_t token) { return static_cast<int>(min(p.length - token, static_cast<int64_t>(S::TOKENS))); };
  const auto start = [&](int iteration) {
    const int64_t token = token_of(iteration);
    const int head = key_head * heads + iteration / tiles, count = count_of(token);
    const uint32_t tile = base + iteration % S::STAGES * 2 * S::TILE, landing = base + S::LANDING + iteration % S::LANDINGS * 2 * S::LANDED;
    start_rows<T, D, S::TOKENS, S::WARPS>(tile, landing, head_of<const T>(args.y.tensor, batch, head) + token * args.y.tensor.token_stride, args.y.tensor.token_stride, count,
                                          thread);
    start_rows<T, D, S::TOKENS, S::WARPS>(tile + S::TILE, landing + S::LANDED, head_of<const T>(args.z.tensor, batch, head) + token * args.z.tensor.token_stride,
                                          args.z.tensor.token_stride, count, thread);
    copy_commit();
  };
  start(0);
  if constexpr (S::LANDINGS == 2) {
    if (iterations > 1) start(1);
    else copy_commit();
  }

  // A warp has 16 features of y and BLOCKS blocks of 16 columns of z.
  const int stripe = warp % S::STRIPES, first_block = warp / S::STRIPES * S::BLOCKS, feature_block = share * S::STRIPES + stripe;
  const uint32_t down = lane_down<D>(lane_id), across = lane_across<D>(lane_id);
  using Mine = WarpRows<D, S::TOKENS, S::WARPS>;
  const Mine mine(warp, lane_id);
  const int set = thread % S::SETS * S::WIDE, turn = thread / S::SETS;  // a thread's columns of y and z in a row, and its tokens, for the margins
  float sum[2 * S::BLOCKS][4] = {}, margins[S::WIDE] = {}, count_sum = 0.f;
  for (int iteration = 0; iteration < iterations; ++iteration) {
    const int stage = iteration % S::STAGES, head = key_head * heads + iteration / tiles;
    const int64_t token = token_of(iteration), first_number = (static_cast<int64_t>(batch) * p.query_heads + head) * p.length + token;
    const int count = count_of(token);
    unsigned char *const y_tile = shared + stage * 2 * S::TILE, *const z_tile = y_tile + S::TILE;
    const float *const y_landed = reinterpret_cast<const float *>(shared + S::LANDING + iteration % S::LANDINGS * 2 * S::LANDED), *const z_landed = y_landed + S::TOKENS * D;
    const float a = QUERIES ? p.coefficients[head] : 1.f, b_tau = QUERIES ? p.coefficients[p.query_heads + head] * p.coefficients[3 * p.query_heads + head] : 1.f;
    copy_wait<S::LANDINGS - 1>();
    warpgroup_publish();
    __syncthreads();  // everything has landed, and everyone has left the tile before this one
    if constexpr (!kSplit<T>)
      if (iteration + 1 < iterations) start(iteration + 1);

    // What a token counts in the sum of products and in either margin.
    mine.batches([&](int first) {
      Row<D> y[Mine::BATCH], z[Mine::BATCH];
      Worth y_worth[Mine::BATCH], z_worth[Mine::BATCH];
      float error[Mine::BATCH];
#pragma unroll
      for (int i = 0; i < Mine::BATCH; ++i) error[i] = QUERIES ? args.error[first_number + min(mine.row(first + i), count - 1)] : 1.f;
      if constexpr (kSplit<T>) mine.each(first, [&](int i, int row) { y[i].read(y_landed + row * D, mine.lanes, true), z[i].read(z_landed + row * D, mine.lanes, true); });
      else if (args.y.unit) mine.each(first, [&](int i, int) { y[i].read_tile(y_tile, mine, first + i); });
      weigh<T>(y_worth, y, mine, first, args.y, first_number, count);
      weigh<T>(z_worth, z, mine, first, args.z, first_number, count);
      mine.each(first, [&](int i, int row) {
        if constexpr (kSplit<T>) z[i].put(z_tile, S::PLANE, mine, first + i, z_worth[i].lift.up);
        if (mine.lanes.lane == 0) {
          const float own = y_worth[i].own * b_tau, product = own * z_worth[i].own * z_worth[i].lift.down;
          small.product[row] = product, small.column[row] = own * error[i], small.line[row] = z_worth[i].own * a;
          if constexpr (kSplit<T>) small.peak[row] = y_worth[i].lift.down * fabsf(product);  // of y times its factor, in units of 2^15
          else store_split(reinterpret_cast<T *>(small.high), reinterpret_cast<T *>(small.low), row, product);
          if (QUERIES && row < count) count_sum = fmaf(a, error[i], count_sum);
        }
      });
    });
    __syncthreads();
    Lift lift{1.f, 1.f};
    if constexpr (kSplit<T>) {  // y times its tokens' factors, as one tile with one lift
      const float peak = fmaxf(small.peak[lane_id], small.peak[lane_id + 32]);
      lift = lift_from(warp_peak(peak), kPeak - 15);
      mine.batches([&](int first) {
        Row<D> y[Mine::BATCH];
        mine.each(first, [&](int i, int row) { y[i].read(y_landed + row * D, mine.lanes, true); });
        mine.each(first, [&](int i, int row) { y[i].put(y_tile, S::PLANE, mine, first + i, small.product[row] * lift.up); });
      });
    }
    if (share == 0) {
      const bool of_z = set >= D;
      const float *const weights = of_z ? small.line : small.column;
      const int column = of_z ? set - D : set;
#pragma unroll 4
      for (int n = turn * (S::TOKENS / S::TURNS); n < (turn + 1) * (S::TOKENS / S::TURNS); ++n) {
        const float weight = weights[n];
        if constexpr (kSplit<T>) {
          const float4 x = four_of((of_z ? z_landed : y_landed) + n * D + column);
          margins[0] = fmaf(weight, x.x, margins[0]), margins[1] = fmaf(weight, x.y, margins[1]), margins[2] = fmaf(weight, x.z, margins[2]),
          margins[3] = fmaf(weight, x.w, margins[3]);
        } else {
          using E = Element<T>;
          const uint4 x = *reinterpret_cast<const uint4 *>((of_z ? z_tile : y_tile) + Tile<D>::at(n, column / 8));
          const uint32_t two[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
          for (int i = 0; i < 4; ++i) margins[2 * i] = fmaf(weight, E::low(two[i]), margins[2 * i]), margins[2 * i + 1] = fmaf(weight, E::high(two[i]), margins[2 * i + 1]);
        }
      }
    }
    if constexpr (kSplit<T>) {
      __syncthreads();  // y is written, and what landed was read
      if (iteration + S::LANDINGS < iterations) start(iteration + S::LANDINGS);
      else copy_commit();
    }

    const Blocks<D> y_blocks(shared_address(y_tile), across), z_blocks(shared_address(z_tile), down);
    if constexpr (kSplit<T>) {
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
    } else {
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
        gather_by_group<T, D, STEPS>(sum, shared_address(z_tile), S::PLANE, kWhole, y);
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
  }

  // ---- where the scan finds it: the sum, y's margin, z's, the count
  float *const state = args.states + (static_cast<int64_t>(pair) * args.chunks + chunk) * kStateFloats<D>;
#pragma unroll
  for (int n = 0; n < 2 * S::BLOCKS; ++n)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      *reinterpret_cast<float2 *>(state + (16 * feature_block + group + 8 * half) * D + 16 * first_block + 8 * n + 2 * place) = make_float2(sum[n][2 * half], sum[n][2 * half + 1]);
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

}  // namespace linattn_chunks
