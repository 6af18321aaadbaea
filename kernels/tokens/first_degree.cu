// architectures: sm_80 compute_80 sm_90
// A few new tokens of the first degree at head dims of 64 and 128: a state's rows in units where pairs are few, else its columns.
#include "tokens/column_kernel.cuh"
#include "tokens/unit_kernel.cuh"

namespace linattn {

SeveralKernel kernel_of_first_degree(int dim, int pairs, int tokens) {
  if (pairs > 128 || (dim != 64 && dim != 128)) return {};
  if (dim == 64 && pairs <= 16) return units<64, 1, 1>(tokens);
  if (dim == 64) return tokens <= 8 ? columns<64, 1>(pairs) : columns<64, 2>(pairs);
  if (pairs <= 32) return pairs <= 16 ? units<128, 1, 1>(tokens) : units<128, 1, 2>(tokens);
  return tokens <= 8 ? columns<128, 1>(pairs) : columns<128, 2>(pairs);
}

}  // namespace linattn
