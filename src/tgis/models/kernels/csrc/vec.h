// Short vectors of float32, loaded from and stored to float32 or bfloat16 memory.
//
// Plain GCC/Clang vector extensions, so that the same source runs with AVX-512, AVX2, NEON or
// nothing. Kernels take the element type as a constant argument (`bf16`) of an always-inlined body:
// one body, two specialised functions.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define VL 16
#elif defined(__AVX__)
#define VL 8
#else
#define VL 4
#endif

#define MAX_HEAD_DIM 256

enum error { ERROR_MEMORY = -1, ERROR_INDEX = -2, ERROR_UNSUPPORTED = -3 };

#define INLINE static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))

typedef float vf __attribute__((vector_size(4 * VL)));
typedef int32_t vi __attribute__((vector_size(4 * VL)));
typedef uint32_t vu __attribute__((vector_size(4 * VL)));
typedef uint16_t vh __attribute__((vector_size(2 * VL)));

INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

INLINE vf splat(float x) { return x - (vf){}; }

INLINE float bf16_to_float(uint16_t h) {
  uint32_t u = (uint32_t)h << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

INLINE vf from_bf16(vh h) { return (vf)(__builtin_convertvector(h, vu) << 16); }

// Round to nearest even; a NaN stays one.
INLINE vh to_bf16(vf x) {
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
  return (vh)_mm512_cvtneps_pbh((__m512)x);
#else
  vu u = (vu)x;
  vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  vu nan = (vu)(x != x);
  return __builtin_convertvector((nan & 0x7fc0) | (~nan & rounded), vh);
#endif
}

INLINE const char *at(const void *base, int64_t i, int bf16) {
  return (const char *)base + i * (bf16 ? 2 : 4);
}

INLINE vf load(const void *p, int bf16) {
  if (bf16) {
    vh h;
    memcpy(&h, p, sizeof h);
    return from_bf16(h);
  }
  vf x;
  memcpy(&x, p, sizeof x);
  return x;
}

INLINE void store(void *p, vf x, int bf16) {
  if (bf16) {
    vh h = to_bf16(x);
    memcpy(p, &h, sizeof h);
  } else {
    memcpy(p, &x, sizeof x);
  }
}

// The first n (< VL) elements; the others are zero, and their memory is not touched.
INLINE vf load_part(const void *p, int64_t n, int bf16) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  __mmask16 mask = (__mmask16)((1u << n) - 1);
  if (bf16) return from_bf16((vh)_mm256_maskz_loadu_epi16(mask, p));
  return (vf)_mm512_maskz_loadu_ps(mask, p);
#else
  if (bf16) {
    vh h = {};
    memcpy(&h, p, n * 2);
    return from_bf16(h);
  }
  vf x = {};
  memcpy(&x, p, n * 4);
  return x;
#endif
}

INLINE void store_part(void *p, vf x, int64_t n, int bf16) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  __mmask16 mask = (__mmask16)((1u << n) - 1);
  if (bf16)
    _mm256_mask_storeu_epi16(p, mask, (__m256i)to_bf16(x));
  else
    _mm512_mask_storeu_ps(p, mask, (__m512)x);
#else
  if (bf16) {
    vh h = to_bf16(x);
    memcpy(p, &h, n * 2);
  } else {
    memcpy(p, &x, n * 4);
  }
#endif
}

// Elements i .. i+VL of a row of n.
INLINE vf load_at(const void *row, int64_t i, int64_t n, int bf16) {
  const char *p = at(row, i, bf16);
  return n - i >= VL ? load(p, bf16) : load_part(p, n - i, bf16);
}

INLINE void store_at(void *row, int64_t i, int64_t n, vf x, int bf16) {
  char *p = (char *)at(row, i, bf16);
  if (n - i >= VL)
    store(p, x, bf16);
  else
    store_part(p, x, n - i, bf16);
}

INLINE vf blend(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }

INLINE vf vmax(vf a, vf b) {
#if VL == 16
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return blend(a > b, a, b);
#endif
}

INLINE vf vmin(vf a, vf b) {
#if VL == 16
  return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#else
  return blend(a < b, a, b);
#endif
}

INLINE float sum(vf x) {
#if VL == 16
  return _mm512_reduce_add_ps((__m512)x);
#else
  float s = 0;
  for (int i = 0; i < VL; i++) s += x[i];
  return s;
#endif
}

INLINE float max_of(vf x) {
#if VL == 16
  return _mm512_reduce_max_ps((__m512)x);
#else
  float m = x[0];
  for (int i = 1; i < VL; i++) m = x[i] > m ? x[i] : m;
  return m;
#endif
}

// exp with a relative error below 2e-7; arguments are clamped to [-87.3, 88.7].
INLINE vf vexp(vf x) {
  x = vmin(vmax(x, splat(-87.3f)), splat(88.7f));
  vf shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer part lands in the low bits
  vf n = shifted - 12582912.0f;
  vf r = x - n * 0.693359375f - n * -2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return (vf)((vi)p + ((vi)shifted << 23));
}

INLINE vf vtanh(vf x) { return 1.0f - 2.0f / (vexp(2.0f * x) + 1.0f); }

// erf (Abramowitz and Stegun 7.1.26), absolute error below 2e-7.
INLINE vf verf(vf x) {
  vi sign = (vi)x & (vi)splat(-0.0f);
  vf a = (vf)((vi)x ^ sign);
  vf t = 1.0f / (1.0f + 0.3275911f * a);
  vf p = splat(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  vf y = 1.0f - p * t * vexp(-a * a);
  return (vf)((vi)y ^ sign);
}
