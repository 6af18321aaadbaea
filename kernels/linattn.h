// The C interface of the compiled library: plain pointers, sizes, strides and a stream in, a CUDA error code out.
// No torch headers, so that one library serves every Python and every torch.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { LINATTN_FLOAT32 = 0, LINATTN_FLOAT16 = 1, LINATTN_BFLOAT16 = 2 } linattn_dtype;

// A tensor (B, H, N, D) with a contiguous last dimension; strides in elements.
typedef struct {
  void *data;
  int64_t batch_stride, head_stride, token_stride;
} linattn_tensor;

// What forward and backward share. Pointers marked "or null" are absent when null.
typedef struct {
  int32_t batch, query_heads, key_heads, state_heads, head_dim, value_dim;
  int64_t length;
  linattn_dtype dtype;            // of query, key, value, out and their gradients
  int32_t degree;                 // 1: f = a + b s, 2: f = a + b s + c s^2
  int32_t causal, normalize_qk;
  linattn_tensor query, key, value;
  const float *coefficients;      // (4, query_heads): rows a, b, c, temperature
  const float *log_decay;         // (state_heads) or (batch, state_heads, length) contiguous, or null
  int32_t log_decay_per_token;
  const int32_t *query_segments;  // (batch, length), row stride query_segments_stride, or null
  const int32_t *key_segments;
  int64_t query_segments_stride, key_segments_stride;
  const float *initial_state;     // (batch, state_heads, features, value_dim + 1) contiguous, or null
  const float *dropout_p;         // one float on the device, or null: no noise
  const int64_t *seed;            // one int64 on the device
  void *workspace;                // of at least linattn_*_workspace bytes, 256-byte aligned
  void *stream;                   // cudaStream_t
} linattn_problem;

typedef struct {
  linattn_tensor out;
  float *mass;                    // (batch, query_heads, length): the denominator g
  float *state;                   // as initial_state, or null: not asked for
} linattn_forward_result;

typedef struct {
  linattn_tensor out, grad_out;   // out as forward returned it
  const float *mass;
  const float *grad_mass;         // (batch, query_heads, length) contiguous, or null
  const float *grad_state;        // as the state, or null
  linattn_tensor grad_query, grad_key, grad_value;
  float *grad_coefficients;       // (4, query_heads), or null
  float *grad_log_decay;          // shape of log_decay, or null
  float *grad_initial_state;      // or null
  const float *segment_states;    // where forward's workspace began, whose plan had kept_bytes, or null
  int64_t kept_segment_length;    // the segment_length of that plan
} linattn_backward_data;

typedef enum { LINATTN_NONE = 0, LINATTN_PAIRS = 1, LINATTN_STREAM = 2, LINATTN_CHUNKS = 3, LINATTN_GENERIC = 4, LINATTN_DECODE = 5, LINATTN_TOKENS = 6 } linattn_engine;

// How a call is done on the current device: decided once, by linattn_plan_*, and taken by the call that it was made for. What an engine has no
// use for is 0.
typedef struct {
  int64_t workspace_bytes;        // of scratch memory, which the caller takes from PyTorch's allocator
  int64_t chunk;                  // tokens whose pairs are formed, or that are worked on together
  int64_t segment_length;         // tokens of a segment, a multiple of the chunk
  int64_t kept_bytes;             // forward: of states that the workspace begins with, which backward takes over where the caller keeps them
                                  // for it; backward: of those that it takes over
  int32_t segments;               // of each head's sequence: those whose states stand in memory
  int32_t row_tiles;              // of each head's queries, a block each
  int32_t shared_bytes;           // of shared memory, by the block that takes most
  linattn_engine engine;          // LINATTN_NONE: nothing here can run it
  int32_t states;                 // whether states are made ahead of what reads them
  int32_t gated;                  // whether a decay, runs of tokens or noise multiply weights
  int32_t warpgroups;             // whether these are the kernels of Hopper's warpgroups alone
  int32_t padded_dim;             // where not 0: the plan is that of the call whose rows are copied to rows of this head dim and value dim
} linattn_plan;

// The plan of a call. Of the results it reads which are asked for and where their rows begin, not what they hold. One with a padded_dim cannot be
// launched: the caller copies all rows (queries, keys, values, results, states) to aligned ones of that dim, zeros behind, and asks again.
void linattn_plan_forward(const linattn_problem *problem, const linattn_forward_result *result, linattn_plan *plan);
void linattn_plan_backward(const linattn_problem *problem, const linattn_backward_data *data, linattn_plan *plan);
const char *linattn_engine_name(linattn_engine engine);

// 0 or a cudaError_t; linattn_error_string names it.
int linattn_forward(const linattn_problem *problem, const linattn_forward_result *result, const linattn_plan *plan);
int linattn_backward(const linattn_problem *problem, const linattn_backward_data *data, const linattn_plan *plan);

// 1 to 16 new tokens a sequence (causal): result->state is read and replaced, where another problem has initial_state; mass may be null. A token
// whose key_segments are not above 0 is none: it changes no state, its output is 0, and where there are several its log_decay is to be 0.
void linattn_plan_step(const linattn_problem *problem, const linattn_forward_result *result, linattn_plan *plan);
int linattn_step(const linattn_problem *problem, const linattn_forward_result *result, const linattn_plan *plan);

// One new token a sequence of softmax over the last `window` tokens and the first `sinks`, kept in a ring that takes the token in.
typedef struct {
  int32_t batch, query_heads, key_heads, head_dim, value_dim, window, sinks;
  linattn_dtype dtype;                    // of the token, the ring, out and the matrices beside it
  float scaling;                          // of the scores
  linattn_tensor query, key, value, out;  // of length 1
  linattn_tensor ring_key, ring_value;    // (batch, key_heads, sinks + window, .): the sinks in front, token t in slot sinks + t mod window
  int64_t *seen;                          // (batch): tokens so far, counted on
  const uint8_t *real;                    // (batch), row stride real_stride, or null: 0 where a sequence has no new token, and its output is 0
  int64_t real_stride;
  void *workspace;                        // of the plan's workspace_bytes
  void *stream;                           // cudaStream_t
} linattn_window;

// Linear attention over the tokens that have left the window, whose output is mixed with the window's. Pointers marked "or null" are absent
// when null. M numbers of a query and a key are what f is taken of: `features`.
typedef struct {
  int32_t state_heads, features, degree, normalize_qk;
  float *state;                           // as result->state of a step; with an input gate the values have one column more
  const float *coefficients;              // (4, query_heads)
  const float *log_decay;                 // (state_heads), or (batch, key_heads) of the new token, or null
  int32_t log_decay_per_token;
  const float *log_input_gate;            // (batch, key_heads) of the new token, or null: a key weighs exp of that as well
  float *kept;                            // (batch, n key_heads, window): log_decay of each token and log_input_gate, those that there are
  const void *query_matrix, *key_matrix;  // (query_heads, head_dim, columns) and (key_heads, head_dim, columns), or null: f of q and k themselves
  const void *key_center;                 // (key_heads, head_dim), taken from a key first, or null
  int32_t is_map;                         // features are softmax([x W, -x W]), M = 2 columns, else x W
  const float *gate;                      // (batch or 1, query_heads), row stride gate_stride: the window's share of the output
  int64_t gate_stride;
  const float *output_power, *output_log_scale;  // (query_heads), or null: the branch's output o becomes o exp(log_scale) / rms(o)^power
  const float *output_gate;               // (batch, query_heads), or null: and is multiplied by it
} linattn_beside;

// `beside` may be null: then the window is all that is seen. The plan's engine is LINATTN_NONE where a window is not taken.
void linattn_plan_window_step(const linattn_window *window, const linattn_beside *beside, linattn_plan *plan);
int linattn_window_step(const linattn_window *window, const linattn_beside *beside, const linattn_plan *plan);

const char *linattn_error_string(int code);

// The architectures compiled in, as "sm_80 sm_90a compute_80".
const char *linattn_architectures(void);
// sizeof of linattn_problem (0), linattn_forward_result (1), linattn_backward_data (2), linattn_plan (3), linattn_window (4) and linattn_beside
// (5): a caller compares them with its own.
int64_t linattn_struct_bytes(int which);

#ifdef __cplusplus
}
#endif
