// Dynamic quantisation of activations, and its undoing where the product was left unscaled.

#include "quantize.h"
#include "team.h"

struct quantize_args {
  const void *x;  // rows x cols, `stride` elements apart
  int8_t *q;      // rows x cols
  float *scale;   // rows
  int64_t rows, cols, stride, bf16;
};

static void quantize(void *what, int64_t begin, int64_t end) {
  const struct quantize_args *a = what;
  for (int64_t r = begin; r < end; r++) {
    const void *x = at(a->x, r * a->stride, a->bf16);
    int8_t *q = a->q + r * a->cols;
    a->scale[r] = a->bf16 ? quantize_row(x, q, a->cols, 64, 1) : quantize_row(x, q, a->cols, 64, 0);
  }
}

EXPORT int tgis_quantize_rows(const struct quantize_args *args) {
  struct quantize_args a = *args;
  team_loop(a.rows, a.rows * a.cols > 16384 ? team_part(a.rows) : a.rows, quantize, &a);
  return 0;
}

struct scale_args {
  void *x;             // rows x cols, in place
  const float *scale;  // rows
  const void *bias;    // null, or cols
  int64_t rows, cols, bf16;
};

INLINE void scale_row(const struct scale_args *a, int64_t row, int bf16) {
  void *x = (char *)at(a->x, row * a->cols, bf16);
  for (int64_t i = 0; i < a->cols; i += VL) {
    vf v = load_at(x, i, a->cols, bf16) * a->scale[row];
    if (a->bias) v += load_at(a->bias, i, a->cols, bf16);
    store_at(x, i, a->cols, v, bf16);
  }
}

static void scale(void *what, int64_t begin, int64_t end) {
  const struct scale_args *a = what;
  for (int64_t r = begin; r < end; r++) {
    if (a->bf16)
      scale_row(a, r, 1);
    else
      scale_row(a, r, 0);
  }
}

EXPORT int tgis_scale_rows(const struct scale_args *args) {
  struct scale_args a = *args;
  team_loop(a.rows, a.rows * a.cols > 16384 ? team_part(a.rows) : a.rows, scale, &a);
  return 0;
}
