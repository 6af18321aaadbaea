// The output in one pass: queries take the state of what lies before their chunk, then the chunk's own pairs.
#pragma once
#include "pairs/running_state.cuh"

namespace linattn_pairs {

// A warp's 16 queries.
template <bool GATED> struct RunningOutput {
  using T = __nv_bfloat16;
  using E = Element<T>;
  using S = RunShape<Pass::OUTPUT>;
  static constexpr int COLUMNS = kKeys / 8;
  StateSide side;
  float acc[kRunValues / 8][4], mass[2], beta[2], gamma[2];

  // f: of the head; state: of what lies before, or 0.
  __device__ __forceinline__ void start(const linattn_problem &p, const Coefficients &f, uint32_t queries, uint32_t state, bool has_state, const StateMargins &margins,
                                        const ChunkNumbers &numbers) {
    side.load(queries);
    float unit[2] = {1.f, 1.f};
    if (p.normalize_qk) {
      const uint32_t x[1][4] = {{side.x[0], side.x[1], side.x[2], side.x[3]}};
      row_products<T>(unit[0], unit[1], x, Blocks<kRunKeys>(queries, lane_across<kRunKeys>(side.lane)), Tile<kRunKeys>::rows_at(side.warp), side.lane);
      unit[0] = inverse_norm(unit[0]), unit[1] = inverse_norm(unit[1]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) beta[half] = f.beta * unit[half], gamma[half] = f.gamma * unit[half] * unit[half], mass[half] = 0.f;
#pragma unroll
    for (int i = 0; i < kRunValues / 2; ++i) acc[i / 4][i % 4] = 0.f;
    if (!has_state) return;
    side.add_pairs(acc, state);
    scale(gamma);
    side.add_lines(acc, beta, state);
    add_means(f.a, margins);
    if (GATED && numbers.mixed) {
      const float own[2] = {numbers.own[side.row(0)], numbers.own[side.row(1)]};
      scale(own), mass[0] *= own[0], mass[1] *= own[1];
    }
  }
  __device__ __forceinline__ void scale(const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < kRunValues / 2; ++i) acc[i / 4][i % 4] *= factor[i / 2 % 2];
  }
  // The masses, and the means of values, which the state's are away from.
  __device__ __forceinline__ void add_means(float a, const StateMargins &margins) {
    float products[2][4];
    side.multiply_masses(products, margins);
    const float inverse = margins.inverse_count();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float line = 0.f;
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const float2 two = side.line_of(margins, t);
        line += E::low(side.x[2 * t + half]) * two.x + E::high(side.x[2 * t + half]) * two.y;
      }
      mass[half] = over_place(gamma[half] * side.along(products, half) + beta[half] * line) + a * margins.count;
    }
#pragma unroll
    for (int n = 0; n < kRunValues / 8; ++n) {
      const float2 two = *reinterpret_cast<const float2 *>(margins.values + 8 * n + 2 * side.place);
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[n][i] += mass[i / 2] * ((i % 2 ? two.y : two.x) * inverse);
    }
    if (side.place > 0) mass[0] = mass[1] = 0.f;  // a lane's part
  }

  // The pairs with 64 keys of the chunk.
  __device__ __forceinline__ void add_tile(float a, uint32_t others, const ChunkNumbers &numbers, int tile) {
    float s[COLUMNS][4];
    uint32_t weights[kKeys / 16][4];
    const uint32_t keys = others + Tile<kRunKeys>::rows_at(kKeys / 16 * tile), values = others + S::X + Tile<kRunValues>::rows_at(kKeys / 16 * tile);
#pragma unroll
    for (int i = 0; i < 4 * COLUMNS; ++i) s[i / 4][i % 4] = 0.f;
    warpgroup_keep(s);
    warpgroup_begin();
    WarpgroupProduct<T, kKeys, false>::run(s, side.x, operand_in<kRunKeys>(keys, 0), false);
    warpgroup_commit();
    warpgroup_wait<0>();
    warpgroup_keep(s);
    const bool diagonal = tile == side.warp / 4;
    if (GATED && numbers.mixed) weigh<true>(s, weights, a, numbers, tile, diagonal);
    else weigh<false>(s, weights, a, numbers, tile, diagonal);
    warpgroup_keep(weights), warpgroup_keep(acc);
    warpgroup_begin();
#pragma unroll
    for (int block = 0; block < kKeys / 16; ++block)
      WarpgroupProduct<T, kRunValues, true>::run(acc, weights[block], operand_in<kRunValues, true>(values, Tile<kRunValues>::rows_at(block)), true);
    warpgroup_commit();
    warpgroup_wait<0>();
    warpgroup_keep(acc);
  }
  template <bool MIXED>
  __device__ __forceinline__ void weigh(float (&s)[COLUMNS][4], uint32_t (&weights)[kKeys / 16][4], float a, const ChunkNumbers &numbers, int tile, bool diagonal) {
    const int last = side.row(0) - kKeys * tile;  // key of the tile that the lane's first row sees
    float exponent[2] = {};
    int32_t run[2] = {};
    if constexpr (MIXED)
#pragma unroll
      for (int half = 0; half < 2; ++half) exponent[half] = numbers.exponent[side.row(half)], run[half] = numbers.query_run[side.row(half)];
#pragma unroll
    for (int n = 0; n < COLUMNS; ++n) {
      const int column = 8 * n + 2 * side.place, key = kKeys * tile + column;
      const float2 unit = *reinterpret_cast<const float2 *>(numbers.unit + key);
      float2 factor = make_float2(1.f, 1.f);
      int2 runs = {};
      if constexpr (GATED) factor = *reinterpret_cast<const float2 *>((MIXED ? numbers.exponent : numbers.factor) + key);
      if constexpr (MIXED) runs = *reinterpret_cast<const int2 *>(numbers.key_run + key);
      float p[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int half = i / 2;
        const float t = s[n][i] * (i % 2 ? unit.y : unit.x), of = i % 2 ? factor.y : factor.x;
        p[i] = fmaf(fmaf(gamma[half], t, beta[half]), t, a);
        if constexpr (MIXED) p[i] = run[half] > 0 && run[half] == (i % 2 ? runs.y : runs.x) ? p[i] * exp2_fast(fminf(exponent[half] - of, 0.f)) : 0.f;
        else if constexpr (GATED) p[i] *= of;
        if (diagonal && column + i % 2 > last + 8 * half) p[i] = 0.f;
        mass[half] += p[i];
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) weights[n / 2][n % 2 * 2 + half] = E::pack(p[2 * half], p[2 * half + 1]);
    }
  }

  __device__ __forceinline__ void store(const Running &args, const RunPlace<Pass::OUTPUT> &at, unsigned char *shared, const ChunkNumbers &numbers, int64_t begin) {
    const linattn_problem &p = args.of.problem;
    const int rows = at.count_of(begin);
    float *const masses = args.mass + (static_cast<int64_t>(at.batch) * p.query_heads + at.head) * p.length + begin;
    float finish[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = side.row(half);
      const float all = over_place(mass[half]);
      finish[half] = all == 0.f ? 0.f : 1.f / all;
      if (side.place == 0 && row < rows) masses[row] = GATED && !numbers.mixed ? all * numbers.own[row] : all;
    }
    const Blocks<kRunValues> blocks(shared_address(shared) + S::RESULTS_AT, lane_down<kRunValues>(side.lane));
    T *const results = head_of<T>(args.out, at.batch, at.head) + begin * args.out.token_stride;
    store_rows<T, kRunValues>(args.out, results, shared + S::RESULTS_AT, blocks, Tile<kRunValues>::rows_at(side.warp), acc, finish[0], finish[1], rows, side.warp, side.lane);
  }
};

template <bool GATED> __global__ void __launch_bounds__(kRunThreads, 1) running_output_kernel(const __grid_constant__ Running args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using S = RunShape<Pass::OUTPUT>;
  extern __shared__ __align__(1024) unsigned char shared[];
  const RunPlace<Pass::OUTPUT> at(args, args.of.problem.query_heads);
  const int thread = threadIdx.x;
  if (thread >= kReaders) {
    take_registers<kKeeperRegisters>();
    keep_state<Pass::OUTPUT>(args, at, shared);
    return;
  }
  give_registers<kReaderRegisters>();
  const uint32_t base = shared_address(shared);
  ChunkNumbers *const numbers = reinterpret_cast<ChunkNumbers *>(shared + S::NUMBERS_AT);
  const StateMargins *const margins = reinterpret_cast<const StateMargins *>(shared + S::MARGINS_AT);
  const Coefficients f(at.p, at.head);
  NumbersOnWay<Pass::OUTPUT, 1> on_way;
  RunningOutput<GATED> work;
  const auto bring = [&](int step) {
    fetch_step<Pass::OUTPUT>(args, at, base, step, thread);
    on_way.load(args, at, step, thread);
  };
  const auto write_down = [&](int step) { on_way.store(numbers[step % 2], shared + S::FEATURES_AT + step % 2 * FeatureTiles<Pass::OUTPUT>::BYTES, at, step, thread); };
  bring(0), write_down(0);
#pragma unroll 1
  for (int step = 0; step < at.chunks; ++step) {
    copy_wait<0>();
    warpgroup_publish();
    __syncthreads();
    const ChunkNumbers &here = numbers[step % 2];
    if (step + 1 < at.chunks) bring(step + 1);
    work.start(at.p, f, base + S::OWN_AT + step % 2 * S::OWN, base + step % 2 * S::STATE, step > 0 || at.has_start, margins[step % 2], here);
    for (int tile = 0; tile <= work.side.warp / 4; ++tile) work.add_tile(f.a, base + S::OTHERS_AT + step % 2 * S::OTHERS, here, tile);
    work.store(args, at, shared, here, at.begin_of(step));
    if (step + 1 < at.chunks) write_down(step + 1);
  }
#endif
}

}  // namespace linattn_pairs
