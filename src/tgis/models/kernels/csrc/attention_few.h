// Scores and weighted values of one split for up to 16 query rows in bfloat16, on AMX tiles. Keys
// and weights are read where they lie; values are interleaved by pairs of positions on the way.
#pragma once

#include "attention.h"
#include "tiles.h"

#ifdef HAVE_TILES

// Tiles 0 to 3: sums of values, rows x 16 columns. 4: weights, rows x 32 positions. 5: queries or
// values. 6: keys. 7: scores, 16 positions x rows.
static void configure_few(int64_t rows) {
  struct tile_shapes shapes = {.palette = 1};
  for (int i = 0; i < 8; i++) {
    shapes.row_bytes[i] = 64;
    shapes.rows[i] = i < 5 ? rows : 16;
  }
  _tile_loadconfig(&shapes);
}

// 16 keys' elements c .. c + 32, of which n keys and `left` elements exist, filled up with zeros.
static void copy_keys(const uint16_t *k, int64_t d, int64_t n, int64_t left, uint16_t *out) {
  const __mmask32 columns = left >= 32 ? 0xffffffffu : (1u << left) - 1;
  for (int64_t i = 0; i < 16; i++)
    _mm512_storeu_si512(out + 32 * i, _mm512_maskz_loadu_epi16(i < n ? columns : 0, k + i * d));
}

// Meanwhile asks for the values of the same positions, and the next keys.
static void scores_few(struct block *b, const uint16_t *k, const uint16_t *v, int64_t d) {
  uint32_t q[MAX_HEAD_DIM / 32][16][16] __attribute__((aligned(64)));
  uint16_t padded[16 * 32] __attribute__((aligned(64)));
  float sums[16][16] __attribute__((aligned(64)));
  for (int64_t c = 0; c < d; c += 32) {
    const __mmask32 columns = d - c >= 32 ? 0xffffffffu : (1u << (d - c)) - 1;
    __m512i rows[16];
    for (int64_t r = 0; r < 16; r++)
      rows[r] = r < b->rows ? _mm512_maskz_loadu_epi16(columns, (const uint16_t *)b->q[r] + c)
                            : _mm512_setzero_si512();
    transpose16(rows);
    for (int64_t i = 0; i < 16; i++) _mm512_store_si512(q[c / 32][i], rows[i]);
  }
  for (int64_t j = 0; j < b->n; j += 16) {
    const uint16_t *keys = k + j * d;
    for (int64_t i = 0; i < 16 * d * 2; i += 64) {
      __builtin_prefetch((const char *)(v + j * d) + i, 0, 2);
      __builtin_prefetch((const char *)(keys + 16 * d) + i, 0, 3);
    }
    _tile_zero(7);
    for (int64_t c = 0; c < d; c += 32) {
      if (b->n - j < 16 || d - c < 32) {
        copy_keys(keys + c, d, b->n - j, d - c, padded);
        _tile_loadd(6, padded, 64);
      } else {
        _tile_loadd(6, keys + c, d * 2);
      }
      _tile_loadd(5, q[c / 32], 64);
      _tile_dpbf16ps(7, 6, 5);
    }
    _tile_stored(7, sums, 64);
    __m512i x[16];
    for (int64_t i = 0; i < 16; i++) x[i] = _mm512_load_si512(sums[i]);
    transpose16(x);
    for (int64_t r = 0; r < 16; r++)
      if (r < b->rows) _mm512_storeu_si512(&b->score[r][j], x[r]);
  }
}

// Two rows of 32 values -> pairs, for the two tiles of these columns. The columns come in the order
// 0-3 8-11 16-19 24-27, then 4-7 12-15 20-23 28-31.
INLINE void interleave(const uint16_t *even, const uint16_t *odd, __mmask32 even_mask,
                       __mmask32 odd_mask, uint32_t *first, uint32_t *second) {
  const __m512i x = _mm512_maskz_loadu_epi16(even_mask, even);
  const __m512i y = _mm512_maskz_loadu_epi16(odd_mask, odd);
  _mm512_store_si512(first, _mm512_unpacklo_epi16(x, y));
  _mm512_store_si512(second, _mm512_unpackhi_epi16(x, y));
}

INLINE void store_values(struct block *b, int64_t c, float first[][16], float second[][16]) {
  const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i high =
      _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  for (int64_t r = 0; r < b->rows; r++) {
    const __m512 x = _mm512_load_ps(first[r]), y = _mm512_load_ps(second[r]);
    _mm512_storeu_ps(b->out[r] + c, _mm512_permutex2var_ps(x, low, y));
    _mm512_storeu_ps(b->out[r] + c + 16, _mm512_permutex2var_ps(x, high, y));
  }
}

// 64 columns at a time: four tiles of sums. The weights are zero up to a multiple of 32 positions.
static void values_few(struct block *b, const uint16_t *v, int64_t d) {
  uint32_t pairs[4][16][16] __attribute__((aligned(64)));
  float sums[4][16][16] __attribute__((aligned(64)));
  for (int64_t c = 0; c < d; c += 64) {
    const int64_t left = d - c;
    const __mmask32 a_mask = left >= 32 ? 0xffffffffu : (1u << left) - 1;
    const __mmask32 b_mask = left >= 64 ? 0xffffffffu : left > 32 ? (1u << (left - 32)) - 1 : 0;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t j = 0; j < b->n; j += 32) {
      for (int64_t i = 0; i < 16; i++) {
        const uint16_t *even = v + (j + 2 * i) * d + c, *odd = even + d;
        const int first = j + 2 * i < b->n, second = j + 2 * i + 1 < b->n;
        interleave(even, odd, first ? a_mask : 0, second ? a_mask : 0, pairs[0][i], pairs[1][i]);
        if (left > 32)
          interleave(even + 32, odd + 32, first ? b_mask : 0, second ? b_mask : 0, pairs[2][i],
                     pairs[3][i]);
      }
      _tile_loadd(4, &b->weight[0][j], SPLIT * 2);
      _tile_loadd(5, pairs[0], 64);
      _tile_dpbf16ps(0, 4, 5);
      _tile_loadd(5, pairs[1], 64);
      _tile_dpbf16ps(1, 4, 5);
      if (left <= 32) continue;
      _tile_loadd(5, pairs[2], 64);
      _tile_dpbf16ps(2, 4, 5);
      _tile_loadd(5, pairs[3], 64);
      _tile_dpbf16ps(3, 4, 5);
    }
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    store_values(b, c, sums[0], sums[1]);
    if (left <= 32) continue;
    _tile_stored(2, sums[2], 64);
    _tile_stored(3, sums[3], 64);
    store_values(b, c + 32, sums[2], sums[3]);
  }
}

// Whether a batch's rows can be worked on so.
INLINE int few_on_tiles(const struct attention_args *a) { return a->bf16 && tgis_amx(NULL); }
#else
#define few_on_tiles(a) ((void)(a), 0)
#endif
