// The functions of linattn.h: each problem goes to the fastest path that takes it.
#include "linattn.h"
#include "paths.h"

#ifndef LINATTN_ARCHITECTURES
#define LINATTN_ARCHITECTURES "unknown"
#endif

namespace {

constexpr int MAX_DIM = 256, OLDEST = 80;

bool card_runs_it() {
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) return false;
  if (cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) return false;
  return major * 10 + minor >= OLDEST;
}

bool valid(const linattn_problem &p) {
  const bool sizes = p.batch > 0 && p.length > 0 && p.key_heads > 0 && p.query_heads % p.key_heads == 0 &&
                     (p.state_heads == p.key_heads || p.state_heads == p.query_heads);
  const bool dims = p.head_dim >= 1 && p.head_dim <= MAX_DIM && p.value_dim >= 1 && p.value_dim <= MAX_DIM;
  const bool decay = p.log_decay == nullptr || p.causal;
  const bool segments = (p.query_segments == nullptr) == (p.key_segments == nullptr);
  return sizes && dims && decay && segments && (p.degree == 1 || p.degree == 2);
}

const char *path_of(const linattn_problem &p, bool mma, bool pairs) {
  if (!valid(p) || !card_runs_it()) return "none";
  return mma ? "mma" : pairs ? "pairs" : "generic";
}

}  // namespace

extern "C" {

int64_t linattn_forward_workspace(const linattn_problem *problem) {
  if (linattn::pairs_takes_forward(*problem)) return linattn::pairs_forward_workspace(*problem);
  return linattn::mma_takes_forward(*problem) ? linattn::mma_forward_workspace(*problem) : linattn::generic_forward_workspace(*problem);
}

int64_t linattn_backward_workspace(const linattn_problem *problem) {
  if (linattn::pairs_takes_backward(*problem)) return linattn::pairs_backward_workspace(*problem);
  return linattn::mma_takes_backward(*problem) ? linattn::mma_backward_workspace(*problem) : linattn::generic_backward_workspace(*problem);
}

int linattn_forward(const linattn_problem *problem, const linattn_forward_result *result) {
  if (!valid(*problem)) return cudaErrorInvalidValue;
  if (linattn::pairs_takes_forward(*problem)) return linattn::pairs_forward(*problem, *result);
  return linattn::mma_takes_forward(*problem) ? linattn::mma_forward(*problem, *result) : linattn::generic_forward(*problem, *result);
}

int linattn_backward(const linattn_problem *problem, const linattn_backward_data *data) {
  if (!valid(*problem)) return cudaErrorInvalidValue;
  if (linattn::pairs_takes_backward(*problem)) return linattn::pairs_backward(*problem, *data);
  return linattn::mma_takes_backward(*problem) ? linattn::mma_backward(*problem, *data) : linattn::generic_backward(*problem, *data);
}

const char *linattn_error_string(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

const char *linattn_forward_path(const linattn_problem *problem) {
  const bool sound = valid(*problem);
  return path_of(*problem, sound && linattn::mma_takes_forward(*problem), sound && linattn::pairs_takes_forward(*problem));
}

const char *linattn_backward_path(const linattn_problem *problem) {
  const bool sound = valid(*problem);
  return path_of(*problem, sound && linattn::mma_takes_backward(*problem), sound && linattn::pairs_takes_backward(*problem));
}

const char *linattn_architectures(void) { return LINATTN_ARCHITECTURES; }

int64_t linattn_struct_bytes(int which) {
  return which == 0 ? sizeof(linattn_problem) : which == 1 ? sizeof(linattn_forward_result) : sizeof(linattn_backward_data);
}

}  // extern "C"
