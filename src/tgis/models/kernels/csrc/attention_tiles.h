// Prefill chunks in bfloat16 on AMX tiles: 32 query rows over blocks of positions, online softmax.
//
// Everything is computed transposed, so that a row's maximum and sum are lanes of a vector: scores
// are keys x queries = K Q^T, read straight from the cache, and the output is V^T P^T, whose V^T is
// packed beforehand, once for all rows of a sequence.
#pragma once

#include "attention.h"
#include "tiles.h"

#define TILE_ROWS 32
#define POSITIONS 128  // of a block
#define FEW_TOKENS 16  // of a sequence, that are rounded as each of them would be alone

#ifdef HAVE_TILES

#define VT_BLOCK(d) (((d) + 15) / 16 * 512)  // elements of V^T for 32 positions

struct tile_block {
  int64_t rows;
  int32_t query[TILE_ROWS], lo[TILE_ROWS], hi[TILE_ROWS];  // per row: position, what it sees
  int32_t head[TILE_ROWS];
  float max[TILE_ROWS], sum[TILE_ROWS];
  uint32_t q[MAX_HEAD_DIM / 32][2][16][16] __attribute__((aligned(64)));  // pairs of elements
  float score[POSITIONS][TILE_ROWS] __attribute__((aligned(64)));
  uint32_t weight[POSITIONS / 32][2][16][16] __attribute__((aligned(64)));  // pairs of positions
  float out[MAX_HEAD_DIM][TILE_ROWS] __attribute__((aligned(64)));
  uint16_t keys[16 * MAX_HEAD_DIM];  // the last few, filled up
};

// Tiles 0, 1: sums. 2 with 3, 4: a product of 32 elements. 5 with 6, 7: of the last head_dim % 32.
static void configure_attention(int64_t head_dim) {
  struct tile_shapes shapes = {.palette = 1};
  const int64_t rest = head_dim % 32 ? head_dim % 32 : 32;
  for (int i = 0; i < 8; i++) {
    shapes.row_bytes[i] = i == 5 ? rest * 2 : 64;
    shapes.rows[i] = i > 5 ? rest / 2 : 16;
  }
  _tile_loadconfig(&shapes);
}

// V^T of 32 positions, of which n exist: [head_dim / 16][16][32].
static void pack_values(const uint16_t *v, int64_t n, int64_t d, uint16_t *out) {
  for (int64_t c = 0; c < d; c += 16) {
    const __mmask16 columns = (__mmask16)((1u << min64(16, d - c)) - 1);
    __m512i pairs[16];
    for (int64_t i = 0; i < 16; i++) {
      const __mmask16 even = 2 * i < n ? columns : 0, odd = 2 * i + 1 < n ? columns : 0;
      const __m256i x = _mm256_maskz_loadu_epi16(even, v + 2 * i * d + c);
      const __m256i y = _mm256_maskz_loadu_epi16(odd, v + (2 * i + 1) * d + c);
      pairs[i] = _mm512_or_si512(_mm512_cvtepu16_epi32(x),
                                 _mm512_slli_epi32(_mm512_cvtepu16_epi32(y), 16));
    }
    transpose16(pairs);
    for (int64_t i = 0; i < 16; i++) _mm512_storeu_si512(out + c * 32 + i * 32, pairs[i]);
  }
}

static void load_queries(const struct attention_args *a, struct tile_block *b, int64_t start,
                         int64_t first_row) {
  const int64_t d = a->head_dim, group = a->heads / a->kv_heads;
  for (int64_t c = 0; c < d; c += 32) {
    const __mmask32 columns = d - c >= 32 ? 0xffffffffu : (1u << (d - c)) - 1;
    for (int64_t g = 0; g < 2; g++) {
      __m512i rows[16];
      for (int64_t i = 0; i < 16; i++) {
        const int64_t r = 16 * g + i, token = start + (first_row + r) / group;
        const uint16_t *q = (const uint16_t *)a->q + (token * a->heads + b->head[r]) * d + c;
        rows[i] = _mm512_maskz_loadu_epi16(r < b->rows ? columns : 0, q);
      }
      transpose16(rows);
      for (int64_t i = 0; i < 16; i++) _mm512_storeu_si512(b->q[c / 32][g][i], rows[i]);
    }
  }
}

static void begin_rows(const struct attention_args *a, struct tile_block *b, int64_t seq,
                       int64_t kv_head, int64_t first_row) {
  const int64_t group = a->heads / a->kv_heads, start = a->q_start[seq];
  const int64_t q_len = a->q_start[seq + 1] - start, kv_len = a->kv_len[seq];
  b->rows = min64(TILE_ROWS, q_len * group - first_row);
  for (int64_t r = 0; r < TILE_ROWS; r++) {
    const int64_t row = first_row + min64(r, b->rows - 1);
    const int64_t query = kv_len - q_len + row / group;
    b->head[r] = kv_head * group + row % group;
    b->query[r] = query;
    b->hi[r] = a->causal ? query + 1 : kv_len;
    b->lo[r] = a->window ? max64(0, query + 1 - a->window) : 0;
    b->max[r] = -INFINITY;
    b->sum[r] = 0;
  }
  memset(b->out, 0, (a->head_dim + 15) / 16 * 16 * sizeof b->out[0]);
  load_queries(a, b, start, first_row);
}

// Scores of n positions, the last of them filled up to 16.
static void tile_scores(struct tile_block *b, const uint16_t *k, int64_t n, int64_t d) {
  for (int64_t j = 0; j < n; j += 16) {
    const uint16_t *keys = k + j * d;
    if (n - j < 16) {
      memcpy(b->keys, keys, (n - j) * d * 2);
      memset(b->keys + (n - j) * d, 0, (16 - n + j) * d * 2);
      keys = b->keys;
    }
    _tile_zero(0);
    _tile_zero(1);
    int64_t c = 0;
    for (; c + 32 <= d; c += 32) {
      _tile_loadd(2, keys + c, d * 2);
      _tile_loadd(3, b->q[c / 32][0], 64);
      _tile_loadd(4, b->q[c / 32][1], 64);
      _tile_dpbf16ps(0, 2, 3);
      _tile_dpbf16ps(1, 2, 4);
    }
    if (c < d) {
      _tile_loadd(5, keys + c, d * 2);
      _tile_loadd(6, b->q[c / 32][0], 64);
      _tile_loadd(7, b->q[c / 32][1], 64);
      _tile_dpbf16ps(0, 5, 6);
      _tile_dpbf16ps(1, 5, 7);
    }
    _tile_stored(0, &b->score[j][0], TILE_ROWS * 4);
    _tile_stored(1, &b->score[j][16], TILE_ROWS * 4);
  }
}

// Cap, ALiBi, bias and what is not seen, for 16 rows from `lane` on. Leaves scaled scores.
static void tile_masks(const struct attention_args *a, struct tile_block *b, int64_t begin,
                       int64_t n, int64_t lane) {
  vi query, lo, hi;
  memcpy(&query, b->query + lane, sizeof query);
  memcpy(&lo, b->lo + lane, sizeof lo);
  memcpy(&hi, b->hi + lane, sizeof hi);
  vf slope = {};
  vi bias_row = {};
  const int32_t middle = (int32_t)(a->bias_len / 2);
  for (int i = 0; i < 16; i++) {
    if (a->slopes) slope[i] = a->slopes[b->head[lane + i]];
    bias_row[i] = (int32_t)(b->head[lane + i] * a->bias_len) + middle;
  }
  for (int64_t j = 0; j < n; j++) {
    const vi position = (vi){} + (int32_t)(begin + j), distance = position - query;
    vf s = load(&b->score[j][lane], 0) * (float)a->scale;
    if (a->softcap > 0) s = vtanh(s * (float)(1 / a->softcap)) * (float)a->softcap;
    if (a->slopes) s += slope * __builtin_convertvector(distance, vf);
    if (a->bias) {
      const __m512i low = _mm512_max_epi32((__m512i)distance, _mm512_set1_epi32(-middle));
      const __m512i clamped = _mm512_min_epi32(low, _mm512_set1_epi32(middle));
      s += (vf)_mm512_i32gather_ps(_mm512_add_epi32(clamped, (__m512i)bias_row), a->bias, 4);
    }
    s = blend((position >= lo) & (position < hi), s, splat(-INFINITY));
    store(&b->score[j][lane], s, 0);
  }
}

// Scores become weights; maximum, sum and output so far are brought up to date.
static void tile_softmax(struct tile_block *b, int64_t n, int64_t lane, int64_t d, float scale) {
  vf peak = load(&b->score[0][lane], 0);
  for (int64_t j = 1; j < n; j++) peak = vmax(peak, load(&b->score[j][lane], 0));
  const vf before = load(b->max + lane, 0), max = vmax(before, peak * scale);
  const vf base = blend(max > -INFINITY, max, splat(0)), factor = vexp(before - base);
  const __m512i zip = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                       23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  vf total = {};
  for (int64_t j = 0; j < n; j += 2) {
    const vf x = load(&b->score[j][lane], 0), y = load(&b->score[j + 1][lane], 0);
    const vf even = blend(x > -INFINITY, vexp(x * scale - base), (vf){});
    const vf odd = blend(y > -INFINITY, vexp(y * scale - base), (vf){});
    total += even + odd;
    const __m512i pair = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
    _mm512_storeu_si512(b->weight[j / 32][lane / 16][j % 32 / 2],
                        _mm512_permutexvar_epi16(zip, pair));
  }
  store(b->max + lane, max, 0);
  store(b->sum + lane, load(b->sum + lane, 0) * factor + total, 0);
  if (_mm512_cmp_ps_mask((__m512)max, (__m512)before, _CMP_NEQ_UQ))
    for (int64_t c = 0; c < d; c++) store(&b->out[c][lane], load(&b->out[c][lane], 0) * factor, 0);
}

static void tile_values(struct tile_block *b, const uint16_t *vt, int64_t n, int64_t d) {
  for (int64_t c = 0; c < d; c += 16) {
    _tile_loadd(0, &b->out[c][0], TILE_ROWS * 4);
    _tile_loadd(1, &b->out[c][16], TILE_ROWS * 4);
    for (int64_t j = 0; j < n; j += 32) {
      _tile_loadd(2, vt + j / 32 * VT_BLOCK(d) + c * 32, 64);
      _tile_loadd(3, b->weight[j / 32][0], 64);
      _tile_loadd(4, b->weight[j / 32][1], 64);
      _tile_dpbf16ps(0, 2, 3);
      _tile_dpbf16ps(1, 2, 4);
    }
    _tile_stored(0, &b->out[c][0], TILE_ROWS * 4);
    _tile_stored(1, &b->out[c][16], TILE_ROWS * 4);
  }
}

static void end_rows(const struct attention_args *a, struct tile_block *b, int64_t seq,
                     int64_t first_row) {
  const int64_t d = a->head_dim, group = a->heads / a->kv_heads;
  for (int64_t lane = 0; lane < b->rows; lane += 16) {
    const vf total = load(b->sum + lane, 0);
    const vf scale = blend(total > 0, 1.0f / total, (vf){});
    for (int64_t c = 0; c < d; c += 16) {
      __m512i x[16];
      for (int64_t i = 0; i < 16; i++) x[i] = (__m512i)(load(&b->out[c + i][lane], 0) * scale);
      transpose16(x);
      for (int64_t i = 0; i < min64(16, b->rows - lane); i++) {
        const int64_t token = a->q_start[seq] + (first_row + lane + i) / group;
        uint16_t *to = (uint16_t *)a->out + (token * a->heads + b->head[lane + i]) * d;
        store_at(to, c, d, (vf)x[i], 1);
      }
    }
  }
}

static void attend_tiles(const struct attention_args *a, int64_t seq, int64_t kv_head,
                         int64_t first_row, const uint16_t *vt) {
  struct tile_block b;
  const int64_t d = a->head_dim;
  const uint16_t *k =
      (const uint16_t *)a->k + a->slot[seq] * a->slot_stride + kv_head * a->head_stride;
  begin_rows(a, &b, seq, kv_head, first_row);
  const int64_t last = b.rows - 1;  // rows are in order of their tokens: the last sees furthest
  const int extras = a->slopes || a->bias || a->softcap > 0;
  for (int64_t j = b.lo[0] / POSITIONS * POSITIONS; j < b.hi[last]; j += POSITIONS) {
    const int64_t n = min64(POSITIONS, b.hi[last] - j), full = (n + 31) / 32 * 32;
    const int masked = extras || b.lo[last] > j || b.hi[0] < j + full;
    tile_scores(&b, k + j * d, n, d);
    for (int64_t lane = 0; lane < b.rows; lane += 16) {
      if (masked) tile_masks(a, &b, j, full, lane);
      tile_softmax(&b, full, lane, d, masked ? 1.0f : (float)a->scale);
    }
    tile_values(&b, vt + j / 32 * VT_BLOCK(d), full, d);
  }
  end_rows(a, &b, seq, first_row);
}
#endif
