// The kernels of several tokens at head dims where models live, as a launch takes them.
#pragma once
#include "decode.cuh"

namespace linattn {

struct SeveralArguments : StepArguments {
  int32_t one_token;  // of 65,536 parts, rounded up: a quotient of few numbers by the tokens is one product
};

struct SeveralKernel {
  int warps, shared_bytes;           // a launch asks for
  int fixed_bytes;                   // of shared memory beside them, which the kernel declares
  int blocks;                        // of a multiprocessor at once
  int units, runs;                   // parts of a state that warps take in turns, and warps of a block that do: blocks may share a state's
  void (*kernel)(SeveralArguments);  // null: there is none
};

// For a head dim, which the value dim equals, so many pairs of a query head and a token to a state, and so many tokens, in bfloat16.
SeveralKernel kernel_of_first_degree(int dim, int pairs, int tokens);
SeveralKernel kernel_of_second_degree(int dim, int pairs, int tokens);

}  // namespace linattn
