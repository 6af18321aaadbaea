// The kernel of columns and its results, by what a launch asks for.
#pragma once
#include "tokens/column_state.cuh"
#include "tokens/column_tokens.cuh"

namespace linattn {
namespace {

template <int DIM, int STEPS> __device__ __forceinline__ void Columns<DIM, STEPS>::begin() const {
  const Decays::Token token = Decays::token_of(p, at, lane);
  float numbers[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) numbers[i] = thread < pairs && i != 2 ? p.coefficients[i * p.query_heads + first_query + head_of(thread)] : 0.f;
  send_for_vectors();
  linattn_tile::copy_commit();
  send_for_state();
  linattn_tile::copy_commit();
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (thread < 16 * tiles) fixed.numbers[i][thread] = numbers[i];
  if (warp == WARPS - 1) fixed.look_at_tokens(token, tokens, lane);
  linattn_tile::copy_wait<1>();
  __syncthreads();
}

template <int DIM, int STEPS> __device__ __forceinline__ void Columns<DIM, STEPS>::write() const {
  uint16_t *const out = static_cast<uint16_t *>(args.out.data) + offset_of(args.out, at.batch, first_query, 0) + column_of(0, 2 * place);
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    float sums[2][4] = {}, of_low[2][4] = {};
#pragma unroll
    for (int slice = 0; slice < SLICES; ++slice) {
      uint32_t left[4];
      load_queries(left, tile, slice);
#pragma unroll
      for (int eight = 0; eight < 2; ++eight) {
        linattn_tile::mma_bf16(of_low[eight], left, low[slice][eight][0], low[slice][eight][1]);
        linattn_tile::mma_bf16(sums[eight], left, high[slice][eight][0], high[slice][eight][1]);
      }
    }
    const uint4 first = weights_of(tile)[0], second = weights_of(tile)[1];
    const uint32_t of_tokens[2][4] = {{first.x, first.y, first.z, first.w}, {second.x, second.y, second.z, second.w}};
    float inverse[2];
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int pair = 16 * tile + group + 8 * side;
      const float scale = fixed.of_state[pair], of_one = fixed.of_one[pair];
      inverse[side] = pair < pairs ? fixed.inverses[pair] : 0.f;
#pragma unroll
      for (int eight = 0; eight < 2; ++eight)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float &sum = sums[eight][2 * side + i];
          sum = fmaf(sum + of_low[eight][2 * side + i], scale, of_one * one[eight][i]);
        }
    }
#pragma unroll
    for (int part = 1; part >= 0; --part)
#pragma unroll
      for (int eight = 0; eight < 2; ++eight) linattn_tile::mma_bf16(sums[eight], of_tokens[part], value[eight][0], STEPS == 2 ? value[eight][STEPS - 1] : 0u);
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int pair = 16 * tile + group + 8 * side, head = head_of(pair);
      if (pair >= pairs) continue;
      uint32_t bits[2];
#pragma unroll
      for (int eight = 0; eight < 2; ++eight)
        bits[eight] = inverse[side] == 0.f ? 0u : linattn_tile::pack_bf16(sums[eight][2 * side] * inverse[side], sums[eight][2 * side + 1] * inverse[side]);
      *reinterpret_cast<uint2 *>(out + head * static_cast<int>(args.out.head_stride) + (pair - head * tokens) * static_cast<int>(args.out.token_stride)) =
          make_uint2(bits[0], bits[1]);
    }
  }
}

template <int DIM, int STEPS> __global__ void __launch_bounds__(Columns<DIM, STEPS>::THREADS, Columns<DIM, STEPS>::BLOCKS) columns_kernel(const SeveralArguments args) {
  using Work = Columns<DIM, STEPS>;
  extern __shared__ __align__(16) float shared[];
  __shared__ typename Work::Fixed fixed;
  Work work(args, fixed, reinterpret_cast<unsigned char *>(shared));
  work.begin();
  work.measure();
  __syncthreads();
  work.weigh_tokens();
  work.make_keys();
  linattn_tile::copy_wait<0>();
  __syncthreads();
  work.weigh_state();
  work.take_in();
  __syncthreads();
  work.take_in_ones();
  __syncthreads();
  work.write_state();
  work.write();
}

template <int DIM, int STEPS> SeveralKernel columns(int pairs) {
  using Work = Columns<DIM, STEPS>;
  return {Work::WARPS, Work::shared_bytes((pairs + 15) / 16), sizeof(typename Work::Fixed), Work::BLOCKS, 1, 1, columns_kernel<DIM, STEPS>};
}

}  // namespace
}  // namespace linattn
