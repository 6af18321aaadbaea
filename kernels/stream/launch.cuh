// How the kernels of one dtype and head dim are put together; instantiated once a translation unit, so that they compile in parallel.
#pragma once
#include <algorithm>
#include <type_traits>

#include "card.h"
#include "stream/columns.cuh"
#include "stream/cut.h"
#include "stream/rows.cuh"
#include "stream/segments.cuh"
#include "tile/launch.cuh"
#include "tile/scan.cuh"

namespace linattn_stream {

template <int D>
cudaError_t scan_segments(float *states, const float *keeps, const linattn_problem &problem, const Plan &plan, Scan scan, const float *initial, float *total) {
  const dim3 grid((D * D + 2 * D + 256) / 256, problem.batch * problem.state_heads);
  scan_kernel<D><<<grid, 256, 0, static_cast<cudaStream_t>(problem.stream)>>>(states, keeps, plan.segments, scan, initial, total, segments_each(plan));
  return cudaPeekAtLastError();
}

// The same where a tile of rows has summed all of its segments at once, in the place of the last of them.
template <int D> cudaError_t scan_tiles(float *states, const linattn_problem &problem, const Plan &plan, const float *initial, float *total) {
  const dim3 grid((D * D + 2 * D + 256) / 256, problem.batch * problem.state_heads);
  const int each = segments_each(plan);
  float *const sums = states + (each - 1) * kStateFloats<D>;
  scan_kernel<D><<<grid, 256, 0, static_cast<cudaStream_t>(problem.stream)>>>(sums, nullptr, plan.row_tiles, Scan::kSuffix, initial, total, 1, each);
  return cudaPeekAtLastError();
}

// The segments of keys and values; of queries, with what weighs them besides.
inline SegmentArguments segments_of(const linattn_problem &problem, const Plan &plan, float *states, bool all, const Gates &gates, float *keeps) {
  SegmentArguments segments{};
  segments.problem = problem, segments.states = states, segments.segments = plan.segments, segments.each = segments_each(plan);
  segments.unneeded = all ? -1 : plan.row_tiles - 1, segments.segment_length = plan.segment_length, segments.tile_length = tile_length(problem, plan);
  segments.gates = gates, segments.keeps = keeps;
  return segments;
}

inline Gates gates_of(const linattn_problem &problem, const float *decay) {
  const bool each = problem.log_decay && problem.log_decay_per_token;
  return {each ? nullptr : problem.log_decay, each ? decay : nullptr, problem.query_segments, problem.key_segments, problem.query_segments_stride, problem.key_segments_stride};
}

// Whether the rows of the output have a third stage of tiles: where it does not cost the second block on a multiprocessor, and by measurement at
// D = 64 alone.
template <int D, bool GATED> bool rows_are_deep() { return D == 64 && 2 * RowShape<D, false, GATED, RowForm::kDeep>::SHARED <= linattn::shared_memory(); }

template <typename T, int D> constexpr bool kWideRows = D == 64 && !Element<T>::kNarrow;
template <RowForm FORM> using Form = std::integral_constant<RowForm, FORM>;

// The output, and the states ahead of the tiles that backward cuts heads into.
template <typename T, int D, bool GATED>
cudaError_t launch_wide_rows(const linattn_problem &problem, const linattn_forward_result &result, const Plan &plan, const Gates &gates, float *states) {
  using Shape = RowShape<D, false, GATED, RowForm::kWide>;
  RowArguments rows{};
  rows.problem = problem, rows.result = result.out, rows.mass_out = result.mass, rows.final_state = result.state;
  rows.segments = rows.states_each = 1, rows.segment_length = problem.length, rows.gates = gates;
  rows.tile_states = states, rows.tiles = plan.row_tiles, rows.tile_each = segments_each(plan), rows.tile_length = tile_length(problem, plan);
  return launch(rows_kernel<T, D, false, GATED, RowForm::kWide, false>, problem.batch * problem.state_heads, Shape::THREADS, Shape::SHARED,
                static_cast<cudaStream_t>(problem.stream), rows);
}

template <typename T, int D, bool GATED> cudaError_t forward_by(const linattn_problem &problem, const linattn_forward_result &result, const Plan &plan) {
  const cudaStream_t stream = static_cast<cudaStream_t>(problem.stream);
  const int blocks = problem.batch * problem.state_heads * plan.row_tiles;
  const ForwardWorkspace workspace(problem, plan);
  float *const base = static_cast<float *>(problem.workspace), *const states = plan.states ? base + workspace.states : nullptr;
  float *const keeps = GATED ? base + workspace.keeps : nullptr;
  const Gates gates = gates_of(problem, base + workspace.decay);
  if (gates.decay) LINATTN_TRY(launch_chunk_decay(problem, plan.chunk, base + workspace.decay));
  if constexpr (kWideRows<T, D>)
    if (rows_are_wide(problem, plan)) return launch_wide_rows<T, D, GATED>(problem, result, plan, gates, states);
  if (states) {
    const SegmentArguments segments = segments_of(problem, plan, states, !problem.causal || result.state, gates, keeps);
    using Shape = SegmentShape<D>;
    LINATTN_TRY(launch(segments_kernel<T, D, false, GATED>, blocks * segments.each, Shape::THREADS, Shape::template SHARED<GATED>, stream, segments));
    LINATTN_TRY(scan_segments<D>(states, keeps, problem, plan, problem.causal ? Scan::kPrefix : Scan::kTotal, problem.initial_state, result.state));
  }
  RowArguments rows{};
  rows.problem = problem, rows.result = result.out, rows.mass_out = result.mass, rows.states = states;
  rows.final_state = states ? nullptr : result.state;
  rows.segments = plan.row_tiles, rows.states_each = segments_each(plan), rows.segment_length = tile_length(problem, plan), rows.gates = gates;
  const auto work_on_rows = [&](auto form) {
    using Shape = RowShape<D, false, GATED, form.value>;
    return launch(rows_kernel<T, D, false, GATED, form.value, false>, blocks, Shape::THREADS, Shape::SHARED, stream, rows);
  };
  if constexpr (D == 64)
    if (rows_are_deep<D, GATED>()) return work_on_rows(Form<RowForm::kDeep>{});
  return work_on_rows(Form<RowForm::kShallow>{});
}

// Whether the rows of the gradient sum queries and W beside: elsewhere registers lack, and in float16 W is brought into range chunk by chunk.
template <typename T, int D, bool GATED> constexpr bool kSumsBesideRows = D <= 64 && !GATED && !Element<T>::kNarrow;

template <typename T, int D, bool GATED> cudaError_t backward_by(const linattn_problem &problem, const linattn_backward_data &data, const Plan &plan) {
  const cudaStream_t stream = static_cast<cudaStream_t>(problem.stream);
  const int blocks = problem.batch * problem.state_heads * plan.row_tiles;
  const BackwardWorkspace workspace(problem, plan);
  float *const base = static_cast<float *>(problem.workspace), *const states = plan.states ? base + workspace.states : nullptr;
  float *const error = base + workspace.error, *const query_scale = base + workspace.query_scale, *const partials = base + workspace.partials;
  float *const keeps = GATED ? base + workspace.keeps : nullptr;
  const Gates gates = gates_of(problem, base + workspace.decay);
  const bool slopes = problem.log_decay && data.grad_log_decay;  // whether the decay wants a gradient
  const DecaySums sums{base + workspace.row_sums, base + workspace.column_sums, base + workspace.final_state,
                       data.grad_state,           base + workspace.ends,        reinterpret_cast<double *>(base + workspace.parts)};
  using Segment = SegmentShape<D>;

  if (gates.decay) LINATTN_TRY(launch_chunk_decay(problem, plan.chunk, base + workspace.decay));
  // With noise, W times the noise waits where dq will be, block by block, until the row kernel, which comes last then, replaces it.
  const bool noised = GATED && problem.dropout_p;
  const linattn_tensor &grad_out = noised ? data.grad_query : data.grad_out;
  RowArguments rows{};
  rows.problem = problem, rows.out = data.out, rows.grad_out = grad_out, rows.result = data.grad_query, rows.noised = noised;
  rows.mass = data.mass, rows.grad_mass = data.grad_mass, rows.error = error, rows.query_scale = query_scale, rows.partials = partials;
  const float *const kept = plan.kept_bytes ? data.segment_states : nullptr;
  rows.states = kept ? kept : states, rows.segments = plan.row_tiles, rows.states_each = segments_each(plan), rows.segment_length = tile_length(problem, plan), rows.gates = gates;
  if (slopes) rows.row_sums = sums.rows, rows.final_sums = data.grad_state ? sums.final_state : nullptr;
  const bool beside = kSumsBesideRows<T, D, GATED> && states && problem.causal;
  if (beside) rows.query_states = states;  // where each block has read its own state
  const auto work_on_rows = [&]() -> cudaError_t {
    if (states && !kept) {
      const SegmentArguments keys = segments_of(problem, plan, states, !problem.causal, gates, keeps);
      LINATTN_TRY(launch(segments_kernel<T, D, false, GATED>, blocks * keys.each, Segment::THREADS, Segment::template SHARED<GATED>, stream, keys));
      LINATTN_TRY(scan_segments<D>(states, keeps, problem, plan, problem.causal ? Scan::kPrefix : Scan::kTotal, problem.initial_state, nullptr));
    }
    using Row = RowShape<D, true, GATED, RowForm::kShallow>;
    if constexpr (kSumsBesideRows<T, D, GATED>)
      if (rows.query_states) return launch(rows_kernel<T, D, true, GATED, RowForm::kShallow, true>, blocks, Row::THREADS, Row::SHARED, stream, rows);
    return launch(rows_kernel<T, D, true, GATED, RowForm::kShallow, false>, blocks, Row::THREADS, Row::SHARED, stream, rows);
  };
  LINATTN_TRY(noised ? launch_noised_gradient<T>(problem, data, error, query_scale) : work_on_rows());

  if (states) {
    if (beside) {
      LINATTN_TRY(scan_tiles<D>(states, problem, plan, data.grad_state, data.grad_initial_state));
    } else {
      SegmentArguments queries = segments_of(problem, plan, states, true, gates, keeps);
      queries.grad_out = grad_out, queries.mass = data.mass, queries.error = error, queries.query_scale = query_scale;
      if (problem.causal && !data.grad_initial_state) queries.unneeded = 0;
      LINATTN_TRY(launch(segments_kernel<T, D, true, GATED>, blocks * queries.each, Segment::THREADS, Segment::template SHARED<GATED>, stream, queries));
      LINATTN_TRY(scan_segments<D>(states, keeps, problem, plan, problem.causal ? Scan::kSuffix : Scan::kTotal, data.grad_state, data.grad_initial_state));
    }
  }
  ColumnArguments columns{};
  columns.problem = problem, columns.grad_out = grad_out, columns.grad_key = data.grad_key, columns.grad_value = data.grad_value;
  columns.mass = data.mass, columns.error = error, columns.query_scale = query_scale;
  columns.states = states, columns.grad_state = data.grad_state, columns.grad_initial_state = states ? nullptr : data.grad_initial_state;
  columns.segments = plan.row_tiles, columns.states_each = segments_each(plan), columns.segment_length = tile_length(problem, plan);
  columns.gates = gates, columns.column_sums = slopes ? sums.columns : nullptr;
  T *const key_parts = reinterpret_cast<T *>(base + workspace.key_parts), *const value_parts = reinterpret_cast<T *>(base + workspace.value_parts);
  const bool shares = problem.state_heads != problem.key_heads;
  if (shares) {
    const int64_t plane = problem.length * D;
    columns.grad_key = {key_parts, problem.state_heads * plane, plane, D};
    columns.grad_value = {value_parts, problem.state_heads * plane, plane, D};
  }
  using Column = ColumnShape<D>;
  LINATTN_TRY(launch(columns_kernel<T, D, GATED>, blocks, Column::THREADS, Column::template SHARED<GATED>, stream, columns));
  if (shares) {
    LINATTN_TRY(launch_share<T>(problem, key_parts, data.grad_key));
    LINATTN_TRY(launch_share<T>(problem, value_parts, data.grad_value));
  }
  if (noised) LINATTN_TRY(work_on_rows());
  if (slopes) LINATTN_TRY(launch_decay_gradient(problem, sums, data.grad_log_decay));
  if (data.grad_coefficients) {
    coefficients_kernel<<<problem.query_heads, 32, 0, stream>>>(partials, problem.coefficients, data.grad_coefficients, problem.batch, problem.query_heads, plan.row_tiles);
    LINATTN_TRY(cudaPeekAtLastError());
  }
  return cudaSuccess;
}

template <typename T, int D> cudaError_t forward(const linattn_problem &problem, const linattn_forward_result &result, const Plan &plan) {
  return plan.gated ? forward_by<T, D, true>(problem, result, plan) : forward_by<T, D, false>(problem, result, plan);
}
template <typename T, int D> cudaError_t backward(const linattn_problem &problem, const linattn_backward_data &data, const Plan &plan) {
  return plan.gated ? backward_by<T, D, true>(problem, data, plan) : backward_by<T, D, false>(problem, data, plan);
}

template <typename T, int D, bool GATED> int forward_shared_by(const linattn_problem &problem, const Plan &plan) {
  if constexpr (kWideRows<T, D>)
    if (rows_are_wide(problem, plan)) return RowShape<D, false, GATED, RowForm::kWide>::SHARED;
  return std::max(rows_are_deep<D, GATED>() ? RowShape<D, false, GATED, RowForm::kDeep>::SHARED : RowShape<D, false, GATED, RowForm::kShallow>::SHARED,
                  plan.states ? SegmentShape<D>::template SHARED<GATED> : 0);
}
template <int D, bool GATED> constexpr int backward_shared_by(bool states) {
  return std::max({RowShape<D, true, GATED, RowForm::kShallow>::SHARED, ColumnShape<D>::template SHARED<GATED>, states ? SegmentShape<D>::template SHARED<GATED> : 0});
}
template <typename T, int D> int forward_shared(const linattn_problem &problem, const Plan &plan) {
  return plan.gated ? forward_shared_by<T, D, true>(problem, plan) : forward_shared_by<T, D, false>(problem, plan);
}
template <typename T, int D> int backward_shared(const Plan &plan) { return plan.gated ? backward_shared_by<D, true>(plan.states) : backward_shared_by<D, false>(plan.states); }

#define LINATTN_STREAM_INSTANTIATE(T, D)                                                                     \
  template int forward_shared<T, D>(const linattn_problem &, const Plan &);                                  \
  template int backward_shared<T, D>(const Plan &);                                                          \
  template cudaError_t forward<T, D>(const linattn_problem &, const linattn_forward_result &, const Plan &); \
  template cudaError_t backward<T, D>(const linattn_problem &, const linattn_backward_data &, const Plan &);

}  // namespace linattn_stream
