// Calls whose rows are copied to wider, aligned ones, with zeros behind, which change no score, norm, sum or gradient: so other head dims, and rows
// that begin anywhere, go to the engines that are fast at a few dims. Here is when that is worth it; the copies are the caller's.
#pragma once
#include <algorithm>
#include <iterator>

#include "linattn.h"

namespace linattn {

constexpr int PADDED_DIMS[] = {32, 64, 80, 96, 128, 192, 256}, SHORTEST_PADDED = 64;

// The next dim that some engine has, or 0 where copies, or what is computed of zeros, cost more than they save. The generic kernels take three to
// six times as long as the others at the same dims: in the first degree the product of both dims may grow fourfold (below 32 it saves them little).
// The second degree's pairs cost less than its state up to 8 D^2 tokens at equal dims, and grow with the padded one.
inline int padded_dim(const linattn_problem &p) {
  const int dim = *std::lower_bound(std::begin(PADDED_DIMS), std::end(PADDED_DIMS), std::max(p.head_dim, p.value_dim));
  const bool less = p.degree == 1 ? dim * dim <= 4 * std::max(p.head_dim, 32) * std::max(p.value_dim, 32) : p.length * dim <= int64_t{8} * p.head_dim * p.head_dim * p.value_dim;
  return less && p.length >= SHORTEST_PADDED ? dim : 0;
}

// A state of the second degree has a row for each pair of features: it is not padded.
inline bool states_fit(const linattn_problem &p, const float *state) { return p.degree == 1 || (p.initial_state == nullptr && state == nullptr); }
inline bool states_fit(const linattn_problem &p, const linattn_forward_result &result) { return states_fit(p, result.state); }
inline bool states_fit(const linattn_problem &p, const linattn_backward_data &data) { return states_fit(p, data.grad_state); }

// The call as it will be. Rows that are not there yet begin where any engine wishes.
inline linattn_problem padded(linattn_problem p, int dim) {
  p.head_dim = p.value_dim = dim;
  p.query = p.key = p.value = {};
  return p;
}
inline linattn_forward_result padded(linattn_forward_result result) {
  result.out = {};
  return result;
}
inline linattn_backward_data padded(linattn_backward_data data) {
  data.out = data.grad_out = data.grad_query = data.grad_key = data.grad_value = {};
  return data;
}

}  // namespace linattn
