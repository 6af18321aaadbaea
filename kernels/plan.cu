// architectures: sm_80
// The functions of linattn.h, and the one place that decides which engine does a call: the first of the table that takes it, as it is or
// padded.
#include "plan.h"

#include "card.h"
#include "interface.h"
#include "padded.h"
#include "runs.h"

#ifndef LINATTN_ARCHITECTURES
#define LINATTN_ARCHITECTURES "unknown"
#endif

namespace {

constexpr int MAX_DIM = 256, OLDEST = 80;

bool card_runs_it() { return linattn::card(cudaDevAttrComputeCapabilityMajor) * 10 + linattn::card(cudaDevAttrComputeCapabilityMinor) >= OLDEST; }

bool valid(const linattn_problem &p) {
  const bool sizes = p.batch > 0 && p.length > 0 && p.key_heads > 0 && p.query_heads % p.key_heads == 0 && (p.state_heads == p.key_heads || p.state_heads == p.query_heads);
  const bool dims = p.head_dim >= 1 && p.head_dim <= MAX_DIM && p.value_dim >= 1 && p.value_dim <= MAX_DIM;
  const bool decay = p.log_decay == nullptr || p.causal;
  const bool segments = (p.query_segments == nullptr) == (p.key_segments == nullptr);
  return sizes && dims && decay && segments && (p.degree == 1 || p.degree == 2);
}

// A direction of the operator: what its results are called, and the function of an engine that plans it or runs it.
template <typename Results> struct Engine {
  linattn_engine engine;
  bool (*plan)(const linattn_problem &, const Results &, linattn_plan &);
  cudaError_t (*run)(const linattn_problem &, const Results &, const linattn_plan &);
};

// Fastest first; the generic kernels take all that fits the card.
constexpr Engine<linattn_forward_result> FORWARD[] = {
    {LINATTN_TOKENS, linattn::tokens_plan_forward, linattn::tokens_forward},     // a few tokens on a state
    {LINATTN_PAIRS, linattn::pairs_plan_forward, linattn::pairs_forward},        // the second degree
    {LINATTN_STREAM, linattn::stream_plan_forward, linattn::stream_forward},     // 16 bits
    {LINATTN_CHUNKS, linattn::chunks_plan_forward, linattn::chunks_forward},     // float32, and wide heads
    {LINATTN_GENERIC, linattn::generic_plan_forward, linattn::generic_forward},  // the rest
};
constexpr Engine<linattn_backward_data> BACKWARD[] = {
    {LINATTN_PAIRS, linattn::pairs_plan_backward, linattn::pairs_backward},
    {LINATTN_STREAM, linattn::stream_plan_backward, linattn::stream_backward},
    {LINATTN_CHUNKS, linattn::chunks_plan_backward, linattn::chunks_backward},
    {LINATTN_GENERIC, linattn::generic_plan_backward, linattn::generic_backward},
};
constexpr Engine<linattn_forward_result> STEP[] = {
    {LINATTN_DECODE, linattn::decode_plan, linattn::decode},
    {LINATTN_TOKENS, linattn::tokens_plan_step, linattn::tokens_step},
};

// The first engine that takes the problem and fits the card, in its plan.
template <typename Results, int COUNT> linattn_plan first(const Engine<Results> (&engines)[COUNT], const linattn_problem &problem, const Results &results) {
  const int shared = linattn::shared_memory();
  for (const Engine<Results> &engine : engines) {
    linattn_plan plan{};
    if (!engine.plan(problem, results, plan) || plan.shared_bytes > shared) continue;
    plan.engine = engine.engine;
    return plan;
  }
  return {};
}

template <typename Results, int COUNT> void choose(const Engine<Results> (&engines)[COUNT], const linattn_problem &problem, const Results &results, linattn_plan &plan) {
  plan = {};
  if (!valid(problem) || !card_runs_it()) return;
  plan = first(engines, problem, results);
  const int dim = linattn::padded_dim(problem);
  if (plan.engine != LINATTN_GENERIC || dim == 0 || !linattn::states_fit(problem, results)) return;
  linattn_plan wide = first(engines, linattn::padded(problem, dim), linattn::padded(results));
  if (wide.engine == LINATTN_GENERIC || wide.engine == LINATTN_NONE) return;
  wide.padded_dim = dim, plan = wide;
}

template <typename Results, int COUNT> int run(const Engine<Results> (&engines)[COUNT], const linattn_problem &problem, const Results &results, const linattn_plan &plan) {
  for (const Engine<Results> &engine : engines)
    if (engine.engine == plan.engine && plan.padded_dim == 0) return engine.run(problem, results, plan);
  return cudaErrorInvalidValue;
}

}  // namespace

extern "C" {

void linattn_plan_forward(const linattn_problem *problem, const linattn_forward_result *result, linattn_plan *plan) { choose(FORWARD, *problem, *result, *plan); }
void linattn_plan_backward(const linattn_problem *problem, const linattn_backward_data *data, linattn_plan *plan) { choose(BACKWARD, *problem, *data, *plan); }
void linattn_plan_step(const linattn_problem *problem, const linattn_forward_result *result, linattn_plan *plan) { choose(STEP, *problem, *result, *plan); }

int linattn_forward(const linattn_problem *problem, const linattn_forward_result *result, const linattn_plan *plan) { return run(FORWARD, *problem, *result, *plan); }
int linattn_backward(const linattn_problem *problem, const linattn_backward_data *data, const linattn_plan *plan) { return run(BACKWARD, *problem, *data, *plan); }
int linattn_step(const linattn_problem *problem, const linattn_forward_result *result, const linattn_plan *plan) { return run(STEP, *problem, *result, *plan); }

const char *linattn_error_string(int code) {
  cudaGetLastError();  // it has been told: the runtime would tell it again of the next call, whoever makes it
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

const char *linattn_engine_name(linattn_engine engine) {
  constexpr const char *NAMES[] = {"none", "pairs", "stream", "chunks", "generic", "decode", "tokens"};
  return NAMES[engine];
}

const char *linattn_architectures(void) { return LINATTN_ARCHITECTURES; }

int linattn_interface(void) { return LINATTN_INTERFACE; }

int64_t linattn_struct_bytes(int which) {
  constexpr int64_t BYTES[] = {sizeof(linattn_problem), sizeof(linattn_forward_result), sizeof(linattn_backward_data), sizeof(linattn_plan),
                               sizeof(linattn_window),  sizeof(linattn_beside),         sizeof(linattn_segments),      sizeof(linattn_decay)};
  return BYTES[which];
}

}  // extern "C"
