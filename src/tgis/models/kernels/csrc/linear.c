// Linear layers on AMX tiles. Few rows: the weights stream through once, at memory speed. Many: a
// strip of weights stays in the first cache, and some rows of x in the second.
//
// The weights are packed as oneDNN packs them; the caller has checked that they are:
//   bfloat16  [out / 32][in / 2][32][2]      int8  [out / 64][in / 4][64][4]
// with `out` rounded up, and `in` a multiple of 32 (bfloat16) or 64 (int8).
// A row's sums are always added in the same order: its result does not depend on other rows.

#include <omp.h>
#include <stdlib.h>

#include "quantize.h"
#include "tiles.h"

struct linear_args {
  const void *x;         // rows x in: bfloat16
  const void *weight;    // packed
  const float *w_scale;  // per output feature, of int8 weights
  const void *bias;      // null, or out_features: bfloat16
  void *out;             // rows x out_features
  int64_t rows, in, out_features;
  int64_t out_bf16;  // or float32
};

#ifdef HAVE_TILES

#define BLOCK_ROWS 32      // rows of x at a time: two tiles
#define X_BYTES (1 << 19)  // of x that are worked on together

// Tiles 0, 1: sums of the first 16 rows by 2 x 16 outputs; 2, 3: of the next 16 rows. 4, 5: x of
// these rows; 6, 7: weights.
static void configure(int64_t rows) {
  struct tile_shapes shapes = {.palette = 1};
  const uint8_t first = min64(rows, 16), second = max64(rows - 16, 1);
  const uint8_t tile_rows[8] = {first, first, second, second, first, second, 16, 16};
  for (int i = 0; i < 8; i++) {
    shapes.row_bytes[i] = 64;
    shapes.rows[i] = tile_rows[i];
  }
  _tile_loadconfig(&shapes);
}

INLINE void prefetch(const char *p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(p + i, _MM_HINT_T0);
}

// Sums of up to 32 rows by 32 outputs over all of `in`. A step takes 64 bytes of each row of x, and
// 16 rows of weights, which lie `stride` bytes apart. `first`: the weights are not cached yet.
INLINE void tile_sums(const char *x, int64_t x_stride, const char *w, int64_t stride,
                      int64_t steps, int two, int int8, int first, void *sums) {
  _tile_zero(0);
  _tile_zero(1);
  if (two) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < steps; k++, x += 64, w += 16 * stride) {
    if (first) prefetch(w, 16 * stride);  // all lines of the step at once, before tile by tile
    _tile_loadd(4, x, x_stride);
    if (two) _tile_loadd(5, x + 16 * x_stride, x_stride);
    _tile_loadd(6, w, stride);
    _tile_loadd(7, w + 64, stride);
    if (int8) {
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(1, 4, 7);
      if (two) {
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
      }
    } else {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if (two) {
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, sums, 128);
  _tile_stored(1, (char *)sums + 64, 128);
  if (two) {
    _tile_stored(2, (char *)sums + 16 * 128, 128);
    _tile_stored(3, (char *)sums + 16 * 128 + 64, 128);
  }
}

// What one product reads: the same for all threads.
struct operands {
  const char *x;         // rows x in, of bfloat16 or int8
  const float *x_scale;  // per row, of int8
  int64_t row_bytes;
};

// Scales, bias: from the sums to `out`. The last block may be wider than what is left of `out`.
INLINE void finish(const struct linear_args *a, const struct operands *o, int32_t sums[][32],
                   int64_t row, int64_t rows, int64_t col, int int8) {
  const int64_t n = a->out_features, end = min64(32, n - col);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < end; c += VL) {
      vf y;
      if (int8) {
        vi s;
        memcpy(&s, &sums[r][c], sizeof s);
        y = __builtin_convertvector(s, vf) * o->x_scale[row + r] * load_at(a->w_scale, col + c, n, 0);
      } else {
        y = load(&sums[r][c], 0);
      }
      if (a->bias) y += load_at(a->bias, col + c, n, 1);
      void *out = (char *)at(a->out, (row + r) * n, a->out_bf16);
      if (a->out_bf16)
        store_at(out, col + c, n, y, 1);
      else
        store_at(out, col + c, n, y, 0);
    }
}

// One block of the packed weights for rows begin .. end. Returns how many rows the tiles are set up
// for.
INLINE int64_t block(const struct linear_args *a, const struct operands *o, int64_t b,
                     int64_t begin, int64_t end, int64_t configured, int int8) {
  const int64_t width = int8 ? 64 : 32, steps = o->row_bytes / 64;
  for (int64_t half = 0; half < width; half += 32) {
    const char *w = (const char *)a->weight + b * width * o->row_bytes + half * 4;
    for (int64_t row = begin; row < end; row += BLOCK_ROWS) {
      const int64_t rows = min64(BLOCK_ROWS, end - row);
      const char *x = o->x + row * o->row_bytes;
      int32_t sums[BLOCK_ROWS][32] __attribute__((aligned(64)));
      if (rows != configured) configure(configured = rows);
      if (rows > 16)
        tile_sums(x, o->row_bytes, w, width * 4, steps, 1, int8, row == begin, sums);
      else
        tile_sums(x, o->row_bytes, w, width * 4, steps, 0, int8, row == begin, sums);
      finish(a, o, sums, row, rows, b * width + half, int8);
    }
  }
  return configured;
}

// All blocks, for as many rows of x at a time as stay in the cache beside them. Threads take runs of
// blocks as they come to them: one that is held up holds up nobody else.
INLINE void blocks(const struct linear_args *a, const struct operands *o, int int8) {
  const int64_t width = int8 ? 64 : 32, count = (a->out_features + width - 1) / width;
  const int64_t chunk = max64(1, count / (8 * omp_get_num_threads()));
  const int64_t together = max64(BLOCK_ROWS, X_BYTES / o->row_bytes / BLOCK_ROWS * BLOCK_ROWS);
  int64_t configured = 0;
  for (int64_t row = 0; row < a->rows; row += together) {
    const int64_t end = min64(row + together, a->rows);
#pragma omp for schedule(dynamic, chunk) nowait
    for (int64_t b = 0; b < count; b++) configured = block(a, o, b, row, end, configured, int8);
  }
  if (configured) _tile_release();
}

EXPORT int tgis_linear_bf16(const struct linear_args *args) {
  const struct linear_args a = *args;
  const struct operands o = {a.x, NULL, a.in * 2};
#pragma omp parallel
  blocks(&a, &o, 0);
  return 0;
}

EXPORT int tgis_linear_int8(const struct linear_args *args) {
  const struct linear_args a = *args;
  float *scale = malloc(a.rows * (sizeof *scale + a.in) + 1);
  if (!scale) return ERROR_MEMORY;
  int8_t *q = (int8_t *)(scale + a.rows);
  const struct operands o = {(const char *)q, scale, a.in};
#pragma omp parallel
  {
#pragma omp for
    for (int64_t r = 0; r < a.rows; r++)
      scale[r] = quantize_row(at(a.x, r * a.in, 1), q + r * a.in, a.in, 1);
    blocks(&a, &o, 1);
  }
  free(scale);
  return 0;
}

#else

EXPORT int tgis_linear_bf16(const struct linear_args *args) {
  (void)args;
  return ERROR_UNSUPPORTED;
}

EXPORT int tgis_linear_int8(const struct linear_args *args) {
  (void)args;
  return ERROR_UNSUPPORTED;
}

#endif
