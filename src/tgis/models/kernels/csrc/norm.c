// RMS norm and layer norm of rows, with the residual addition that precedes them in a decoder
// block.

#include "team.h"

struct norm_args {
  const void *x;
  void *residual;      // null, or rows x cols: residual += x, and that sum is normalised
  const void *weight;  // null: ones
  const void *bias;    // null: zeros
  void *out;
  int64_t rows, cols, stride;  // stride: elements between rows of x
  int64_t bf16;
  int64_t center;  // 1: layer norm, 0: RMS norm
  double eps;
};

INLINE void norm_row(const struct norm_args *a, int64_t row, int bf16, int center) {
  const int64_t n = a->cols;
  const void *x = at(a->x, row * a->stride, bf16);
  vf squares = {}, total = {};
  if (a->residual) {
    void *residual = (char *)at(a->residual, row * n, bf16);
    for (int64_t i = 0; i < n; i += VL)
      store_at(residual, i, n, load_at(residual, i, n, bf16) + load_at(x, i, n, bf16), bf16);
    x = residual;
  }
  float mean = 0;
  if (center) {
    for (int64_t i = 0; i < n; i += VL) total += load_at(x, i, n, bf16);
    mean = sum(total) / n;
  }
  int64_t i = 0;
  for (; i + VL <= n; i += VL) {
    vf v = load(at(x, i, bf16), bf16) - mean;
    squares += v * v;
  }
  float rest = 0;
  if (i < n) {
    vf v = load_part(at(x, i, bf16), n - i, bf16) - mean;
    for (int j = 0; j < n - i; j++) rest += v[j] * v[j];
  }
  const float scale = 1.0f / sqrtf((sum(squares) + rest) / n + (float)a->eps);
  void *out = (char *)at(a->out, row * n, bf16);
  for (int64_t i = 0; i < n; i += VL) {
    vf v = (load_at(x, i, n, bf16) - mean) * scale;
    if (a->weight) v *= load_at(a->weight, i, n, bf16);
    if (a->bias) v += load_at(a->bias, i, n, bf16);
    store_at(out, i, n, v, bf16);
  }
}

static void rows(void *what, int64_t begin, int64_t end) {
  const struct norm_args *a = what;
  for (int64_t row = begin; row < end; row++) {
    if (a->bf16) {
      if (a->center)
        norm_row(a, row, 1, 1);
      else
        norm_row(a, row, 1, 0);
    } else {
      if (a->center)
        norm_row(a, row, 0, 1);
      else
        norm_row(a, row, 0, 0);
    }
  }
}

EXPORT int tgis_norm(const struct norm_args *args) {
  struct norm_args a = *args;
  team_loop(a.rows, a.rows * a.cols > 16384 ? team_part(a.rows) : a.rows, rows, &a);
  return 0;
}
