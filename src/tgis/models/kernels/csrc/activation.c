// Activations, alone or gated (act(gate) * up, gate and up side by side in a row), in one pass.

#include "activation.h"
#include "team.h"

struct activation_args {
  const void *x;
  void *out;
  int64_t rows, cols, stride;  // cols: of out; stride: elements between rows of x
  int64_t kind, gated, bf16;
};

// Columns lo .. hi of one row: few rows are cut into column ranges, so that every thread has work.
INLINE void span(const struct activation_args *a, int64_t row, int64_t lo, int64_t hi, int kind,
                 int bf16) {
  const void *x = at(a->x, row * a->stride, bf16);
  const void *up = at(x, a->cols, bf16);
  void *out = (char *)at(a->out, row * a->cols, bf16);
  for (int64_t i = lo; i < hi; i += VL) {
    vf y = activate(load_at(x, i, hi, bf16), kind);
    if (a->gated) y *= load_at(up, i, hi, bf16);
    store_at(out, i, hi, y, bf16);
  }
}

#define SPAN 512

INLINE void span_of_kind(const struct activation_args *a, int64_t row, int64_t lo, int64_t hi,
                         int bf16) {
  switch (a->kind) {
    case SILU:
      return span(a, row, lo, hi, SILU, bf16);
    case GELU:
      return span(a, row, lo, hi, GELU, bf16);
    case GELU_TANH:
      return span(a, row, lo, hi, GELU_TANH, bf16);
    default:
      return span(a, row, lo, hi, RELU, bf16);
  }
}

static void spans(void *what, int64_t begin, int64_t end) {
  const struct activation_args *a = what;
  const int64_t per_row = (a->cols + SPAN - 1) / SPAN;
  for (int64_t i = begin; i < end; i++) {
    const int64_t lo = i % per_row * SPAN, hi = min64(lo + SPAN, a->cols);
    if (a->bf16)
      span_of_kind(a, i / per_row, lo, hi, 1);
    else
      span_of_kind(a, i / per_row, lo, hi, 0);
  }
}

EXPORT int tgis_activation(const struct activation_args *args) {
  struct activation_args a = *args;
  const int64_t count = a.rows * ((a.cols + SPAN - 1) / SPAN);
  team_loop(count, a.rows * a.cols > 4096 ? team_part(count) : count, spans, &a);
  return 0;
}
