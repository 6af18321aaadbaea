// What decays leave of each of a few tokens at each other, and of the state before them.
#pragma once
#include "decode.cuh"

namespace linattn {
namespace {

constexpr int MOST_TOKENS = 16;

struct Decays {
  float left[MOST_TOKENS + 1][MOST_TOKENS];  // W_tj: of token j at token t; below, where t = MOST_TOKENS, W_j
  float carried[MOST_TOKENS + 1];            // K_t, and K

  // Warps have rows of the table, two at a time, and one what is left behind the last token.
  __device__ __forceinline__ void look_at_tokens(const linattn_problem &p, const Place &at, int warp, int lane, int warps) {
    const int tokens = static_cast<int>(p.length);
    if (2 * warp >= tokens) return;
    const int state_head = at.batch * p.state_heads + at.head, number = lane % MOST_TOKENS, token = min(number, tokens - 1);
    const bool begins = token > 0 && run_of(p, at.batch, token) != run_of(p, at.batch, token - 1);
    const bool is_there = number < tokens && is_taken(p, at.batch, token);
    const float rate = !p.log_decay ? 0.f : p.log_decay_per_token ? p.log_decay[static_cast<int64_t>(state_head) * tokens + token] : p.log_decay[at.head];
    const float keep = begins ? 0.f : expf(rate);
#pragma unroll 1
    for (int row = 2 * warp + lane / MOST_TOKENS; row - lane / MOST_TOKENS < tokens; row += 2 * warps) look_from(row, token, tokens, is_there, keep, lane);
    if (warp > 0) return;
    float behind = 1.f;
#pragma unroll 1
    for (int s = 0; s < tokens; ++s) {
      const float of_token = __shfl_sync(0xffffffffu, keep, s);
      if (s > token) behind *= of_token;
    }
    if (lane < MOST_TOKENS) left[MOST_TOKENS][lane] = is_there ? behind : 0.f;
    if (lane == 0) carried[MOST_TOKENS] = behind * keep;
  }
  __device__ __forceinline__ void look_from(int row, int token, int tokens, bool is_there, float keep, int lane) {
    float of_row = 1.f, of_state = 1.f;
#pragma unroll 1
    for (int s = 0; s < tokens; ++s) {
      const float of_token = __shfl_sync(0xffffffffu, keep, s);
      if (s > row) continue;
      of_state *= of_token;
      if (s > token) of_row *= of_token;
    }
    left[row][lane % MOST_TOKENS] = is_there && token <= row ? of_row : 0.f;
    if (lane % MOST_TOKENS == 0) carried[row] = of_state;
  }
};

}  // namespace
}  // namespace linattn
