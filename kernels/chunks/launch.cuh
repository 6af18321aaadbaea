// How the kernels of one dtype and head dim are put together; instantiated once a translation unit, so that they compile in parallel.
#pragma once
#include <algorithm>

#include "chunks/cut.h"
#include "chunks/rows.cuh"
#include "chunks/states.cuh"
#include "chunks/walk.cuh"

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
    args.problem = problem, args.chunk = plan.segment_length, args.chunks = plan.segments;
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

  template <Pass PASS> cudaError_t walk(WalkArguments args, int row_heads) const {
    using S = WalkShape<D>;
    args.problem = problem, args.segment = plan.segment_length, args.segments = plan.segments;
    return launch(problem.normalize_qk ? walk_kernel<D, PASS, true> : walk_kernel<D, PASS, false>, problem.batch * row_heads * plan.segments, S::THREADS, S::SHARED, stream, args);
  }

  cudaError_t forward(const linattn_forward_result &result) const {
    float *const all = static_cast<float *>(problem.workspace);
    const bool stateful = plan.segments > 1 || !problem.causal || problem.initial_state || result.state;
    if (stateful) {
      StateArguments args{};
      args.y = keys(), args.z = values(), args.states = all;
      LINATTN_TRY(states<false>(args, problem.initial_state, result.state));
    }
    const float *const before = plan.segments > 1 || !problem.causal || problem.initial_state ? all : nullptr;
    if constexpr (kWalks<T, D>) {
      WalkArguments args{};
      args.x[0] = queries(), args.tiles[0] = keys(), args.tiles[1] = values(), args.written[0] = {result.out, {}, result.mass}, args.states = before;
      return walk<Pass::kOut>(args, problem.query_heads);
    } else {
      RowArguments args{};
      args.x = queries(), args.y = keys(), args.z = values(), args.written = {result.out, {}, result.mass}, args.states = before;
      return rows<Role::kOut>(args, problem.query_heads);
    }
  }

  cudaError_t backward(const linattn_backward_data &data) const {
    const Workspace workspace(problem, plan);
    float *const base = static_cast<float *>(problem.workspace), *const all = base + workspace.states, *const error = base + workspace.error,
                 *const partials = base + workspace.partials;
    const Vectors gradients{data.grad_out, false, data.mass};
    const bool several = plan.segments > 1 || !problem.causal;

    const float *before = nullptr, *behind = nullptr;
    if (several || problem.initial_state) {
      StateArguments of_keys{};
      of_keys.y = keys(), of_keys.z = values(), of_keys.states = all;
      LINATTN_TRY(states<false>(of_keys, problem.initial_state, nullptr));
      before = all;
    }
    if constexpr (kWalks<T, D>) {
      WalkArguments args{};
      args.error = error, args.partials = partials, args.states = before;
      args.x[0] = gradients, args.tiles[0] = values(), args.tiles[1] = keys(), args.written[0] = {data.grad_query, problem.query, nullptr};
      args.out = data.out, args.grad_mass = data.grad_mass;
      LINATTN_TRY(walk<Pass::kQuery>(args, problem.query_heads));
    } else {
      RowArguments args{};
      args.error = error, args.partials = partials, args.states = before;
      args.x = gradients, args.y = values(), args.z = keys(), args.written = {data.grad_query, problem.query, nullptr}, args.out = data.out, args.grad_mass = data.grad_mass;
      LINATTN_TRY(rows<Role::kQuery>(args, problem.query_heads));
    }

    if (several || data.grad_state || data.grad_initial_state) {
      StateArguments of_queries{};
      of_queries.y = queries(), of_queries.z = gradients, of_queries.error = error, of_queries.states = all;
      LINATTN_TRY(states<true>(of_queries, data.grad_state, data.grad_initial_state));
      if (several || data.grad_state) behind = all;
    }
    if constexpr (kWalks<T, D>) {
      WalkArguments args{};
      args.error = error, args.states = behind;
      args.x[0] = keys(), args.x[1] = values(), args.tiles[0] = queries(), args.tiles[1] = gradients;
      args.written[0] = {data.grad_value, {}, nullptr}, args.written[1] = {data.grad_key, problem.key, nullptr};
      LINATTN_TRY(walk<Pass::kColumns>(args, problem.key_heads));
    } else {
      RowArguments args{};
      args.error = error, args.states = behind;
      args.x = keys(), args.y = queries(), args.z = gradients, args.written = {data.grad_value, {}, nullptr};
      LINATTN_TRY(rows<Role::kValue>(args, problem.key_heads));
      args.x = values(), args.y = gradients, args.z = queries(), args.written = {data.grad_key, problem.key, nullptr};
      LINATTN_TRY(rows<Role::kKey>(args, problem.key_heads));
    }
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

template <typename T, int D> int shared_bytes() {
  if constexpr (kWalks<T, D>) return std::max(WalkShape<D>::SHARED, StateShape<T, D>::SHARED);
  else return std::max(RowShape<T, D>::SHARED, StateShape<T, D>::SHARED);
}

#define LINATTN_CHUNKS_INSTANTIATE(T, D)                                                                     \
  template int shared_bytes<T, D>();                                                                         \
  template cudaError_t forward<T, D>(const linattn_problem &, const linattn_forward_result &, const Plan &); \
  template cudaError_t backward<T, D>(const linattn_problem &, const linattn_backward_data &, const Plan &);

}  // namespace linattn_chunks
