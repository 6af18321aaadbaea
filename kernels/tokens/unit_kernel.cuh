// The kernel of units, by what a launch asks for.
#pragma once
#include "tokens/unit_results.cuh"
#include "tokens/unit_rows.cuh"
#include "tokens/unit_tokens.cuh"

namespace linattn {
namespace {

template <int DIM, int DEGREE, int TILES, int STEPS> __global__ void __launch_bounds__(Units<DIM, DEGREE, TILES, STEPS>::THREADS, Units<DIM, DEGREE, TILES, STEPS>::BLOCKS)
    units_kernel(const SeveralArguments args) {
  using Work = Units<DIM, DEGREE, TILES, STEPS>;
  extern __shared__ __align__(16) float shared[];
  __shared__ typename Work::Fixed fixed;
  Work work(args, fixed, shared);
  work.begin();
  work.weigh_tokens();
  work.work();
  work.read_tokens();
  work.take_in_one();
  work.finish();
}

template <int DIM, int DEGREE, int TILES, int STEPS> SeveralKernel units() {
  using Work = Units<DIM, DEGREE, TILES, STEPS>;
  return {Work::WARPS, Work::SHARED_BYTES, sizeof(typename Work::Fixed), Work::BLOCKS, Work::COUNT, Work::RUNS, units_kernel<DIM, DEGREE, TILES, STEPS>};
}
template <int DIM, int DEGREE, int TILES> SeveralKernel units(int tokens) { return tokens <= 8 ? units<DIM, DEGREE, TILES, 1>() : units<DIM, DEGREE, TILES, 2>(); }

}  // namespace
}  // namespace linattn
