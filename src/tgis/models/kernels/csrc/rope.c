// One pass over a fused q|k|v projection: optional q/k RMS norm, rotary positions, cache writes.

#include "team.h"

enum rope_style { ROPE_NONE, ROPE_HALF, ROPE_INTERLEAVED };

struct rope_args {
  const void *qkv;  // tokens x (heads + 2 kv_heads) x head_dim, rows `stride` elements apart
  const float *cos, *sin;  // tokens x rot_dim / 2
  void *q;                 // tokens x heads x head_dim
  void *k_cache, *v_cache;
  const int32_t *slot, *position;        // per token
  const void *q_weight, *k_weight;       // null, or head_dim: RMS norm per head
  int64_t tokens, stride, heads, kv_heads, head_dim, rot_dim, style, bf16;
  int64_t slots, slot_tokens;
  int64_t slot_stride, head_stride;  // elements of the caches; tokens lie head_dim apart
  double eps;
};

INLINE void rotate(float *x, const float *cos, const float *sin, int64_t half, int style) {
  if (style == ROPE_HALF) {
    for (int64_t i = 0; i < half; i++) {
      const float a = x[i], b = x[i + half];
      x[i] = a * cos[i] - b * sin[i];
      x[i + half] = b * cos[i] + a * sin[i];
    }
  } else {
    for (int64_t i = 0; i < half; i++) {
      const float a = x[2 * i], b = x[2 * i + 1];
      x[2 * i] = a * cos[i] - b * sin[i];
      x[2 * i + 1] = b * cos[i] + a * sin[i];
    }
  }
}

INLINE void head(const struct rope_args *a, const void *in, void *out, const void *weight,
                 int64_t token, int bf16) {
  const int64_t n = a->head_dim, half = a->rot_dim / 2;
  float x[MAX_HEAD_DIM];
  for (int64_t i = 0; i < n; i += VL) store_at(x, i, n, load_at(in, i, n, bf16), 0);
  if (weight) {
    vf squares = {};
    for (int64_t i = 0; i < n; i += VL) squares += load_at(x, i, n, 0) * load_at(x, i, n, 0);
    const float scale = 1.0f / sqrtf(sum(squares) / n + (float)a->eps);
    for (int64_t i = 0; i < n; i += VL)
      store_at(x, i, n, load_at(x, i, n, 0) * scale * load_at(weight, i, n, bf16), 0);
  }
  if (a->style == ROPE_HALF)
    rotate(x, a->cos + token * half, a->sin + token * half, half, ROPE_HALF);
  else if (a->style == ROPE_INTERLEAVED)
    rotate(x, a->cos + token * half, a->sin + token * half, half, ROPE_INTERLEAVED);
  for (int64_t i = 0; i < n; i += VL) store_at(out, i, n, load_at(x, i, n, 0), bf16);
}

INLINE void token(const struct rope_args *a, int64_t t, int bf16) {
  const int64_t n = a->head_dim;
  const char *in = at(a->qkv, t * a->stride, bf16);
  char *q = (char *)at(a->q, t * a->heads * n, bf16);
  for (int64_t h = 0; h < a->heads; h++)
    head(a, at(in, h * n, bf16), (char *)at(q, h * n, bf16), a->q_weight, t, bf16);
  const int64_t target = a->slot[t] * a->slot_stride + a->position[t] * n;
  for (int64_t h = 0; h < a->kv_heads; h++) {
    const int64_t to = target + h * a->head_stride;
    head(a, at(in, (a->heads + h) * n, bf16), (char *)at(a->k_cache, to, bf16), a->k_weight, t,
         bf16);
    memcpy((char *)at(a->v_cache, to, bf16), at(in, (a->heads + a->kv_heads + h) * n, bf16),
           n * (bf16 ? 2 : 4));
  }
}

static void tokens(void *what, int64_t begin, int64_t end) {
  const struct rope_args *a = what;
  for (int64_t t = begin; t < end; t++) {
    if (a->bf16)
      token(a, t, 1);
    else
      token(a, t, 0);
  }
}

// Returns 0, or ERROR_INDEX without a write where a token lies outside the caches.
EXPORT int tgis_rope_store(const struct rope_args *args) {
  struct rope_args a = *args;
  for (int64_t t = 0; t < a.tokens; t++)
    if (a.slot[t] < 0 || a.slot[t] >= a.slots || a.position[t] < 0 ||
        a.position[t] >= a.slot_tokens)
      return ERROR_INDEX;
  team_loop(a.tokens, a.tokens > 2 ? team_part(a.tokens) : a.tokens, tokens, &a);
  return 0;
}
