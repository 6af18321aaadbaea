// The output in one pass: queries take the state of what lies before their chunk, then the chunk's own pairs.
#pragma once
#include "pairs/running_side.cuh"
#include "pairs/running_state.cuh"

namespace linattn_pairs {

// A warp's 16 queries.
template <bool GATED> struct RunningOutput {
  using T = __nv_bfloat16;
  using E = Element<T>;
  using S = RunShape<Pass::OUTPUT>;
  static constexpr int COLUMNS = kKeys / 8;
  StateSide side;
  float acc[kRunValues / 8][4], unit[2];
  float mass[2], masses[4];  // of the state; of the chunk's weights, rounded, as values are weighted by them: of both rows, twice each

  // f: of the head; state: of what lies before, or 0.
  __device__ __forceinline__ void start(const linattn_problem &p, const Coefficients &f, uint32_t queries, uint32_t state, bool has_state, const StateMargins &margins,
                                        const ChunkNumbers &numbers) {
    side.load(queries);
    side.measure(unit, p);
    mass[0] = mass[1] = masses[0] = masses[1] = masses[2] = masses[3] = 0.f;
    if (!has_state) {
#pragma unroll
      for (int i = 0; i < kRunValues / 2; ++i) acc[i / 4][i % 4] = 0.f;
      return;
    }
    const float beta[2] = {f.beta * unit[0], f.beta * unit[1]}, gamma[2] = {f.gamma * unit[0] * unit[0], f.gamma * unit[1] * unit[1]};
    side.add_pairs(acc, state);
    scale(gamma);
    side.add_lines(acc, beta, state);
    add_means(f.a, beta, gamma, margins);
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
  __device__ __forceinline__ void add_means(float a, const float (&beta)[2], const float (&gamma)[2], const StateMargins &margins) {
    float products[2][4], share[2];  // share: of the sum of all values
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
      mass[half] = over_place(gamma[half] * side.along(products, half) + beta[half] * line) + a * margins.count, share[half] = mass[half] * inverse;
    }
#pragma unroll
    for (int n = 0; n < kRunValues / 8; ++n) {
      const float2 two = *reinterpret_cast<const float2 *>(margins.values + 8 * n + 2 * side.place);
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[n][i] += share[i / 2] * (i % 2 ? two.y : two.x);
    }
  }

  // The pairs with 64 keys of the chunk.
  __device__ __forceinline__ void add_tile(uint32_t others, const ChunkNumbers &numbers, int tile) {
    float s[COLUMNS][4];
    uint32_t weights[kKeys / 16][4];
    const uint32_t keys = others + Tile<kRunKeys>::rows_at(kKeys / 16 * tile), values = others + S::X + Tile<kRunValues>::rows_at(kKeys / 16 * tile);
    warpgroup_overwrites(s);
    warpgroup_begin();
    WarpgroupProduct<T, kKeys, false>::run(s, side.x, operand_in<kRunKeys>(keys, 0), false);
    warpgroup_commit();
    warpgroup_wait<0>();
    warpgroup_keep(s);
    const bool diagonal = tile == side.stripe / 4;
    if (GATED && numbers.mixed) weigh<true>(s, weights, numbers, tile, diagonal);
    else weigh<false>(s, weights, numbers, tile, diagonal);
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
  __device__ __forceinline__ void weigh(float (&s)[COLUMNS][4], uint32_t (&weights)[kKeys / 16][4], const ChunkNumbers &numbers, int tile, bool diagonal) {
    const RowGates<MIXED, false> own(side, numbers);
#pragma unroll
    for (int block = 0; block < kKeys / 16; ++block) {
      if (diagonal && block > side.stripe % 4) {  // no query of the warp sees one of these
#pragma unroll
        for (int i = 0; i < 4; ++i) weights[block][i] = 0u;
        continue;
      }
      float p[2][4];
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const int key = kKeys * tile + 16 * block + 8 * t + 2 * side.place;
        const float4 of[2] = {numbers.of_query[key], numbers.of_query[key + 1]};
        float2 exponents = {};
        int2 runs = {};
        if constexpr (MIXED) exponents = *reinterpret_cast<const float2 *>(numbers.exponent + key), runs = *reinterpret_cast<const int2 *>(numbers.key_run + key);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int half = i / 2;
          const float x = s[2 * block + t][i] * unit[half];
          p[t][i] = fmaf(fmaf(of[i % 2].z, x, of[i % 2].y), x, of[i % 2].x);
          if constexpr (MIXED) p[t][i] *= own.of(half, i % 2, exponents, runs);
        }
      }
      if (diagonal && block == side.stripe % 4)
#pragma unroll
        for (int i = 0; i < 8; ++i)
          if (!side.sees(i / 4, i % 4)) p[i / 4][i % 4] = 0.f;
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int t = 0; t < 2; ++t) weights[block][2 * t + half] = E::pack(p[t][2 * half], p[t][2 * half + 1]);
      E::mma(masses, weights[block], E::kOnes, E::kOnes);
    }
  }

  __device__ __forceinline__ void store(const Running &args, const RunPlace<Pass::OUTPUT> &at, unsigned char *shared, const ChunkNumbers &numbers, int64_t begin) {
    const linattn_problem &p = args.of.problem;
    const int rows = at.count_of(begin);
    float *const kept = args.mass + (static_cast<int64_t>(at.batch) * p.query_heads + at.head) * p.length + begin;
    float finish[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = side.row(half);
      const float all = mass[half] + masses[2 * half];
      finish[half] = all == 0.f ? 0.f : 1.f / all;
      if (side.place == 0 && row < rows) kept[row] = GATED && !numbers.mixed ? all * numbers.own[row] : all;
    }
    unsigned char *const staged = shared + S::RESULTS_AT + (warp_number() - side.stripe) * Tile<kRunValues>::kBlockBytes;  // a warp's own place, whatever its stripe
    const Blocks<kRunValues> blocks(shared_address(staged), lane_down<kRunValues>(side.lane));
    T *const results = head_of<T>(args.out, at.batch, at.head) + begin * args.out.token_stride;
    store_rows<T, kRunValues>(args.out, results, staged, blocks, Tile<kRunValues>::rows_at(side.stripe), acc, finish[0], finish[1], rows, side.stripe, side.lane);
  }
};

template <bool GATED> __global__ void __launch_bounds__(kRunThreads, 1) running_output_kernel(const __grid_constant__ Running args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using S = RunShape<Pass::OUTPUT>;
  extern __shared__ __align__(1024) unsigned char shared[];
  const RunPlace<Pass::OUTPUT> at(args, args.of.problem.query_heads);
  if (helps_readers(args, at, shared)) return;
  const uint32_t base = shared_address(shared);
  const ChunkNumbers *const numbers = reinterpret_cast<const ChunkNumbers *>(shared + S::NUMBERS_AT);
  const StateMargins *const margins = reinterpret_cast<const StateMargins *>(shared + S::MARGINS_AT);
  const Coefficients f(at.p, at.head);
  RunningOutput<GATED> work;
#pragma unroll 1
  for (int step = 0; step < at.chunks; ++step) {
    await_step(step);
    const ChunkNumbers &here = numbers[step % 2];
    work.side.take_stripe(step);
    work.start(at.p, f, base + S::OWN_AT + step % 2 * S::OWN, base + step % 2 * S::STATE, step > 0 || at.has_start, margins[step % 2], here);
    for (int tile = 0; tile <= work.side.stripe / 4; ++tile) work.add_tile(base + S::OTHERS_AT + step % 2 * S::OTHERS, here, tile);
    work.store(args, at, shared, here, at.begin_of(step));
    leave_chunk(step, at.chunks), leave_state(step, at.chunks);
  }
#endif
}

}  // namespace linattn_pairs
