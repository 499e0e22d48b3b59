// Linear layers on weights of 4 or 8 bits with a scale for each group of them: on AMX tiles where x
// is bfloat16, else in short vectors of float32.

#include <stdlib.h>

#include "grouped_tiles.h"

// A step's weights as [input][output].
INLINE void expand_floats(const uint8_t *q, int planes, float w[STEP][WIDTH]) {
  for (int half = 0; half < 2; half++)
    for (int z = 0; z < 4; z++)
      for (int lane = 0; lane < 32; lane++) {
        const uint8_t *p = q + half * HALF_BYTES + z * 64 + lane * 2;
        uint32_t v = p[0] | p[1] << 8, low = 0;
        if (planes == 2) low = p[2 * HALF_BYTES] | p[2 * HALF_BYTES + 1] << 8;
        for (int j = 0; j < 4; j++, v >>= 4, low >>= 4) {
          const int n = (int)(v & 15) - 8;
          w[2 * (4 * z + j) + lane % 2][16 * half + lane / 2] =
              planes == 2 ? n * 16 + (int)(low & 15) : n;
        }
      }
}

INLINE void multiply_row(const float *x, float w[STEP][WIDTH], float *sums) {
  vf s[WIDTH / VL];
  for (int c = 0; c < WIDTH / VL; c++) s[c] = load(sums + c * VL, 0);
  for (int k = 0; k < STEP; k++)
    for (int c = 0; c < WIDTH / VL; c++) s[c] += load(w[k] + c * VL, 0) * x[k];
  for (int c = 0; c < WIDTH / VL; c++) store(sums + c * VL, s[c], 0);
}

// Block b of the output features for rows begin .. end.
static void vector_block(const struct grouped_args *a, const struct rows *rows, int64_t b,
                         int64_t begin, int64_t end) {
  const int64_t steps = rows->steps, groups = steps / a->group_steps, unit = a->unit_steps;
  const int64_t step_bytes = a->planes * 2 * HALF_BYTES;
  float w[STEP][WIDTH], unit_sums[MAX_TOGETHER][WIDTH], sums[MAX_TOGETHER][WIDTH];
  memset(sums, 0, (end - begin) * sizeof sums[0]);
  for (int64_t s = 0; s < steps; s++) {
    const uint8_t *q = a->q + (b * steps + s) * step_bytes;
    if (a->planes == 2)
      expand_floats(q, 2, w);
    else
      expand_floats(q, 1, w);
    if (s % unit == 0) memset(unit_sums, 0, (end - begin) * sizeof sums[0]);
    for (int64_t r = begin; r < end; r++)
      multiply_row((const float *)rows->x + (r * steps + s) * STEP, w, unit_sums[r - begin]);
    if ((s + 1) % unit) continue;
    const int64_t g = (b * groups + s / a->group_steps) * WIDTH;
    if (a->shift)
      add_scaled(sums, unit_sums, end - begin, a->scale + g, a->shift + g,
                 rows->sum + begin * rows->units + s / unit, rows->units);
    else
      add_scaled(sums, unit_sums, end - begin, a->scale + g, NULL, NULL, 0);
  }
  for (int64_t r = begin; r < end; r++)
    if (a->x_bf16)
      end_row(a, sums[r - begin], r, b * WIDTH, 1);
    else
      end_row(a, sums[r - begin], r, b * WIDTH, 0);
}

static void float_rows(void *what, int64_t begin, int64_t end) {
  const struct product *p = what;
  for (int64_t r = begin; r < end; r++)
    if (p->a->x_bf16)
      float_row(p->a, p->rows, r, 1);
    else
      float_row(p->a, p->rows, r, 0);
}

static void vector_blocks(void *what, int64_t begin, int64_t end) {
  const struct product *p = what;
  for (int64_t i = begin; i < end; i++) {
    const int64_t row = i / p->blocks * MAX_TOGETHER;
    vector_block(p->a, p->rows, i % p->blocks, row, min64(row + MAX_TOGETHER, p->a->rows));
  }
}

static void in_vectors(struct product *p) {
  team_loop(p->a->rows, 1, float_rows, p);
  team_loop(p->blocks * parts_of(p->a), 1, vector_blocks, p);
}

EXPORT int tgis_linear_grouped(const struct grouped_args *args) {
  const struct grouped_args a = *args;
  const int tiles = a.x_bf16 && tgis_amx(NULL);
  const int64_t x_bytes = a.rows * a.in * (tiles && !is_lone(&a) ? 2 : 4);
  struct rows rows = {.steps = a.in / STEP, .units = a.in / STEP / a.unit_steps};
  rows.x = malloc(x_bytes + (a.shift ? a.rows * rows.units * 4 : 0) + 64);
  if (!rows.x) return ERROR_MEMORY;
  rows.sum = (float *)(rows.x + x_bytes);
  struct product p = {&a, &rows, (a.out_features + WIDTH - 1) / WIDTH};
  if (tiles)
    on_tiles(&p);
  else
    in_vectors(&p);
  free(rows.x);
  return 0;
}
