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
  const void *x;         // rows x in: bfloat16, or float32 beside int8 weights
  const void *weight;    // packed
  const float *w_scale;  // per output feature, of int8 weights
  const void *bias;      // null, or out_features: of x's type
  void *out;             // rows x out_features
  int64_t rows, in, out_features;
  int64_t x_bf16, out_bf16;  // or float32
};

#ifdef HAVE_TILES

#define BLOCK_ROWS 32      // rows of x at a time: two tiles
#define X_BYTES (1 << 20)  // of x that are worked on together, and stay in the second cache
#define MAX_TOGETHER 512   // rows of these
#define STRIP_STEPS 8      // of 2 KiB of weights, which stay in the first cache
#define AHEAD (8 << 10)    // bytes of weights that are asked for in advance, into the second cache

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

// Products of two tiles of rows take so long that memory would stand idle; one tile of int8 does not,
// and is served best by asking for a step's lines at once, before tile by tile.
INLINE void prefetch(const char *w, int64_t bytes, int ahead) {
  for (int64_t i = 0; i < bytes; i += 64)
    if (ahead)
      _mm_prefetch(w + AHEAD + i, _MM_HINT_T1);
    else
      _mm_prefetch(w + i, _MM_HINT_T0);
}

// What one product reads: the same for all threads. Few rows of x are read where they lie, a step
// of 64 bytes of a row after the other. Many are packed into tiles: 16 rows' steps side by side.
struct operands {
  const char *x;             // of bfloat16 or int8; 16 rows begin 16 * row_bytes apart
  const float *x_scale;      // per row, of int8
  int64_t row_bytes;
  int64_t x_stride, x_step;  // bytes from row to row of a tile, from step to step
};

INLINE struct operands operands(const void *x, int64_t row_bytes, int packed,
                                const float *scale) {
  return (struct operands){x, scale, row_bytes, packed ? 64 : row_bytes, packed ? 1024 : 64};
}

// Adds to the sums of up to 32 rows by 32 outputs. A step takes 64 bytes of each row of x, and 16
// rows of weights, which lie `stride` bytes apart. `cold`: the weights are not cached yet.
INLINE void add_tiles(const struct operands *o, const char *x, const char *w, int64_t stride,
                      int64_t steps, int two, int int8, int cold, int zero, void *sums) {
  if (zero) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums, 128);
    _tile_loadd(1, (char *)sums + 64, 128);
    if (two) {
      _tile_loadd(2, (char *)sums + 16 * 128, 128);
      _tile_loadd(3, (char *)sums + 16 * 128 + 64, 128);
    }
  }
  for (int64_t k = 0; k < steps; k++, x += o->x_step, w += 16 * stride) {
    if (cold) prefetch(w, 16 * stride, two || !int8);
    _tile_loadd(4, x, o->x_stride);
    if (two) _tile_loadd(5, x + 16 * o->row_bytes, o->x_stride);
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
        y = __builtin_convertvector(s, vf) * o->x_scale[row + r];
        y *= load_at(a->w_scale, col + c, n, 0);
      } else {
        y = load(&sums[r][c], 0);
      }
      if (a->bias) y += a->x_bf16 ? load_at(a->bias, col + c, n, 1) : load_at(a->bias, col + c, n, 0);
      void *out = (char *)at(a->out, (row + r) * n, a->out_bf16);
      if (a->out_bf16)
        store_at(out, col + c, n, y, 1);
      else
        store_at(out, col + c, n, y, 0);
    }
}

// 32 outputs for rows begin .. end. Returns how many rows the tiles are set up for.
INLINE int64_t strip(const struct linear_args *a, const struct operands *o, const char *w,
                     int64_t col, int64_t begin, int64_t end, int64_t configured, int int8) {
  const int64_t steps = o->row_bytes / 64, stride = int8 ? 256 : 128;
  const int64_t most = end - begin > BLOCK_ROWS ? STRIP_STEPS : steps;
  int32_t sums[MAX_TOGETHER][32] __attribute__((aligned(64)));
  for (int64_t k = 0; k < steps; k += most)
    for (int64_t row = begin; row < end; row += BLOCK_ROWS) {
      const int64_t rows = min64(BLOCK_ROWS, end - row), n = min64(most, steps - k);
      const char *x = o->x + row * o->row_bytes + k * o->x_step, *from = w + k * 16 * stride;
      if (rows != configured) configure(configured = rows);
      if (rows > 16)
        add_tiles(o, x, from, stride, n, 1, int8, row == begin, k == 0, sums[row - begin]);
      else
        add_tiles(o, x, from, stride, n, 0, int8, row == begin, k == 0, sums[row - begin]);
    }
  finish(a, o, sums, begin, end - begin, col, int8);
  return configured;
}

// All outputs, for some rows of x at a time. Threads take runs of blocks as they come to them: one
// that is held up holds up nobody else.
INLINE void product(const struct linear_args *a, const struct operands *o, int int8) {
  const int64_t width = int8 ? 64 : 32, blocks = (a->out_features + width - 1) / width;
  const int64_t chunk = max64(1, blocks / (8 * omp_get_num_threads()));
  const int64_t fitting = X_BYTES / o->row_bytes / BLOCK_ROWS * BLOCK_ROWS;
  const int64_t together = max64(BLOCK_ROWS, min64(MAX_TOGETHER, fitting));
  int64_t configured = 0;
  for (int64_t row = 0; row < a->rows; row += together) {
    const int64_t end = min64(row + together, a->rows);
#pragma omp for schedule(dynamic, chunk) nowait
    for (int64_t b = 0; b < blocks; b++)
      for (int64_t half = 0; half < width; half += 32) {
        const char *w = (const char *)a->weight + b * width * o->row_bytes + half * 4;
        configured = strip(a, o, w, b * width + half, row, end, configured, int8);
      }
  }
  if (configured) _tile_release();
}

INLINE char *packed_row(char *packed, int64_t row, int64_t row_bytes) {
  return packed + row / 16 * 16 * row_bytes + row % 16 * 64;
}

EXPORT int tgis_linear_bf16(const struct linear_args *args) {
  const struct linear_args a = *args;
  const int64_t row_bytes = a.in * 2;
  const int pack = a.rows > BLOCK_ROWS;
  char *packed = pack ? malloc((a.rows + 15) / 16 * 16 * row_bytes) : NULL;
  if (pack && !packed) return ERROR_MEMORY;
  const struct operands o = operands(pack ? packed : a.x, row_bytes, pack, NULL);
#pragma omp parallel
  {
    if (pack) {
#pragma omp for
      for (int64_t r = 0; r < a.rows; r++)
        for (int64_t k = 0; k < row_bytes; k += 64)
          memcpy(packed_row(packed, r, row_bytes) + k * 16, at(a.x, r * a.in, 1) + k, 64);
    }
    product(&a, &o, 0);
  }
  free(packed);
  return 0;
}

EXPORT int tgis_linear_int8(const struct linear_args *args) {
  const struct linear_args a = *args;
  float *scale = malloc(a.rows * sizeof *scale + (a.rows + 15) / 16 * 16 * a.in + 1);
  if (!scale) return ERROR_MEMORY;
  char *packed = (char *)(scale + a.rows);
  const struct operands o = operands(packed, a.in, 1, scale);
#pragma omp parallel
  {
#pragma omp for
    for (int64_t r = 0; r < a.rows; r++) {
      const void *x = at(a.x, r * a.in, a.x_bf16);
      int8_t *q = (int8_t *)packed_row(packed, r, a.in);
      scale[r] = a.x_bf16 ? quantize_row(x, q, a.in, 1024, 1) : quantize_row(x, q, a.in, 1024, 0);
    }
    product(&a, &o, 1);
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
