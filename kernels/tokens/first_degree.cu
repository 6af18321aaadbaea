// architectures: sm_80 compute_80 sm_90
// A few new tokens of the first degree at head dims of 64 and 128.
#include "tokens/kernel.cuh"

namespace linattn {

UnitsKernel units_of_first_degree(int dim, int pairs, int tokens) {
  if (dim == 128) return pairs <= 16 ? units<128, 1, 1>(tokens) : pairs <= 32 ? units<128, 1, 2>(tokens) : UnitsKernel{};
  if (dim != 64 || pairs > 128) return {};
  if (pairs <= 16) return units<64, 1, 1>(tokens);
  if (pairs <= 32) return units<64, 1, 2>(tokens);
  return pairs <= 64 ? units<64, 1, 4>(tokens) : units<64, 1, 8>(tokens);
}

}  // namespace linattn
