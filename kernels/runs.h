// The C interface's part about packed sequences and padding: what a call is told of them, made of what a caller says.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// A caller's numbers of segments (batch, length), 0 for padding, or a mask of the real tokens as LINATTN_UINT8; strides in elements.
typedef enum { LINATTN_UINT8 = 0, LINATTN_INT8 = 1, LINATTN_INT16 = 2, LINATTN_INT32 = 3, LINATTN_INT64 = 4 } linattn_integer;
typedef struct {
  const void *ids;
  int64_t row_stride, token_stride, length;
  int32_t batch;
  linattn_integer dtype;
} linattn_segments;

// A decay (batch, heads, length); strides in elements, 0 where it is the same.
typedef struct {
  const float *log_decay;
  int64_t batch_stride, head_stride, token_stride, length;
  int32_t batch, heads;
} linattn_decay;

// Segments as query_segments and key_segments are to be: (batch, length) contiguous, |run| of at least 1 and never falling, negative for padding, which takes the
// run that it lies in, or the first one of its row where it is ahead of all tokens.
// Beside them, in the same launch, what linattn_decay_at_tokens gives of a decay, or null.
int linattn_runs(const linattn_segments *segments, const linattn_decay *decay, int32_t *runs, float *result, void *stream);
// A decay that is 0 at padding, (batch, heads, length) contiguous; and its gradient's sums over all tokens but padding, (heads).
int linattn_decay_at_tokens(const linattn_decay *decay, const int32_t *runs, float *result, void *stream);
int linattn_sum_at_tokens(const linattn_decay *gradient, const int32_t *runs, float *result, void *stream);

#ifdef __cplusplus
}
#endif
