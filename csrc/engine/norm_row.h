// One row of RMSNorm, in place if y is x. Included only by *_cpu.cpp.
#pragma once
#include "simd.h"

namespace aligner::ALIGNER_ISA {

template <class D>
static void norm_row(const float* x, const typename D::T* weight, float* y, int64_t width, float epsilon) {
  vfloat squares{};
  for (int64_t k = 0; k < width; k += LANES) {
    const vfloat v = load_some<Float32>(x + k, width - k, 0.f);
    squares += v * v;
  }
  const vfloat scale = splat(1.f / sqrtf(float(hsum(squares) / double(width)) + epsilon));
  for (int64_t k = 0; k < width; k += LANES) {
    const vfloat v = load_some<Float32>(x + k, width - k, 0.f) * scale;
    store_some<Float32>(y + k, v * load_some<D>(weight + k, width - k, 0.f), width - k);
  }
}

}  // namespace aligner::ALIGNER_ISA
