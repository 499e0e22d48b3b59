// Linear layers on AMX tiles. Few rows: the weights stream through once, at memory speed. Many: a
// strip of weights stays in the first cache, and some rows of x in the second.
//
// The weights are packed as oneDNN packs them; the caller has checked that they are:
//   bfloat16  [out / 32][in / 2][32][2]      int8  [out / 64][in / 4][64][4]
// with `out` rounded up, and `in` a multiple of 32 (bfloat16) or 64 (int8).
// A row's sums are always added in the same order: its result does not depend on other rows.

#include <stdlib.h>

#include "quantize.h"
#include "team.h"
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

static _Thread_local int64_t configured;  // rows that this thread's tiles are set up for

struct product {
  const struct linear_args *a;
  struct operands o;
  char *packed;
  float *scale;
  int64_t blocks, together;  // of outputs; rows of x that are worked on together
};

// Iterations: blocks of outputs for some rows of x, then for the next rows.
INLINE void blocks(const struct product *p, int64_t begin, int64_t end, int int8) {
  const int64_t width = int8 ? 64 : 32, row_bytes = p->o.row_bytes;
  for (int64_t i = begin; i < end; i++) {
    const int64_t b = i % p->blocks, row = i / p->blocks * p->together;
    const int64_t last = min64(row + p->together, p->a->rows);
    for (int64_t half = 0; half < width; half += 32) {
      const char *w = (const char *)p->a->weight + b * width * row_bytes + half * 4;
      configured = strip(p->a, &p->o, w, b * width + half, row, last, configured, int8);
    }
  }
}

static void leave(void) {
  configured = 0;
  _tile_release();
}

static void blocks_bf16(void *what, int64_t begin, int64_t end) { blocks(what, begin, end, 0); }
static void blocks_int8(void *what, int64_t begin, int64_t end) { blocks(what, begin, end, 1); }

static void multiply(struct product *p, int64_t width, span_of_loop span) {
  const int64_t fitting = X_BYTES / p->o.row_bytes / BLOCK_ROWS * BLOCK_ROWS;
  p->together = max64(BLOCK_ROWS, min64(MAX_TOGETHER, fitting));
  p->blocks = (p->a->out_features + width - 1) / width;
  const int64_t parts = (p->a->rows + p->together - 1) / p->together;
  team_loop_then(parts * p->blocks, team_part(p->blocks), span, p, leave);
}

INLINE char *packed_row(char *packed, int64_t row, int64_t row_bytes) {
  return packed + row / 16 * 16 * row_bytes + row % 16 * 64;
}

static void pack(void *what, int64_t begin, int64_t end) {
  const struct product *p = what;
  const int64_t row_bytes = p->o.row_bytes;
  for (int64_t r = begin; r < end; r++)
    for (int64_t k = 0; k < row_bytes; k += 64)
      memcpy(packed_row(p->packed, r, row_bytes) + k * 16, at(p->a->x, r * p->a->in, 1) + k, 64);
}

EXPORT int tgis_linear_bf16(const struct linear_args *args) {
  const struct linear_args a = *args;
  const int64_t row_bytes = a.in * 2;
  const int is_packed = a.rows > BLOCK_ROWS;
  char *packed = is_packed ? malloc((a.rows + 15) / 16 * 16 * row_bytes) : NULL;
  if (is_packed && !packed) return ERROR_MEMORY;
  struct product p = {&a, operands(is_packed ? packed : a.x, row_bytes, is_packed, NULL), packed};
  if (is_packed) team_loop(a.rows, team_part(a.rows), pack, &p);
  multiply(&p, 32, blocks_bf16);
  free(packed);
  return 0;
}

static void quantize(void *what, int64_t begin, int64_t end) {
  const struct product *p = what;
  const struct linear_args *a = p->a;
  for (int64_t r = begin; r < end; r++) {
    const void *x = at(a->x, r * a->in, a->x_bf16);
    int8_t *q = (int8_t *)packed_row(p->packed, r, a->in);
    p->scale[r] = a->x_bf16 ? quantize_row(x, q, a->in, 1024, 1) : quantize_row(x, q, a->in, 1024, 0);
  }
}

EXPORT int tgis_linear_int8(const struct linear_args *args) {
  const struct linear_args a = *args;
  float *scale = malloc(a.rows * sizeof *scale + (a.rows + 15) / 16 * 16 * a.in + 1);
  if (!scale) return ERROR_MEMORY;
  char *packed = (char *)(scale + a.rows);
  struct product p = {&a, operands(packed, a.in, 1, scale), packed, scale};
  team_loop(a.rows, team_part(a.rows), quantize, &p);
  multiply(&p, 64, blocks_int8);
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
