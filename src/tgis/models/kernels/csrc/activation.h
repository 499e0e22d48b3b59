// The activation functions of MLPs.
#pragma once

#include "vec.h"

enum activation { SILU, GELU, GELU_TANH, RELU };

INLINE vf activate(vf x, int kind) {
  switch (kind) {
    case SILU:
      return x / (1.0f + vexp(-x));
    case GELU:
      return 0.5f * x * (1.0f + verf(x * 0.70710678f));
    case GELU_TANH:
      return 0.5f * x * (1.0f + vtanh(0.79788456f * (x + 0.044715f * x * x * x)));
    default:
      return vmax(x, splat(0));
  }
}
