// The index of the largest element of each row: the first of equals, and a NaN before all others.

#include "team.h"

struct argmax_args {
  const void *x;  // rows x cols, `stride` elements apart
  int64_t *out;
  int64_t rows, cols, stride, bf16;
};

INLINE int64_t argmax_row(const void *x, int64_t n, int bf16) {
  vf best = splat(-INFINITY);
  vi nan = {};
  int64_t i = 0;
  for (; i + VL <= n; i += VL) {
    const vf v = load(at(x, i, bf16), bf16);
    best = vmax(best, v);
    nan |= v != v;
  }
  float max = max_of(best);
  int any_nan = 0;
  for (int j = 0; j < VL; j++) any_nan |= nan[j];
  for (; i < n; i++) {
    const float v = bf16 ? bf16_to_float(((const uint16_t *)x)[i]) : ((const float *)x)[i];
    if (v > max) max = v;
    any_nan |= v != v;
  }
  for (i = 0; i + VL <= n; i += VL) {  // nothing but finding it again, and that stops early
    const vf v = load(at(x, i, bf16), bf16);
    const vi hit = any_nan ? v != v : v == max;
    for (int j = 0, found = max_of(__builtin_convertvector(hit & 1, vf)) > 0; found && j < VL; j++)
      if (hit[j]) return i + j;
  }
  for (; i < n; i++) {
    const float v = bf16 ? bf16_to_float(((const uint16_t *)x)[i]) : ((const float *)x)[i];
    if (any_nan ? v != v : v == max) return i;
  }
  return 0;
}

static void rows(void *what, int64_t begin, int64_t end) {
  const struct argmax_args *a = what;
  for (int64_t r = begin; r < end; r++) {
    const void *x = at(a->x, r * a->stride, a->bf16);
    a->out[r] = a->bf16 ? argmax_row(x, a->cols, 1) : argmax_row(x, a->cols, 0);
  }
}

EXPORT int tgis_argmax(const struct argmax_args *args) {
  struct argmax_args a = *args;
  team_loop(a.rows, 1, rows, &a);
  return 0;
}
