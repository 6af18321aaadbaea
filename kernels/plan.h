// The engines as plan.cu chooses between them: each says whether it takes a call and how, in a plan, and runs a call that has its plan.
#pragma once
#include <cuda_runtime.h>

#include "linattn.h"

namespace linattn {

// Fill a plan and say true, or leave it to the next engine. They decide by the problem, by which results are asked for and by where rows begin.
bool pairs_plan_forward(const linattn_problem &problem, const linattn_forward_result &result, linattn_plan &plan);
bool pairs_plan_backward(const linattn_problem &problem, const linattn_backward_data &data, linattn_plan &plan);
bool stream_plan_forward(const linattn_problem &problem, const linattn_forward_result &result, linattn_plan &plan);
bool stream_plan_backward(const linattn_problem &problem, const linattn_backward_data &data, linattn_plan &plan);
bool chunks_plan_forward(const linattn_problem &problem, const linattn_forward_result &result, linattn_plan &plan);
bool chunks_plan_backward(const linattn_problem &problem, const linattn_backward_data &data, linattn_plan &plan);
bool generic_plan_forward(const linattn_problem &problem, const linattn_forward_result &result, linattn_plan &plan);
bool generic_plan_backward(const linattn_problem &problem, const linattn_backward_data &data, linattn_plan &plan);
bool decode_plan(const linattn_problem &problem, const linattn_forward_result &result, linattn_plan &plan);
bool tokens_plan_forward(const linattn_problem &problem, const linattn_forward_result &result, linattn_plan &plan);
bool tokens_plan_step(const linattn_problem &problem, const linattn_forward_result &result, linattn_plan &plan);

cudaError_t pairs_forward(const linattn_problem &problem, const linattn_forward_result &result, const linattn_plan &plan);
cudaError_t pairs_backward(const linattn_problem &problem, const linattn_backward_data &data, const linattn_plan &plan);
cudaError_t stream_forward(const linattn_problem &problem, const linattn_forward_result &result, const linattn_plan &plan);
cudaError_t stream_backward(const linattn_problem &problem, const linattn_backward_data &data, const linattn_plan &plan);
cudaError_t chunks_forward(const linattn_problem &problem, const linattn_forward_result &result, const linattn_plan &plan);
cudaError_t chunks_backward(const linattn_problem &problem, const linattn_backward_data &data, const linattn_plan &plan);
cudaError_t generic_forward(const linattn_problem &problem, const linattn_forward_result &result, const linattn_plan &plan);
cudaError_t generic_backward(const linattn_problem &problem, const linattn_backward_data &data, const linattn_plan &plan);
cudaError_t decode(const linattn_problem &problem, const linattn_forward_result &result, const linattn_plan &plan);
cudaError_t tokens_forward(const linattn_problem &problem, const linattn_forward_result &result, const linattn_plan &plan);
cudaError_t tokens_step(const linattn_problem &problem, const linattn_forward_result &result, const linattn_plan &plan);

}  // namespace linattn
