#include "engine/layers.h"
#include "engine/norm_row.h"
#include "parallel.h"
#include "simd.h"

namespace aligner::ALIGNER_ISA {

constexpr int64_t PARALLEL_ELEMENTS = 1 << 14;  // worth a second thread

ALIGNER_INLINE int64_t row_grain(int64_t width) { return 1 + PARALLEL_ELEMENTS / larger(1, width); }

void embed_cpu(const EmbedParams& p) {
  with_dtype(p.dtype, [&](auto d) {
    using D = decltype(d);
    for (int64_t i = 0; i < p.rows; ++i) {
      const auto* row = static_cast<const typename D::T*>(p.table) + p.tokens[i] * p.width;
      float* y = p.y + i * p.width;
      for (int64_t k = 0; k < p.width; k += LANES) {
        store_some<Float32>(y + k, load_some<D>(row + k, p.width - k, 0.f), p.width - k);
      }
    }
  });
}

void rms_norm_cpu(const RmsNormParams& p) {
  with_dtype(p.dtype, [&](auto d) {
    using D = decltype(d);
    const auto* weight = static_cast<const typename D::T*>(p.weight);
    parallel_parts(p.rows, row_grain(p.width), [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        norm_row<D>(p.x + i * p.width, weight, p.y + i * p.width, p.width, p.epsilon);
      }
    });
  });
}

void swiglu_cpu(const SwigluParams& p) {
  parallel_parts(p.rows, row_grain(4 * p.width), [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const float *gate = p.gate_up + 2 * i * p.width, *up = gate + p.width;
      for (int64_t k = 0; k < p.width; k += LANES) {
        const int64_t n = p.width - k;
        const vfloat g = load_some<Float32>(gate + k, n, 0.f);
        const vfloat v = g / (1.f + vexp(-g)) * load_some<Float32>(up + k, n, 0.f);
        store_some<Float32>(p.y + i * p.width + k, v, n);
      }
    }
  });
}

}  // namespace aligner::ALIGNER_ISA
