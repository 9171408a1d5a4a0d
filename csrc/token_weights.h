// Weights of LANES tokens, from a bool mask, from float weights, or 1 where neither is given. Included only by
// *_cpu.cpp.
#pragma once
#include "simd.h"

namespace aligner::ALIGNER_ISA {

ALIGNER_INLINE vfloat load_weights(const bool* mask, const float* weights, int64_t i, int64_t count) {
  if (weights) return load_some<Float32>(weights + i, count, 0.f);
  vfloat w{};
  if (!mask) {
    for (int64_t j = 0; j < LANES; ++j) w[j] = j < count ? 1.f : 0.f;
    return w;
  }
  if (count >= LANES) {
    vbyte b;
    memcpy(&b, mask + i, sizeof b);
    return __builtin_convertvector(b, vfloat);
  }
  for (int64_t j = 0; j < count; ++j) w[j] = mask[i + j] ? 1.f : 0.f;
  return w;
}

// What a left-out token holds must not reach a sum, not even multiplied by zero: it may be NaN.
ALIGNER_INLINE vfloat keep(vfloat weight, vfloat x) { return weight != splat(0.f) ? x : splat(0.f); }

}  // namespace aligner::ALIGNER_ISA
