// What decays leave of each of a few tokens at each other, and of the state before them.
#pragma once
#include "decode.cuh"

namespace linattn {
namespace {

constexpr int MOST_TOKENS = 16;

struct Decays {
  float left[MOST_TOKENS + 1][MOST_TOKENS];  // W_tj: of token j at token t; below, where t = MOST_TOKENS, W_j
  float carried[MOST_TOKENS + 1];            // K_t, and K

  // What a lane finds out about one of the tokens, on its way before it is looked at.
  struct Token {
    int number;
    bool begins, is_there;
    float rate;
  };
  static __device__ __forceinline__ Token token_of(const linattn_problem &p, const Place &at, int lane) {
    const int tokens = static_cast<int>(p.length), token = min(lane % MOST_TOKENS, tokens - 1);
    const float *const rates = p.log_decay_per_token ? p.log_decay + static_cast<int64_t>(at.batch * p.state_heads + at.head) * tokens + token : p.log_decay + at.head;
    const float rate = p.log_decay ? *rates : 0.f;
    const bool begins = token > 0 && run_of(p, at.batch, token) != run_of(p, at.batch, token - 1);
    return {token, begins, lane % MOST_TOKENS < tokens && is_taken(p, at.batch, token), rate};
  }

  // By one warp: lanes have columns of the table, and the 16th the state's.
  __device__ __forceinline__ void look_at_tokens(const Token &own, int tokens, int lane) {
    const float keep = own.begins ? 0.f : expf(own.rate);
    float x = lane < MOST_TOKENS ? 0.f : 1.f;
#pragma unroll 4
    for (int t = 0; t < tokens; ++t) {
      const float of_token = __shfl_sync(0xffffffffu, keep, t);
      if (lane >= MOST_TOKENS || t > own.number) x *= of_token;
      else if (t == own.number) x = own.is_there ? 1.f : 0.f;
      if (lane < MOST_TOKENS) left[t][lane] = x;
      else if (lane == MOST_TOKENS) carried[t] = x;
    }
    if (lane < MOST_TOKENS) left[MOST_TOKENS][lane] = x;
    else if (lane == MOST_TOKENS) carried[MOST_TOKENS] = x;
  }
};

}  // namespace
}  // namespace linattn
