// Weights of LANES tokens, from a bool mask, from float weights, or 1 where neither is given. Included only by
// *_cpu.cpp.
#pragma once
#include "simd.h"

namespace aligner::ALIGNER_ISA {

ALIGNER_INLINE vfloat load_weights(const bool* mask, const float* weights, int64_t i, int64_t count) {
  if (weights) return load_some<Float32>(weights + i, count, 0.f);
  if (!mask && count >= LANES) return splat(1.f);
  vfloat w{};
  if (count >= LANES) {
#if defined(__AVX512F__)  // GCC 12 converts bytes one by one
    return (vfloat)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(mask + i))));
#elif defined(__AVX2__)
    return (vfloat)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(mask + i))));
#else
    vbyte b;
    memcpy(&b, mask + i, sizeof b);
    return __builtin_convertvector(b, vfloat);
#endif
  }
  for (int64_t j = 0; j < count; ++j) w[j] = !mask || mask[i + j] ? 1.f : 0.f;
  return w;
}

// What a left-out token holds must not reach a sum, not even multiplied by zero: it may be NaN.
ALIGNER_INLINE vfloat keep(vfloat weight, vfloat x) { return weight != splat(0.f) ? x : splat(0.f); }

}  // namespace aligner::ALIGNER_ISA
