// What the attention kernels share.
#pragma once

#include "vec.h"

#define MAX_ROWS 16           // query rows of a block
#define SPLIT 256             // positions of a split
#define PARTIAL(d) (2 + (d))  // floats of a partial result: max, sum, weighted values

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

// A block of query rows that share a KV head, and what they see of one split.
struct block {
  int64_t rows, n;                             // positions begin .. begin + n are seen by any row
  int64_t begin;
  int64_t query[MAX_ROWS], head[MAX_ROWS];     // position and head of each row
  int64_t lo[MAX_ROWS], hi[MAX_ROWS];          // what each row sees, counted from begin
  const void *q[MAX_ROWS];
  float max[MAX_ROWS], sum[MAX_ROWS];
  float score[MAX_ROWS][SPLIT];                // then exp(score - max)
  uint16_t weight[MAX_ROWS][SPLIT];            // the same in bfloat16
  float out[MAX_ROWS][MAX_HEAD_DIM];           // columns up to a multiple of 64 are written
};
