// How the kernels of one dtype and head dim are put together; instantiated once a translation unit, so that they compile in parallel.
#pragma once
#include <algorithm>

#include "chunks/cut.h"
#include "chunks/rows.cuh"
#include "chunks/states.cuh"

namespace linattn_chunks {

template <typename T, int D> struct Launcher {
  const linattn_problem &problem;
  const Plan &plan;
  cudaStream_t stream = static_cast<cudaStream_t>(problem.stream);

  Vectors queries() const { return {problem.query, problem.normalize_qk != 0, nullptr}; }
  Vectors keys() const { return {problem.key, problem.normalize_qk != 0, nullptr}; }
  Vectors values() const { return {problem.value, false, nullptr}; }

  // The state before each chunk (of keys and values), or behind it (of queries and gradients), or of all where there is no mask.
  template <bool QUERIES> cudaError_t states(StateArguments args, const float *initial, float *total) const {
    using S = StateShape<T, D>;
    args.problem = problem, args.chunk = plan.chunk, args.chunks = plan.segments;
    args.unneeded = !problem.causal || total ? -1 : QUERIES ? 0 : plan.segments - 1;
    LINATTN_TRY(launch(states_kernel<T, D, QUERIES>, problem.batch * problem.key_heads * plan.segments * S::SHARES, S::THREADS, S::SHARED, stream, args));
    const Scan scan = !problem.causal ? Scan::kTotal : QUERIES ? Scan::kSuffix : Scan::kPrefix;
    const dim3 grid((D * D + 2 * D + 256) / 256, problem.batch * problem.key_heads);
    scan_kernel<D><<<grid, 256, 0, stream>>>(args.states, nullptr, plan.segments, scan, initial, total);
    return cudaPeekAtLastError();
  }
  template <Role ROLE> cudaError_t rows(RowArguments args, int row_heads) const {
    using S = RowShape<T, D>;
    args.problem = problem, args.chunk = plan.chunk, args.chunks = plan.segments, args.row_tiles = plan.row_tiles;
    return launch(rows_kernel<T, D, ROLE>, problem.batch * row_heads * plan.row_tiles, S::THREADS, S::SHARED, stream, args);
  }

  cudaError_t forward(const linattn_forward_result &result) const {
    float *const all = static_cast<float *>(problem.workspace);
    const bool stateful = plan.segments > 1 || !problem.causal || problem.initial_state || result.state;
    if (stateful) {
      StateArguments args{};
      args.y = keys(), args.z = values(), args.states = all;
      LINATTN_TRY(states<false>(args, problem.initial_state, result.state));
    }
    RowArguments args{};
    args.x = queries(), args.y = keys(), args.z = values(), args.result = result.out, args.mass_out = result.mass;
    args.states = plan.segments > 1 || !problem.causal || problem.initial_state ? all : nullptr;
    return rows<Role::kOut>(args, problem.query_heads);
  }

  cudaError_t backward(const linattn_backward_data &data) const {
    const Workspace workspace(problem, plan);
    float *const base = static_cast<float *>(problem.workspace), *const all = base + workspace.states, *const error = base + workspace.error,
                 *const partials = base + workspace.partials;
    const Vectors gradients{data.grad_out, false, data.mass};
    const bool several = plan.segments > 1 || !problem.causal;

    RowArguments args{};
    args.error = error, args.partials = partials;
    if (several || problem.initial_state) {
      StateArguments of_keys{};
      of_keys.y = keys(), of_keys.z = values(), of_keys.states = all;
      LINATTN_TRY(states<false>(of_keys, problem.initial_state, nullptr));
      args.states = all;
    }
    args.x = gradients, args.y = values(), args.z = keys(), args.result = data.grad_query, args.out = data.out, args.grad_of = problem.query, args.grad_mass = data.grad_mass;
    LINATTN_TRY(rows<Role::kQuery>(args, problem.query_heads));

    args.states = nullptr;
    if (several || data.grad_state || data.grad_initial_state) {
      StateArguments of_queries{};
      of_queries.y = queries(), of_queries.z = gradients, of_queries.error = error, of_queries.states = all;
      LINATTN_TRY(states<true>(of_queries, data.grad_state, data.grad_initial_state));
      if (several || data.grad_state) args.states = all;
    }
    args.x = keys(), args.y = queries(), args.z = gradients, args.result = data.grad_value;
    LINATTN_TRY(rows<Role::kValue>(args, problem.key_heads));
    args.x = values(), args.y = gradients, args.z = queries(), args.result = data.grad_key, args.grad_of = problem.key;
    LINATTN_TRY(rows<Role::kKey>(args, problem.key_heads));
    if (data.grad_coefficients) {
      coefficients_kernel<<<problem.query_heads, 32, 0, stream>>>(partials, problem.coefficients, data.grad_coefficients, problem.batch, problem.query_heads, plan.row_tiles);
      LINATTN_TRY(cudaPeekAtLastError());
    }
    return cudaSuccess;
  }
};

template <typename T, int D> cudaError_t forward(const linattn_problem &problem, const linattn_forward_result &result, const Plan &plan) {
  return Launcher<T, D>{problem, plan}.forward(result);
}
template <typename T, int D> cudaError_t backward(const linattn_problem &problem, const linattn_backward_data &data, const Plan &plan) {
  return Launcher<T, D>{problem, plan}.backward(data);
}

template <typename T, int D> int shared_bytes() { return std::max(RowShape<T, D>::SHARED, StateShape<T, D>::SHARED); }

#define LINATTN_CHUNKS_INSTANTIATE(T, D)                                                                     \
  template int shared_bytes<T, D>();                                                                         \
  template cudaError_t forward<T, D>(const linattn_problem &, const linattn_forward_result &, const Plan &); \
  template cudaError_t backward<T, D>(const linattn_problem &, const linattn_backward_data &, const Plan &);

}  // namespace linattn_chunks
