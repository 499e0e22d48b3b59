// Weights of 4 or 8 bits with a scale for each group of them: what both ways to multiply share.
//
// The weights are packed by blocks of 32 output features, in steps of 32 input features:
//   [out / 32][in / 32][planes][2][4][16][2][4 x 4 bits]
// half of the block, 4 x 4 input pairs, output, which of the pair: 64 bytes, shifted by 0, 4, 8 and
// 12 bits, are four rows of a tile. Weights of 8 bits are two planes, the upper 4 bits first.
// Scales and shifts lie as [out / 32][groups][32].
//   y[o] = unit * sum over g of scale[g][o] * sum over k in g of x[k] * (q[o][k] - middle + shift)
// with `middle` 8 or 128.
#pragma once

#include "team.h"
#include "tiles.h"

struct grouped_args {
  const void *x;          // rows x cols
  const uint8_t *q;
  const uint16_t *scale;  // float16
  const int16_t *shift;   // null: zero
  const int32_t *order;   // null: as they are; or `in` columns of x, -1 for none
  const void *bias;       // null, or out_features: of x's type
  void *out;              // rows x out_features
  int64_t rows, cols, in, out_features;
  int64_t planes;                   // 1, 2
  int64_t group_steps, unit_steps;  // of a group; of what is summed before it is scaled
  int64_t x_bf16, out_bf16;         // or float32
  double unit;
};

#define STEP 32           // input features
#define WIDTH 32          // output features of a block
#define HALF_BYTES 256    // a step of 16 output features in one plane
#define MAX_TOGETHER 256  // rows of x that meet the same weights

// The rows of x as the product reads them, and their sums over each unit of input features.
struct rows {
  char *x;
  float *sum;
  int64_t steps, units;
};

struct product {
  const struct grouped_args *a;
  struct rows *rows;
  int64_t blocks;  // of output features
};

// How often the weights are gone through, each time for so many rows.
INLINE int64_t parts_of(const struct grouped_args *a) {
  return (a->rows + MAX_TOGETHER - 1) / MAX_TOGETHER;
}

INLINE vf from_half(const uint16_t *p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const void *)p));
#elif defined(__F16C__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const void *)p));
#else
  vh h;
  memcpy(&h, p, sizeof h);
  const vu bits = __builtin_convertvector(h, vu);
  return (vf)((bits & 0x7fff) << 13 | (bits & 0x8000) << 16) * 0x1p112f;
#endif
}

INLINE vf from_int16(const int16_t *p) {
  typedef int16_t vs __attribute__((vector_size(2 * VL)));
  vs s;
  memcpy(&s, p, sizeof s);
  return __builtin_convertvector(s, vf);
}

// Adds the sums `t` of one unit, scaled, for n rows. `x_sums`: of the rows of x, `next` apart.
INLINE void add_scaled(float (*restrict sums)[WIDTH], const float (*restrict t)[WIDTH], int64_t n,
                       const uint16_t *restrict scale, const int16_t *restrict shift,
                       const float *restrict x_sums, int64_t next) {
  for (int c = 0; c < WIDTH; c += VL) {
    const vf by = from_half(scale + c), plus = shift ? from_int16(shift + c) * by : (vf){};
    for (int64_t r = 0; r < n; r++) {
      vf y = load(sums[r] + c, 0) + load(t[r] + c, 0) * by;
      if (shift) y += plus * x_sums[r * next];
      store(sums[r] + c, y, 0);
    }
  }
}

// Unit, bias: from a row's sums to `out`. The last block may be wider than what is left of it.
INLINE void end_row(const struct grouped_args *a, const float *sums, int64_t row, int64_t col,
                    int bf16) {
  const int64_t n = a->out_features, end = min64(WIDTH, n - col);
  void *out = (char *)at(a->out, row * n, a->out_bf16);
  for (int64_t c = 0; c < end; c += VL) {
    vf y = load(sums + c, 0) * (float)a->unit;
    if (a->bias) y += load_at(a->bias, col + c, n, bf16);
    if (a->out_bf16)
      store_at(out, col + c, n, y, 1);
    else
      store_at(out, col + c, n, y, 0);
  }
}

// The column of x that meets input feature k of the weights, or -1.
INLINE int64_t column(const struct grouped_args *a, int64_t k) {
  return a->order ? a->order[k] : k < a->cols ? k : -1;
}

INLINE float element(const struct grouped_args *a, int64_t row, int64_t k, int bf16) {
  const int64_t col = column(a, k);
  if (col < 0) return 0;
  const char *p = at(a->x, row * a->cols + col, bf16);
  return bf16 ? bf16_to_float(*(const uint16_t *)p) : *(const float *)p;
}

INLINE float sum_unit(const struct grouped_args *a, int64_t row, int64_t k, int64_t end, int bf16) {
  vf s = {};
  if (!a->order && end <= a->cols) {
    for (; k < end; k += VL) s += load(at(a->x, row * a->cols + k, bf16), bf16);
    return sum(s);
  }
  float rest = 0;
  for (; k < end; k++) rest += element(a, row, k, bf16);
  return rest;
}

INLINE void sum_units(const struct grouped_args *a, struct rows *rows, int64_t row, int bf16) {
  const int64_t unit = a->unit_steps * STEP;
  for (int64_t u = 0; u < rows->units; u++)
    rows->sum[row * rows->units + u] = sum_unit(a, row, u * unit, (u + 1) * unit, bf16);
}

// A row of x as float32.
INLINE void float_row(const struct grouped_args *a, struct rows *rows, int64_t row, int bf16) {
  float *x = (float *)rows->x + row * a->in;
  for (int64_t k = 0; k < a->in; k++) x[k] = element(a, row, k, bf16);
  if (a->shift) sum_units(a, rows, row, bf16);
}

// Whether x is multiplied in vectors even where there are tiles, which do not pay for one row.
INLINE int is_lone(const struct grouped_args *a) { return a->rows == 1 && a->planes == 1; }
