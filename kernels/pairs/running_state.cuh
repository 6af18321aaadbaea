// The warpgroup that keeps the running state: a warp has three items of x_a x_b, of the 12 that are not another one's other order, and its part of the rest. Features are made
// in registers, of 16 tokens at a time, and multiplied with their values by wgmma.
#pragma once
#include "pairs/running_chunks.cuh"

namespace linattn_pairs {

// FIRST_WARP: of the block's, the first of these four.
template <Pass PASS, int FIRST_WARP = kReaders / 32> struct StateKeeper {
  using T = __nv_bfloat16;
  using E = Element<T>;
  using S = RunShape<PASS>;
  using Tiles = FeatureTiles;
  static constexpr bool BACK = PASS == Pass::COLUMNS;
  const int lane, warp, group, place;  // warp: of the four
  // Of a = 2 warp and the one behind with the first block of b, and with the second; of a = 8 + 2 warp and the one behind with the second. In the last: warp 0 has the
  // rows x_a, warp 1 one row, of the constant feature.
  float sums[4][kRunValues / 8][4];
  float masses[2][4], lines[4], count;  // of warp 2
  float kept = 1.f;                     // of what the first chunk began with

  __device__ __forceinline__ StateKeeper() : lane(threadIdx.x & 31), warp(warp_number() - FIRST_WARP), group(lane >> 2), place(lane & 3) {
#pragma unroll
    for (int i = 0; i < 4 * kRunValues / 2; ++i) sums[i / (kRunValues / 2)][i / 4 % (kRunValues / 8)][i % 4] = 0.f;
#pragma unroll
    for (int i = 0; i < 4; ++i) masses[0][i] = masses[1][i] = lines[i] = 0.f;
    count = 0.f;
  }

  __device__ __forceinline__ void scale(float factor) {
#pragma unroll
    for (int i = 0; i < 4 * kRunValues / 2; ++i) sums[i / (kRunValues / 2)][i / 4 % (kRunValues / 8)][i % 4] *= factor;
#pragma unroll
    for (int i = 0; i < 4; ++i) masses[0][i] *= factor, masses[1][i] *= factor, lines[i] *= factor;
    count *= factor, kept *= factor;
  }
  // To memory and back. `at`: of the thread's floats, kKeepers apart.
  template <typename Each> __device__ __forceinline__ void for_each(float *at, Each each) {
#pragma unroll
    for (int i = 0; i < 4 * kRunValues / 2; ++i) each(at[i * kKeepers], sums[i / (kRunValues / 2)][i / 4 % (kRunValues / 8)][i % 4]);
#pragma unroll
    for (int i = 0; i < 4; ++i) each(at[(128 + i) * kKeepers], masses[0][i]), each(at[(132 + i) * kKeepers], masses[1][i]), each(at[(136 + i) * kKeepers], lines[i]);
    each(at[140 * kKeepers], count);
  }
  __device__ __forceinline__ void save(float *record) {
    for_each(record + 32 * warp + lane, [](float &there, float &here) { there = here; });
    record[141 * kKeepers + 32 * warp + lane] = kept;
  }
  // All but what is kept of it, which a scan over segments alone asks for.
  __device__ __forceinline__ void load(float *record) {
    for_each(record + 32 * warp + lane, [](float &there, float &here) { here = there; });
  }

  // What a warp multiplies with the values of 16 tokens, out of their features.
  __device__ __forceinline__ void make(uint32_t (&of)[4][4], const unsigned char *features, const ChunkNumbers &numbers, const Coefficients &f, int step) {
    const int tile = step / 4 * Tiles::TILE, across = step % 4 << 5;  // the tokens' place in a row
    const uint32_t base = shared_address(features) + tile;
    uint2 near[2], rear[2];  // two a each
#pragma unroll
    for (int second = 0; second < 2; ++second) {
      const unsigned char *const at = features + Tiles::WEIGHTED + Tiles::by_lanes(2 * warp + second, 16 * step + 2 * place);
      near[second] = *reinterpret_cast<const uint2 *>(at), rear[second] = *reinterpret_cast<const uint2 *>(at + Tiles::by_lanes(8, 0));
    }
    uint32_t unit[4];  // rows b, columns tokens
    ldmatrix(unit, base + Tiles::UNITS + (lane_down<kKeys>(lane) ^ across));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t first = i < 2 ? near[i % 2].x : near[i % 2].y, other = i < 2 ? rear[i % 2].x : rear[i % 2].y;
      of[0][i] = multiply_two(unit[i / 2 * 2], first), of[1][i] = multiply_two(unit[i / 2 * 2 + 1], first), of[2][i] = multiply_two(unit[i / 2 * 2 + 1], other);
      of[3][i] = 0u;
    }
    if (warp == 0) ldmatrix(of[3], base + Tiles::LINES + (lane_down<kKeys>(lane) ^ across));
    if (warp == 1 && group == 0)
#pragma unroll
      for (int far = 0; far < 2; ++far) of[3][2 * far] = *reinterpret_cast<const uint32_t *>(features + Tiles::CONSTANT + 2 * (16 * step + 8 * far + 2 * place));
    if (warp == 2) add_masses(unit, base + Tiles::LINES + (lane_down<kKeys>(lane) ^ across), numbers, f, step);
  }
  // The tensor cores are at it while the next 16 tokens' features are made, in the registers of those before.
  __device__ __forceinline__ void multiply(uint32_t (&of)[4][4], uint32_t values, int step) {
    const uint64_t operand = operand_in<kRunValues, true>(values, Tile<kRunValues>::rows_at(step));
    warpgroup_keep(of);
    warpgroup_begin();
#pragma unroll
    for (int i = 0; i < 4; ++i) WarpgroupProduct<T, kRunValues, true>::run(sums[i], of[i], operand, true);
    warpgroup_commit();
    warpgroup_wait<1>();
  }
  // A chunk's tokens, of whose function f are the numbers.
  __device__ __forceinline__ void add(const unsigned char *features, uint32_t values, const ChunkNumbers &numbers, const Coefficients &f) {
#pragma unroll 1  // the code of a block's warpgroups together is more than the caches of instructions hold
    for (int step = 0; step < kRunTokens / 16; step += 2) {
      uint32_t of[2][4][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) make(of[i % 2], features, numbers, f, step + i), multiply(of[i % 2], values, step + i);
      warpgroup_wait<0>();
#pragma unroll
      for (int i = 0; i < 4; ++i) warpgroup_keep(sums[i]);
    }
  }
  __device__ __forceinline__ void add_masses(const uint32_t (&unit)[4], uint32_t weighted_unit, const ChunkNumbers &numbers, const Coefficients &f, int step) {
    uint32_t weighted[4], weights[2] = {E::kOnes, E::kOnes};
    if constexpr (!BACK) ldmatrix(weighted, weighted_unit);
#pragma unroll
    for (int far = 0; far < 2; ++far) {
      const float2 two = *reinterpret_cast<const float2 *>(numbers.mass_weight + 16 * step + 8 * far + 2 * place);
      count = fmaf(f.a, two.x + two.y, count);
      if constexpr (BACK) {
        weights[far] = E::pack(f.beta * two.x, f.beta * two.y);
#pragma unroll
        for (int i = 2 * far; i < 2 * far + 2; ++i) weighted[i] = E::pack(E::low(unit[i]) * (f.gamma * two.x), E::high(unit[i]) * (f.gamma * two.y));
      }
    }
    E::mma(masses[0], weighted, unit[0], unit[2]), E::mma(masses[1], weighted, unit[1], unit[3]);
    if constexpr (BACK) E::mma(lines, unit, weights[0], weights[1]);
    else E::mma(lines, weighted, weights[0], weights[1]);
  }

  // The state as readers take it. Of keys' the mean of the values is taken out, so that small differences survive rounding.
  __device__ __forceinline__ void publish(unsigned char *state, StateMargins &margins) const {
    const int lane = remade(threadIdx.x) & 31, group = lane >> 2, place = lane & 3;  // made again: registers are short
    if (warp == 1 && group == 0)
#pragma unroll
      for (int n = 0; n < kRunValues / 8; ++n) *reinterpret_cast<float2 *>(margins.values + 8 * n + 2 * place) = make_float2(sums[3][n][0], sums[3][n][1]);
    if (warp == 2) {
#pragma unroll
      for (int i = 0; i < 8; ++i) margins.masses[group + i / 2 % 2 * 8][i / 4 * 8 + 2 * place + i % 2] = masses[i / 4][i % 4];
      if (place == 0) margins.lines[group] = lines[0], margins.lines[group + 8] = lines[2];
      const float all = over_place(count);
      if (lane == 0) margins.count = all;
    }
    barrier_sync<kKeepers>(kMarginsWritten);
    const float inverse = BACK ? 0.f : margins.inverse_count();
    const uint32_t base = shared_address(state);
    const int near = 2 * warp, b = lane & 7, second = lane >> 3 & 1, piece = lane >> 4;  // of a lane's part in stmatrix
    const auto mass_of = [&](int row, int column) { return make_float2(margins.masses[row][column], margins.masses[row + 1][column]); };
    const float2 of_items[4] = {mass_of(near, group), mass_of(near, 8 + group), mass_of(8 + near, 8 + group), make_float2(margins.lines[group], margins.lines[group + 8])};
#pragma unroll
    for (int n = 0; n < kRunValues / 16; ++n) {
      float2 means[2];
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        means[t] = *reinterpret_cast<const float2 *>(margins.values + 16 * n + 8 * t + 2 * place);
        means[t].x *= inverse, means[t].y *= inverse;
      }
      const auto store = [&](int slot, int row) {
        store_block(base + Tile<kRunValues>::at(row, 2 * n + piece), sums[slot][2 * n], sums[slot][2 * n + 1], means, of_items[slot], lane);
      };
      store(0, row_of(near + second, b)), store(1, row_of(near + second, 8 + b));
      if constexpr (PASS != Pass::OUTPUT) store(1, row_of(8 + b, near + second));  // in the other order as well
      store(2, row_of(8 + near + second, 8 + b));
      if (warp == 0) store(3, 16 * kRunItems + 8 * second + b);
    }
    if constexpr (S::HAS_VALUES)
      if (warp == 1 && group == 0)
#pragma unroll
        for (int n = 0; n < kRunValues / 8; ++n) {
          const float x = sums[3][n][0], y = sums[3][n][1];
          const uint32_t high = E::pack(x, y), low = E::pack(x - E::low(high), y - E::high(high));
          *reinterpret_cast<uint32_t *>(state + Tile<kRunValues>::at(kRunRows, n) + 4 * place) = high;
          *reinterpret_cast<uint32_t *>(state + Tile<kRunValues>::at(kRunRows + 1, n) + 4 * place) = low;
        }
  }
  static __device__ __forceinline__ void store_block(uint32_t to, const float (&left)[4], const float (&right)[4], const float2 (&means)[2], float2 mass, int lane) {
    uint32_t packed[4];
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      const float (&x)[4] = t ? right : left;
      packed[2 * t] = BACK ? E::pack(x[0], x[1]) : E::pack(x[0] - means[t].x * mass.x, x[1] - means[t].y * mass.x);
      packed[2 * t + 1] = BACK ? E::pack(x[2], x[3]) : E::pack(x[2] - means[t].x * mass.y, x[3] - means[t].y * mass.y);
    }
    stmatrix(to, packed, lane);
  }
};

// The chunks of a segment, one after the other: the state behind each is there for the next.
template <Pass PASS> __device__ __forceinline__ void keep_state(const Running &args, const RunPlace<PASS> &at, unsigned char *shared) {
  using S = RunShape<PASS>;
  StateMargins *const margins = reinterpret_cast<StateMargins *>(shared + S::MARGINS_AT);
  const ChunkNumbers *const numbers = reinterpret_cast<const ChunkNumbers *>(shared + S::NUMBERS_AT);
  StateKeeper<PASS> keeper;
  const auto keep_edge = [&](int step) {
    if (float *const edge = PASS == Pass::OUTPUT ? nullptr : at.edge(args, step)) keeper.save(edge);
  };
  if constexpr (S::HAS_VALUES)
#pragma unroll
    for (int i = 0; i < 2; ++i) *reinterpret_cast<uint4 *>(shared + i * S::STATE + kRunRows * kRunValues * 2 + 16 * (threadIdx.x % kKeepers)) = make_uint4(0, 0, 0, 0);
  if (at.has_start) keeper.load(at.start(args)), keeper.publish(shared, margins[0]), keep_edge(0);
  warpgroup_publish();
  step_is_here(0);
  const int steps = at.steps();
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    await_chunk(step);
    const int chunk = step / at.heads + 1;
    const bool wanted = chunk < at.chunks;  // nobody asks for what is behind the last
    if (wanted && step % at.heads == 0 && numbers[step % 2].kept != 1.f) keeper.scale(numbers[step % 2].kept);
    if (wanted)
      keeper.add(shared + S::FEATURES_AT + step % 2 * FeatureTiles::BYTES, shared_address(shared) + S::OTHERS_AT + step % 2 * S::OTHERS + S::X, numbers[step % 2],
                 at.coefficients(step));
    leave_chunk(step, steps);
    if (step > 0) await_state_left(step - 1);
    if (wanted && (step + 1) % at.heads == 0) keeper.publish(shared + chunk % 2 * S::STATE, margins[chunk % 2]), keep_edge(step + 1);
    warpgroup_publish();
    if (step + 1 < steps) step_is_here(step + 1);
  }
}

// The other warpgroups of a block do their work here: whether this one was among them.
template <Pass PASS> __device__ __forceinline__ bool helps_readers(const Running &args, const RunPlace<PASS> &at, unsigned char *shared) {
  using S = RunShape<PASS>;
  if (threadIdx.x < kReaders) {
    take_registers<kReaderRegisters>();
    return false;
  }
  if (threadIdx.x < kReaders + kKeepers) {
    take_registers<kKeeperRegisters>();
    keep_state<PASS>(args, at, shared);
  } else {
    bring_chunks<PASS, true>(args, at, shared_address(shared), shared + S::FEATURES_AT, reinterpret_cast<ChunkNumbers *>(shared + S::NUMBERS_AT),
                             threadIdx.x - kReaders - kKeepers);
  }
  return true;
}

// The state of each segment alone: two warpgroups a block.
template <Pass PASS> struct SumsOfSegments {
  using S = RunShape<PASS>;
  static constexpr int FEATURES_AT = 2 * S::OTHERS, NUMBERS_AT = FEATURES_AT + 2 * FeatureTiles::BYTES, SHARED = NUMBERS_AT + 2 * sizeof(ChunkNumbers);
};
template <Pass PASS> __global__ void __launch_bounds__(kReaders, 2) running_sums_kernel(const __grid_constant__ Running args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using S = RunShape<PASS>;
  constexpr bool BACK = PASS == Pass::COLUMNS;
  extern __shared__ __align__(1024) unsigned char shared[];
  const RunPlace<PASS> at(args, args.of.problem.key_heads);
  if (at.segment == (BACK ? 0 : args.segments - 1)) return;  // nobody asks
  const int thread = threadIdx.x, steps = at.steps();
  const uint32_t base = shared_address(shared) - S::OTHERS_AT;
  unsigned char *const features = shared + SumsOfSegments<PASS>::FEATURES_AT;
  ChunkNumbers *const numbers = reinterpret_cast<ChunkNumbers *>(shared + SumsOfSegments<PASS>::NUMBERS_AT);
  if (thread < kBringers) {
    bring_chunks<PASS, false>(args, at, base, features, numbers, thread);
    return;
  }
  take_registers<kKeeperRegisters>();
  StateKeeper<PASS, kBringers / 32> keeper;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    __syncthreads();
    if (step % at.heads == 0) keeper.scale(numbers[step % 2].kept);
    keeper.add(features + step % 2 * FeatureTiles::BYTES, base + S::OTHERS_AT + step % 2 * S::OTHERS + S::X, numbers[step % 2], at.coefficients(step));
  }
  keeper.save(at.start(args));
#endif
}

// In place of each segment's sums those of all before it, or behind it.
template <bool BACK> __global__ void __launch_bounds__(kReaders) running_scan_kernel(const __grid_constant__ Running args) {
  const int index = blockIdx.x * kReaders + threadIdx.x;
  if (index >= 141 * kKeepers) return;
  float *const records = args.starts + static_cast<int64_t>(blockIdx.y) * args.segments * kStartFloats;
  float state = 0.f;
  for (int i = 0; i < args.segments; ++i) {
    float *const record = records + (BACK ? args.segments - 1 - i : i) * static_cast<int64_t>(kStartFloats);
    const float own = i + 1 < args.segments ? record[index] : 0.f, kept = i + 1 < args.segments ? record[141 * kKeepers] : 0.f;
    record[index] = state, state = state * kept + own;
  }
}

}  // namespace linattn_pairs
