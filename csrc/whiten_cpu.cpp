#include "parallel.h"
#include "simd.h"
#include "token_weights.h"
#include "whiten.h"

namespace aligner::ALIGNER_ISA {

constexpr int64_t GRAIN = 1 << 14;

// Sum over tokens of term(x, weight), whose weight is 0 or 1; the same parts in the same order every time.
template <class Term>
static double sum_tokens(const WhitenMomentsParams& p, const Term& term) {
  double sums[MAX_PARTS];
  const int parts = parallel_parts(p.count, GRAIN, [&](int64_t begin, int64_t end, int part) {
    vdouble sum{};
    for (int64_t i = begin; i < end; i += LANES) {
      const vfloat w = load_weights(p.mask, nullptr, i, end - i);
      sum += term(keep(w, load_some<Float32>(p.x + i, end - i, 0.f)), w);
    }
    sums[part] = hsum(sum);
  });
  double sum = 0;
  for (int i = 0; i < parts; ++i) sum += sums[i];
  return sum;
}

void whiten_moments_cpu(const WhitenMomentsParams& p) {
  const double count = sum_tokens(p, [](vfloat, vfloat w) { return widen_sum(w); });
  const double sum = sum_tokens(p, [](vfloat x, vfloat) { return widen_sum(x); });
  const double mean = count > 0 ? sum / count : 0.0;
  p.moments[0] = count;
  p.moments[1] = mean;
  p.moments[2] = sum_tokens(p, [mean](vfloat x, vfloat w) {
    const Doubles value = widen(x), weight = widen(w);
    const vdouble low = value.low - mean, high = value.high - mean;
    return low * low * weight.low + high * high * weight.high;
  });
}

void whiten_apply_cpu(const WhitenApplyParams& p) {
  const double count = p.moments[0], mean = p.moments[1];
  const double scale = count > 0 ? 1.0 / ::sqrt(p.moments[2] / count + 1e-8) : 0.0;
  parallel_parts(p.count, GRAIN, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; i += LANES) {
      const int64_t n = end - i;
      const vfloat w = load_weights(p.mask, nullptr, i, n);
      const Doubles x = widen(load_some<Float32>(p.x + i, n, 0.f));
      store_some<Float32>(p.y + i, keep(w, narrow({(x.low - mean) * scale, (x.high - mean) * scale})), n);
    }
  });
}

}  // namespace aligner::ALIGNER_ISA
