// bfloat16 rows on AMX tiles. Few rows: the weights are integers, which bfloat16 holds exactly; they
// become bfloat16 by table, a few KB at a time, and sums are scaled in float32: nothing is rounded,
// and a row's sums are added in the same order whatever the other rows are. Many rows: the weights
// are scaled first, and rounded to bfloat16, as scaling the sums would take longer than the product.
#pragma once

#include "grouped.h"

#ifdef HAVE_TILES

#define FEW_ROWS 32      // two tiles of them
#define STRIP_TILES 16   // of weights, 1 KiB each, which stay in the first cache
#define TILE 512         // elements
#define AHEAD 1024       // bytes of weights that are asked for in advance

// Tiles 0, 1: sums of the first 16 rows by 2 x 16 outputs; 2, 3: of the next 16 rows. 4, 5: x of
// these rows; 6, 7: weights.
static void configure_grouped(int64_t n) {
  struct tile_shapes shapes = {.palette = 1};
  const uint8_t first = min64(n, 16), second = max64(n - 16, 1);
  const uint8_t tile_rows[8] = {first, first, second, second, first, second, 16, 16};
  for (int i = 0; i < 8; i++) {
    shapes.row_bytes[i] = 64;
    shapes.rows[i] = tile_rows[i];
  }
  _tile_loadconfig(&shapes);
}

// Where a row's step lies: beside that of the up to 16 rows of its tile.
INLINE char *tile_row(const struct rows *rows, int64_t total, int64_t row, int64_t step) {
  const int64_t first = row / 16 * 16, together = min64(16, total - first);
  return rows->x + 64 * (first * rows->steps + step * together + row - first);
}

INLINE void tile_in_row(const struct grouped_args *a, struct rows *rows, int64_t row) {
  const uint16_t *x = (const uint16_t *)a->x + row * a->cols;
  for (int64_t s = 0; s < rows->steps; s++) {
    uint16_t *to = (uint16_t *)tile_row(rows, a->rows, row, s);
    if (!a->order && (s + 1) * STEP <= a->cols) {
      memcpy(to, x + s * STEP, 64);
      continue;
    }
    for (int64_t k = 0; k < STEP; k++) {
      const int64_t col = column(a, s * STEP + k);
      to[k] = col < 0 ? 0 : x[col];
    }
  }
}

// The values of 4 bits, minus `middle`, times `factor`, as bfloat16; twice over.
static __m512i values_of(int middle, int factor) {
  uint16_t values[32];
  for (int i = 0; i < 32; i++) {
    const float v = (float)((i % 16 - middle) * factor);
    uint32_t bits;
    memcpy(&bits, &v, 4);
    values[i] = bits >> 16;
  }
  return _mm512_loadu_si512(values);
}

// A step of 16 output features -> a tile. The index into the table is 5 bits wide, and the table
// repeats itself: what stands above the 4 bits does not matter.
INLINE void expand(const uint8_t *q, __m512i values, uint16_t *tile) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const __m512i w = _mm512_loadu_si512(q + 64 * i);
    __m512i *to = (__m512i *)(tile + 128 * i);
    _mm512_store_si512(to, _mm512_permutexvar_epi16(w, values));
    _mm512_store_si512(to + 1, _mm512_permutexvar_epi16(_mm512_srli_epi16(w, 4), values));
    _mm512_store_si512(to + 2, _mm512_permutexvar_epi16(_mm512_srli_epi16(w, 8), values));
    _mm512_store_si512(to + 3, _mm512_permutexvar_epi16(_mm512_srli_epi16(w, 12), values));
  }
}

// The same, scaled and rounded.
INLINE void expand_scaled(const uint8_t *q, int planes, __m512i high, __m512i low, __m512 by,
                          __m512 plus, uint16_t *tile) {
  const __m512i upper = _mm512_set1_epi32((int)0xffff0000);
  const __m512i zip = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                       23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  for (int i = 0; i < 4; i++) {
    __m512i w = _mm512_loadu_si512(q + 64 * i), v = w;
    if (planes == 2) v = _mm512_loadu_si512(q + 2 * HALF_BYTES + 64 * i);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++, w = _mm512_srli_epi16(w, 4), v = _mm512_srli_epi16(v, 4)) {
      const __m512i pair = _mm512_permutexvar_epi16(w, high);
      __m512 even = (__m512)_mm512_slli_epi32(pair, 16), odd = (__m512)_mm512_and_si512(pair, upper);
      if (planes == 2) {
        const __m512i rest = _mm512_permutexvar_epi16(v, low);
        even = _mm512_add_ps(even, (__m512)_mm512_slli_epi32(rest, 16));
        odd = _mm512_add_ps(odd, (__m512)_mm512_and_si512(rest, upper));
      }
      even = _mm512_fmadd_ps(even, by, plus);
      odd = _mm512_fmadd_ps(odd, by, plus);
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
      _mm512_store_si512(tile + 128 * i + 32 * j, _mm512_permutexvar_epi16(zip, both));
    }
  }
}

// Sums of up to 32 rows from `row` on by 32 output features, over some steps: anew, or added to.
INLINE void multiply(const struct rows *rows, int64_t total, int64_t row, int64_t step,
                     int64_t steps, const uint16_t *tiles, int planes, int anew,
                     float sums[][WIDTH]) {
  const int64_t n = min64(16, total - row), n2 = min64(16, total - row - 16);
  const char *x = tile_row(rows, total, row, step);
  const char *x2 = n2 > 0 ? tile_row(rows, total, row + 16, step) : x;
  if (anew) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums[0], 128);
    _tile_loadd(1, sums[0] + 16, 128);
    if (n2 > 0) {
      _tile_loadd(2, sums[16], 128);
      _tile_loadd(3, sums[16] + 16, 128);
    }
  }
  for (int64_t s = 0; s < steps; s++, x += 64 * n, x2 += 64 * n2) {
    _tile_loadd(4, x, 64);
    if (n2 > 0) _tile_loadd(5, x2, 64);
    for (int p = 0; p < planes; p++, tiles += 2 * TILE) {
      _tile_loadd(6, tiles, 64);
      _tile_loadd(7, tiles + TILE, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if (n2 > 0) {
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, sums[0], 128);
  _tile_stored(1, sums[0] + 16, 128);
  if (n2 > 0) {
    _tile_stored(2, sums[16], 128);
    _tile_stored(3, sums[16] + 16, 128);
  }
}

// Block b of the output features for all rows, which are few.
INLINE void few_rows(const struct grouped_args *a, const struct rows *rows, int64_t b, int planes) {
  const __m512i high = planes == 2 ? values_of(8, 16) : values_of(8, 1), low = values_of(0, 1);
  const int64_t steps = rows->steps, groups = steps / a->group_steps, unit = a->unit_steps;
  const int64_t most = STRIP_TILES / (2 * planes);
  const uint8_t *q = a->q + b * steps * planes * 2 * HALF_BYTES;
  uint16_t tiles[2][STRIP_TILES * TILE] __attribute__((aligned(64)));
  float unit_sums[FEW_ROWS][WIDTH] __attribute__((aligned(64)));
  float sums[FEW_ROWS][WIDTH] __attribute__((aligned(64)));
  memset(sums, 0, a->rows * sizeof sums[0]);
  for (int64_t s = 0, turn = 0; s < steps; s += most, turn ^= 1) {
    const int64_t n = min64(most, steps - s);
    for (int64_t t = 0; t < n * planes * 2; t++, q += HALF_BYTES) {
      for (int i = 0; i < HALF_BYTES; i += 64) _mm_prefetch(q + AHEAD + i, _MM_HINT_T0);
      expand(q, planes == 2 && t / 2 % 2 ? low : high, tiles[turn] + t * TILE);
    }
    for (int64_t u = s; u < s + n; u += unit) {
      const int64_t g = (b * groups + u / a->group_steps) * WIDTH;
      multiply(rows, a->rows, 0, u, unit, tiles[turn] + (u - s) * planes * 2 * TILE, planes, 1,
               unit_sums);
      if (a->shift)
        add_scaled(sums, unit_sums, a->rows, a->scale + g, a->shift + g, rows->sum + u / unit,
                   rows->units);
      else
        add_scaled(sums, unit_sums, a->rows, a->scale + g, NULL, NULL, 0);
    }
  }
  for (int64_t r = 0; r < a->rows; r++) end_row(a, sums[r], r, b * WIDTH, 1);
}

// Block b of the output features for rows begin .. end. Returns how many the tiles are set up for.
INLINE int64_t many_rows(const struct grouped_args *a, const struct rows *rows, int64_t b,
                         int64_t begin, int64_t end, int64_t configured, int planes) {
  const __m512i high = planes == 2 ? values_of(8, 16) : values_of(8, 1), low = values_of(0, 1);
  const int64_t steps = rows->steps, groups = steps / a->group_steps, most = STRIP_TILES / 2;
  const uint8_t *q = a->q + b * steps * planes * 2 * HALF_BYTES;
  uint16_t tiles[STRIP_TILES * TILE] __attribute__((aligned(64)));
  float sums[MAX_TOGETHER][WIDTH] __attribute__((aligned(64)));
  for (int64_t s = 0; s < steps; s += most) {
    const int64_t n = min64(most, steps - s);
    for (int64_t t = 0; t < n; t++, q += planes * 2 * HALF_BYTES)
      for (int half = 0; half < 2; half++) {
        const int64_t g = (b * groups + (s + t) / a->group_steps) * WIDTH + 16 * half;
        const vf by = from_half(a->scale + g);
        const vf plus = a->shift ? from_int16(a->shift + g) * by : (vf){};
        expand_scaled(q + half * HALF_BYTES, planes, high, low, (__m512)by, (__m512)plus,
                      tiles + (2 * t + half) * TILE);
      }
    for (int64_t row = begin; row < end; row += FEW_ROWS) {
      const int64_t together = min64(FEW_ROWS, end - row);
      if (together != configured) configure_grouped(configured = together);
      multiply(rows, end, row, s, n, tiles, 1, s == 0, sums + row - begin);
    }
  }
  for (int64_t r = begin; r < end; r++) end_row(a, sums[r - begin], r, b * WIDTH, 1);
  return configured;
}

// Adds what a tile would to the sums of 16 output features: a step's even and odd inputs are summed
// apart, then both together. So a row alone gives the same bits as among others.
INLINE __m512 add_step(__m512 sums, const uint8_t *q, __m512 values, const float *x) {
  __m512 even = _mm512_setzero_ps(), odd = even;
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const __m512i w = _mm512_loadu_si512(q + 64 * i);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++, x += 2) {
      const __m512 first = _mm512_permutexvar_ps(_mm512_srli_epi32(w, 4 * j), values);
      const __m512 second = _mm512_permutexvar_ps(_mm512_srli_epi32(w, 16 + 4 * j), values);
      even = _mm512_fmadd_ps(first, _mm512_set1_ps(x[0]), even);
      odd = _mm512_fmadd_ps(second, _mm512_set1_ps(x[1]), odd);
    }
  }
  return _mm512_add_ps(sums, _mm512_add_ps(even, odd));
}

// Block b of the output features for one row and weights of 4 bits, which become floats in registers.
INLINE void lone_row(const struct grouped_args *a, const struct rows *rows, int64_t b) {
  const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  const int64_t steps = rows->steps, groups = steps / a->group_steps, unit = a->unit_steps;
  const uint8_t *q = a->q + b * steps * 2 * HALF_BYTES;
  const float *x = (const float *)rows->x;
  float unit_sums[1][WIDTH] __attribute__((aligned(64)));
  float sums[1][WIDTH] __attribute__((aligned(64))) = {{0}};
  for (int64_t s = 0; s < steps; s += unit) {
    __m512 first = _mm512_setzero_ps(), second = first;
    for (int64_t u = 0; u < unit; u++, x += STEP, q += 2 * HALF_BYTES) {
      for (int i = 0; i < 2 * HALF_BYTES; i += 64) _mm_prefetch(q + AHEAD + i, _MM_HINT_T0);
      first = add_step(first, q, values, x);
      second = add_step(second, q + HALF_BYTES, values, x);
    }
    _mm512_store_ps(unit_sums[0], first);
    _mm512_store_ps(unit_sums[0] + 16, second);
    const int64_t g = (b * groups + s / a->group_steps) * WIDTH;
    if (a->shift)
      add_scaled(sums, unit_sums, 1, a->scale + g, a->shift + g, rows->sum + s / unit, 0);
    else
      add_scaled(sums, unit_sums, 1, a->scale + g, NULL, NULL, 0);
  }
  end_row(a, sums[0], 0, b * WIDTH, 1);
}

// Iterations: blocks of outputs for some rows of x, then for the next rows.
INLINE void tiled_blocks(const struct product *p, int64_t begin, int64_t end, int planes) {
  const struct grouped_args *a = p->a;
  int64_t configured = 0;
  if (a->rows <= FEW_ROWS) configure_grouped(a->rows);
  for (int64_t i = begin; i < end; i++) {
    const int64_t b = i % p->blocks, row = i / p->blocks * MAX_TOGETHER;
    if (a->rows <= FEW_ROWS)
      few_rows(a, p->rows, b, planes);
    else
      configured = many_rows(a, p->rows, b, row, min64(row + MAX_TOGETHER, a->rows), configured,
                             planes);
  }
  _tile_release();
}

static void tiled_blocks_1(void *what, int64_t begin, int64_t end) {
  tiled_blocks(what, begin, end, 1);
}

static void tiled_blocks_2(void *what, int64_t begin, int64_t end) {
  tiled_blocks(what, begin, end, 2);
}

static void lone_blocks(void *what, int64_t begin, int64_t end) {
  const struct product *p = what;
  for (int64_t b = begin; b < end; b++) lone_row(p->a, p->rows, b);
}

static void tiled_rows(void *what, int64_t begin, int64_t end) {
  const struct product *p = what;
  for (int64_t r = begin; r < end; r++) {
    tile_in_row(p->a, p->rows, r);
    if (p->a->shift && p->a->rows <= FEW_ROWS) sum_units(p->a, p->rows, r, 1);
  }
}

static void on_tiles(struct product *p) {
  const int64_t part = team_part(p->blocks);
  if (is_lone(p->a)) {
    float_row(p->a, p->rows, 0, 1);
    return team_loop(p->blocks, part, lone_blocks, p);
  }
  team_loop(p->a->rows, team_part(p->a->rows), tiled_rows, p);
  team_loop(p->blocks * parts_of(p->a), part, p->a->planes == 2 ? tiled_blocks_2 : tiled_blocks_1, p);
}
#else
#define on_tiles(p) ((void)0)
#endif
