// architectures: sm_80
// The functions of linattn.h: each problem goes to the fastest path that takes it.
#include "card.h"
#include "paths.h"

#ifndef LINATTN_ARCHITECTURES
#define LINATTN_ARCHITECTURES "unknown"
#endif

namespace {

constexpr int MAX_DIM = 256, OLDEST = 80;

bool card_runs_it() {
  return linattn::card(cudaDevAttrComputeCapabilityMajor) * 10 + linattn::card(cudaDevAttrComputeCapabilityMinor) >= OLDEST;
}

bool valid(const linattn_problem &p) {
  const bool sizes = p.batch > 0 && p.length > 0 && p.key_heads > 0 && p.query_heads % p.key_heads == 0 &&
                     (p.state_heads == p.key_heads || p.state_heads == p.query_heads);
  const bool dims = p.head_dim >= 1 && p.head_dim <= MAX_DIM && p.value_dim >= 1 && p.value_dim <= MAX_DIM;
  const bool decay = p.log_decay == nullptr || p.causal;
  const bool segments = (p.query_segments == nullptr) == (p.key_segments == nullptr);
  return sizes && dims && decay && segments && (p.degree == 1 || p.degree == 2);
}

// The ways to do a problem, fastest first; the last takes all.
struct Path {
  const char *name;
  bool (*takes_forward)(const linattn_problem &), (*takes_backward)(const linattn_problem &);
  int64_t (*forward_workspace)(const linattn_problem &), (*backward_workspace)(const linattn_problem &);
  cudaError_t (*forward)(const linattn_problem &, const linattn_forward_result &);
  cudaError_t (*backward)(const linattn_problem &, const linattn_backward_data &);
};

bool always(const linattn_problem &) { return true; }

constexpr Path PATHS[] = {
    {"pairs", linattn::pairs_takes_forward, linattn::pairs_takes_backward, linattn::pairs_forward_workspace, linattn::pairs_backward_workspace, linattn::pairs_forward,
     linattn::pairs_backward},
    {"mma", linattn::mma_takes_forward, linattn::mma_takes_backward, linattn::mma_forward_workspace, linattn::mma_backward_workspace, linattn::mma_forward, linattn::mma_backward},
    {"chunks", linattn::chunks_take, linattn::chunks_take, linattn::chunks_forward_workspace, linattn::chunks_backward_workspace, linattn::chunks_forward, linattn::chunks_backward},
    {"generic", always, always, linattn::generic_forward_workspace, linattn::generic_backward_workspace, linattn::generic_forward, linattn::generic_backward},
};

const Path &path_of(const linattn_problem &problem, bool (*Path::*takes)(const linattn_problem &)) {
  const Path *path = PATHS;
  while (!(path->*takes)(problem)) ++path;
  return *path;
}

const char *name_of(const linattn_problem &problem, bool (*Path::*takes)(const linattn_problem &)) {
  return valid(problem) && card_runs_it() ? path_of(problem, takes).name : "none";
}

}  // namespace

extern "C" {

int64_t linattn_forward_workspace(const linattn_problem *problem) { return path_of(*problem, &Path::takes_forward).forward_workspace(*problem); }

int64_t linattn_backward_workspace(const linattn_problem *problem) { return path_of(*problem, &Path::takes_backward).backward_workspace(*problem); }

int linattn_forward(const linattn_problem *problem, const linattn_forward_result *result) {
  return valid(*problem) ? path_of(*problem, &Path::takes_forward).forward(*problem, *result) : cudaErrorInvalidValue;
}

int linattn_backward(const linattn_problem *problem, const linattn_backward_data *data) {
  return valid(*problem) ? path_of(*problem, &Path::takes_backward).backward(*problem, *data) : cudaErrorInvalidValue;
}

int64_t linattn_step_workspace(const linattn_problem *problem) { return linattn::step_workspace(*problem); }

int linattn_step(const linattn_problem *problem, const linattn_forward_result *result) {
  return valid(*problem) && problem->length == 1 && problem->causal && result->state ? linattn::step(*problem, *result) : cudaErrorInvalidValue;
}

const char *linattn_error_string(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

const char *linattn_forward_path(const linattn_problem *problem) { return name_of(*problem, &Path::takes_forward); }

const char *linattn_backward_path(const linattn_problem *problem) { return name_of(*problem, &Path::takes_backward); }

const char *linattn_architectures(void) { return LINATTN_ARCHITECTURES; }

int64_t linattn_struct_bytes(int which) {
  return which == 0 ? sizeof(linattn_problem) : which == 1 ? sizeof(linattn_forward_result) : sizeof(linattn_backward_data);
}

}  // extern "C"
