// Rows of floats as int8: x is about q * scale, scale = max |x| / 127 of its row.
#pragma once

#include "vec.h"

typedef int8_t vb __attribute__((vector_size(VL)));

// `step`: from 64 elements of q to the next 64.
INLINE float quantize_row(const void *x, int8_t *q, int64_t n, int64_t step, int bf16) {
  vf max = {};
  for (int64_t i = 0; i < n; i += VL) {
    const vf v = load_at(x, i, n, bf16);
    max = vmax(max, vmax(v, -v));
  }
  const float most = max_of(max), inverse = most > 0 ? 127.0f / most : 0.0f;
  for (int64_t i = 0; i < n; i += VL) {
    // 1.5 * 2^23: rounding to even leaves the integer in the low bits
    const vf shifted = load_at(x, i, n, bf16) * inverse + 12582912.0f;
    const vb b = __builtin_convertvector((vi)shifted << 24 >> 24, vb);
    memcpy(q + i / 64 * step + i % 64, &b, min64(VL, n - i));
  }
  return most / 127.0f;
}
