// What the attention kernels share.
#pragma once

#include "vec.h"

#define MAX_ROWS 8               // query rows of a block
#define SPLIT 256                // positions of a split
#define PARTIAL(d) (2 + (d))     // floats of a partial result: max, sum, weighted values

struct attention_args {
  const void *q;  // tokens x heads x head_dim
  const void *k, *v;
  void *out;  // tokens x heads x head_dim
  const int32_t *slot, *q_start, *kv_len;
  const float *slopes;  // null, or per head: ALiBi
  const float *bias;    // null, or heads x bias_len: added by distance, see bias_at
  int64_t tokens, seqs, heads, kv_heads, head_dim, bf16;
  int64_t slots, slot_tokens;
  int64_t slot_stride, head_stride;  // elements of the caches; tokens lie head_dim apart
  int64_t bias_len;                  // odd: the middle is distance 0
  int64_t window;                    // 0, or how many positions back a query sees, itself included
  int64_t causal;
  double scale, softcap;  // softcap 0: none
};
