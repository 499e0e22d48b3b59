// One split of one block of query rows: scores, softmax, weighted values. In vector registers.
#pragma once

#include "attention.h"
#include "attention_few.h"

#define VECTOR_ROWS 8  // query rows of a block without tiles

#if defined(__AVX512BF16__)
// 16 vectors -> the vector of their sums.
INLINE __m512 reduce16(__m512 *x) {
  __m512 a[8], b[4], c[2];
  for (int i = 0; i < 8; i++)  // lanes: x[2i], x[2i+1] in turn
    a[i] = _mm512_add_ps(_mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]),
                         _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]));
  for (int i = 0; i < 4; i++)
    b[i] = _mm512_add_ps(
        (__m512)_mm512_unpacklo_pd((__m512d)a[2 * i], (__m512d)a[2 * i + 1]),
        (__m512)_mm512_unpackhi_pd((__m512d)a[2 * i], (__m512d)a[2 * i + 1]));
  for (int i = 0; i < 2; i++)  // each 128-bit lane of b[i] sums its four vectors over that lane
    c[i] = _mm512_add_ps(_mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x88),
                         _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xdd));
  return _mm512_add_ps(_mm512_shuffle_f32x4(c[0], c[1], 0x88),
                       _mm512_shuffle_f32x4(c[0], c[1], 0xdd));
}

INLINE __m512bh load_bh(const void *p, int64_t n) {
  const __mmask32 mask = n >= 32 ? 0xffffffffu : (1u << n) - 1;
  return (__m512bh)_mm512_maskz_loadu_epi16(mask, p);
}

INLINE void scores_bf16(const uint16_t *q, const uint16_t *k, int64_t d, int64_t n, float *out) {
  const uint16_t *key = k;
  for (int64_t j = 0; j < n; j += 16, key += 16 * d) {
    const int64_t m = min64(16, n - j);
    __m512 acc[16];
    for (int i = 0; i < 16; i++) acc[i] = _mm512_setzero_ps();
    for (int64_t c = 0; c < d; c += 32) {
      const __m512bh x = load_bh(q + c, d - c);
      if (m == 16 && d - c >= 32) {
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++)
          acc[i] = _mm512_dpbf16_ps(acc[i], x, (__m512bh)_mm512_loadu_si512(key + i * d + c));
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++)
          if (i < m) acc[i] = _mm512_dpbf16_ps(acc[i], x, load_bh(key + i * d + c, d - c));
      }
    }
    _mm512_mask_storeu_ps(out + j, (__mmask16)((1u << m) - 1), reduce16(acc));
  }
}

// out[r][0 .. 32*cols] = sum over j of weight[r][j] * v[j]: two positions a multiplication, their
// values interleaved, their weights as a pair. `left`: columns of v from here on.
INLINE void values_bf16(const struct block *b, int rows, int cols, const uint16_t *v, int64_t d,
                        int64_t left, float *out) {
  __m512 lo[2 * VECTOR_ROWS], hi[2 * VECTOR_ROWS];
#pragma GCC unroll 16
  for (int i = 0; i < rows * cols; i++) lo[i] = hi[i] = _mm512_setzero_ps();
  for (int64_t j = 0; j < b->n; j += 2) {
    const uint16_t *even = v + j * d, *odd = j + 1 < b->n ? even + d : even;  // its weight is zero
#pragma GCC unroll 2
    for (int c = 0; c < cols; c++) {
      const __m512i x = (__m512i)load_bh(even + 32 * c, left - 32 * c);
      const __m512i y = (__m512i)load_bh(odd + 32 * c, left - 32 * c);
      const __m512bh first = (__m512bh)_mm512_unpacklo_epi16(x, y);
      const __m512bh second = (__m512bh)_mm512_unpackhi_epi16(x, y);
#pragma GCC unroll 8
      for (int r = 0; r < rows; r++) {
        int pair;
        memcpy(&pair, &b->weight[r][j], 4);
        const __m512bh p = (__m512bh)_mm512_set1_epi32(pair);
        lo[r * cols + c] = _mm512_dpbf16_ps(lo[r * cols + c], p, first);
        hi[r * cols + c] = _mm512_dpbf16_ps(hi[r * cols + c], p, second);
      }
    }
  }
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second =
      _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
    for (int c = 0; c < cols; c++) {
      float *to = out + r * MAX_HEAD_DIM + 32 * c;
      const int i = r * cols + c;
      _mm512_storeu_ps(to, _mm512_permutex2var_ps(lo[i], first, hi[i]));
      _mm512_storeu_ps(to + 16, _mm512_permutex2var_ps(lo[i], second, hi[i]));
    }
}

INLINE void values_bf16_rows(struct block *b, int rows, const uint16_t *v, int64_t d) {
  int64_t c = 0;
  if (rows <= 6)
    for (; c + 32 < d; c += 64) values_bf16(b, rows, 2, v + c, d, d - c, b->out[0] + c);
  for (; c < d; c += 32) values_bf16(b, rows, 1, v + c, d, d - c, b->out[0] + c);
}
#endif

INLINE void scores_any(const void *q, const void *k, int64_t d, int64_t n, float *out, int bf16) {
  for (int64_t j = 0; j < n; j++) {
    vf acc = {};
    for (int64_t c = 0; c < d; c += VL)
      acc += load_at(q, c, d, bf16) * load_at(at(k, j * d, bf16), c, d, bf16);
    out[j] = sum(acc);
  }
}

INLINE void values_any(struct block *b, const void *v, int64_t d, int bf16) {
  for (int64_t r = 0; r < b->rows; r++)
    for (int64_t c = 0; c < d; c += VL) {
      vf acc = {};
      for (int64_t j = 0; j < b->n; j++)
        acc += b->score[r][j] * load_at(at(v, j * d, bf16), c, d, bf16);
      store_at(b->out[r], c, MAX_HEAD_DIM, acc, 0);
    }
}

static void scores(struct block *b, const void *k, int64_t d, int bf16) {
  for (int64_t r = 0; r < b->rows; r++) {
    float *out = b->score[r];
#if defined(__AVX512BF16__)
    if (bf16 && d == 64)
      scores_bf16(b->q[r], k, 64, b->n, out);
    else if (bf16)
      scores_bf16(b->q[r], k, d, b->n, out);
#else
    if (bf16) scores_any(b->q[r], k, d, b->n, out, 1);
#endif
    else
      scores_any(b->q[r], k, d, b->n, out, 0);
  }
}

static void values(struct block *b, const void *v, int64_t d, int bf16) {
  if (!bf16) return values_any(b, v, d, 0);
#if defined(__AVX512BF16__)
  switch (b->rows) {
    case 1: return values_bf16_rows(b, 1, v, d);
    case 2: return values_bf16_rows(b, 2, v, d);
    case 3: return values_bf16_rows(b, 3, v, d);
    case 4: return values_bf16_rows(b, 4, v, d);
    case 5: return values_bf16_rows(b, 5, v, d);
    case 6: return values_bf16_rows(b, 6, v, d);
    case 7: return values_bf16_rows(b, 7, v, d);
    default: return values_bf16_rows(b, 8, v, d);
  }
#else
  values_any(b, v, d, 1);
#endif
}

// Scale, cap, ALiBi and bias of one row's scores; what it does not see becomes -infinity.
static void finish_scores(const struct attention_args *a, struct block *b, int64_t r) {
  float *score = b->score[r];
  const int64_t end = (b->n + VL - 1) / VL * VL;
  for (int64_t j = 0; j < end; j += VL) {
    vf s = load(score + j, 0) * (float)a->scale;
    if (a->softcap > 0) s = vtanh(s * (float)(1 / a->softcap)) * (float)a->softcap;
    store(score + j, s, 0);
  }
  if (a->slopes) {
    const float slope = a->slopes[b->head[r]];
    for (int64_t j = 0; j < b->n; j++) score[j] += slope * (float)(b->begin + j - b->query[r]);
  }
  if (a->bias) {
    const int64_t middle = a->bias_len / 2;
    const float *bias = a->bias + b->head[r] * a->bias_len + middle;
    for (int64_t j = 0; j < b->n; j++)
      score[j] += bias[max64(-middle, min64(middle, b->begin + j - b->query[r]))];
  }
  for (int64_t j = 0; j < b->lo[r]; j++) score[j] = -INFINITY;
  for (int64_t j = b->hi[r]; j < end; j++) score[j] = -INFINITY;
}

static void softmax_row(struct block *b, int64_t r) {
  float *score = b->score[r];
  vf max = splat(-INFINITY), total = {};
  for (int64_t j = 0; j < b->n; j += VL) max = vmax(max, load(score + j, 0));
  const float m = max_of(max);
  for (int64_t j = 0; j < b->n; j += VL) {
    const vf s = load(score + j, 0);
    const vf e = (vf)((vi)vexp(s - m) & (vi)(s > -INFINITY));
    total += e;
    store(score + j, e, 0);
    store(b->weight[r] + j, e, 1);
  }
  b->max[r] = m;
  b->sum[r] = sum(total);
  for (int64_t j = (b->n + VL - 1) / VL * VL; j % 32; j += VL) store(b->weight[r] + j, (vf){}, 1);
}

static void softmax(const struct attention_args *a, struct block *b) {
  for (int64_t r = 0; r < b->rows; r++) {
    finish_scores(a, b, r);
    softmax_row(b, r);
  }
}

INLINE int64_t block_rows(const struct attention_args *a) {
  return few_on_tiles(a) ? MAX_ROWS : VECTOR_ROWS;
}

// The rows of a block and the positions they see; 0 where none of them sees any of the split.
static int begin_block(const struct attention_args *a, struct block *b, int64_t seq,
                       int64_t kv_head, int64_t first_row, int64_t split) {
  const int64_t group = a->heads / a->kv_heads, start = a->q_start[seq];
  const int64_t q_len = a->q_start[seq + 1] - start, kv_len = a->kv_len[seq];
  const int64_t from = split * SPLIT, to = min64(from + SPLIT, kv_len);
  int64_t begin = to, end = from;
  b->rows = min64(block_rows(a), q_len * group - first_row);
  for (int64_t r = 0; r < b->rows; r++) {
    const int64_t token = (first_row + r) / group;
    b->head[r] = kv_head * group + (first_row + r) % group;
    b->query[r] = kv_len - q_len + token;
    b->q[r] = at(a->q, ((start + token) * a->heads + b->head[r]) * a->head_dim, a->bf16);
    b->hi[r] = a->causal ? min64(to, b->query[r] + 1) : to;
    b->lo[r] = a->window ? max64(from, b->query[r] + 1 - a->window) : from;
    if (b->lo[r] >= b->hi[r]) continue;
    begin = min64(begin, b->lo[r] / 32 * 32);  // sums are in runs of 32: the same for all rows
    end = max64(end, b->hi[r]);
  }
  for (int64_t r = 0; r < b->rows; r++) {
    b->lo[r] = min64(max64(b->lo[r], begin), end) - begin;
    b->hi[r] = max64(min64(b->hi[r], end), begin) - begin;
  }
  b->begin = begin;
  b->n = max64(end - begin, 0);
  return b->n > 0;
}

// To the output, or where the sequence has several splits to `partial`.
static void end_block(const struct attention_args *a, const struct block *b, int64_t seq,
                      int64_t first_row, int64_t split, int64_t splits, float *partial) {
  const int64_t d = a->head_dim, group = a->heads / a->kv_heads;
  for (int64_t r = 0; r < b->rows; r++) {
    const int64_t row = (first_row + r) / group * a->heads + b->head[r];
    if (partial) {
      float *to = partial + (row * splits + split) * PARTIAL(d);
      to[0] = b->n ? b->max[r] : -INFINITY;
      to[1] = b->n ? b->sum[r] : 0;
      if (to[1] > 0) memcpy(to + 2, b->out[r], d * 4);
    } else {
      const float scale = b->n && b->sum[r] > 0 ? 1.0f / b->sum[r] : 0.0f;
      void *to = (char *)at(a->out, (a->q_start[seq] * a->heads + row) * d, a->bf16);
      for (int64_t j = 0; j < d; j += VL)
        store_at(to, j, d, b->n ? load_at(b->out[r], j, d, 0) * scale : (vf){}, a->bf16);
    }
  }
}

static void attend(const struct attention_args *a, int64_t seq, int64_t kv_head, int64_t first_row,
                   int64_t split, int64_t splits, float *partial) {
  struct block b;
  if (begin_block(a, &b, seq, kv_head, first_row, split)) {
    const int64_t to = a->slot[seq] * a->slot_stride + kv_head * a->head_stride +
                       b.begin * a->head_dim;
    const void *k = at(a->k, to, a->bf16), *v = at(a->v, to, a->bf16);
#ifdef HAVE_TILES
    if (few_on_tiles(a)) {
      configure_few(b.rows);
      scores_few(&b, k, v, a->head_dim);
      softmax(a, &b);
      values_few(&b, v, a->head_dim);
      return end_block(a, &b, seq, first_row, split, splits, partial);
    }
#endif
    scores(&b, k, a->head_dim, a->bf16);
    softmax(a, &b);
    values(&b, v, a->head_dim, a->bf16);
  }
  end_block(a, &b, seq, first_row, split, splits, partial);
}
