// architectures: sm_80 compute_80 sm_90
// A few new tokens of the second degree at a head dim of 64.
#include "tokens/unit_kernel.cuh"

namespace linattn {

SeveralKernel kernel_of_second_degree(int dim, int pairs, int tokens) {
  if (dim != 64 || pairs > 128) return {};
  if (pairs <= 16) return units<64, 2, 1>(tokens);
  if (pairs <= 32) return units<64, 2, 2>(tokens);
  if (pairs <= 48) return units<64, 2, 3>(tokens);
  return pairs <= 64 ? units<64, 2, 4>(tokens) : units<64, 2, 8>(tokens);
}

}  // namespace linattn
