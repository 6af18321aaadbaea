// The kernels of units.cuh as a launch takes them.
#pragma once
#include "decode.cuh"

namespace linattn {

struct UnitsArguments : StepArguments {
  int32_t one_token;  // of 65,536 parts, rounded up: a quotient of few numbers by the tokens is one product
};

struct UnitsKernel {
  int warps, shared_bytes;
  int blocks;                        // of a multiprocessor at once
  int units, runs;                   // of a state; warps that they are shared among, in a block
  void (*kernel)(UnitsArguments);     // null: there is none
};

// For a head dim, which the value dim equals, so many pairs of a query head and a token to a state, and so many tokens.
UnitsKernel units_of_first_degree(int dim, int pairs, int tokens);
UnitsKernel units_of_second_degree(int dim, int pairs, int tokens);

}  // namespace linattn
