// Logarithm and logistic function of LANES floats. Included only by *_cpu.cpp.
#pragma once
#include "simd.h"

namespace aligner::ALIGNER_ISA {

// log((1 + s) / (1 - s)) = 2 atanh(s) for |s| <= 1/3, relative error about 1e-9 before rounding.
ALIGNER_INLINE vfloat twice_atanh(vfloat s) {
  const vfloat q = s * s;
  vfloat series = splat(1.f / 15);
  series = series * q + 1.f / 13;
  series = series * q + 1.f / 11;
  series = series * q + 1.f / 9;
  series = series * q + 1.f / 7;
  series = series * q + 1.f / 5;
  series = series * q + 1.f / 3;
  return 2.f * s + 2.f * s * (q * series);
}

// log(1 + y) for 0 <= y <= 1.
ALIGNER_INLINE vfloat log1p_small(vfloat y) { return twice_atanh(y / (2.f + y)); }

// log x for normal x > 0: x = 2^n m with m in [0.7, 1.4).
ALIGNER_INLINE vfloat vlog(vfloat x) {
  const vint n = ((vint)x - 0x3f3504f3) >> 23;
  const vfloat m = (vfloat)((vint)x - (n << 23)), e = __builtin_convertvector(n, vfloat);
  return e * 0.693359375f + (twice_atanh((m - 1.f) / (m + 1.f)) - e * 2.12194440e-4f);
}

struct LogSigmoid {
  vfloat plus, minus;              // log s(x), log s(-x)
  vfloat sigma_plus, sigma_minus;  // s(x), s(-x)
};

ALIGNER_INLINE LogSigmoid log_sigmoid(vfloat x) {
  const vfloat size = vmax(x, -x), zero = splat(0.f);
  const vfloat e = vexp(-size), tail = log1p_small(e);
  const vfloat large = 1.f / (1.f + e), small = e * large;
  const vint positive = x > zero;
  return {vmin(x, zero) - tail, vmin(-x, zero) - tail, positive ? large : small, positive ? small : large};
}

}  // namespace aligner::ALIGNER_ISA
