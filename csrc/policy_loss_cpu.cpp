#include "parallel.h"
#include "policy_loss.h"
#include "simd.h"
#include "token_weights.h"

namespace aligner::ALIGNER_ISA {

constexpr int64_t POLICY_STATS = 6;

// e^d - 1 - d without the cancellation near 0 that e^d alone would bring.
ALIGNER_INLINE vfloat k3(vfloat d, vfloat ratio) {
  vfloat series = splat(1.f / 5040);
  series = series * d + 1.f / 720;
  series = series * d + 1.f / 120;
  series = series * d + 1.f / 24;
  series = series * d + 1.f / 6;
  series = series * d + 0.5f;
  const vfloat size = vmax(d, -d);
  return size < splat(0.25f) ? series * d * d : ratio - 1.f - d;
}

static void policy_loss_part(const PolicyLossParams& p, int64_t begin, int64_t end, double* sums) {
  const float scale = float(1.0 / p.num_tokens);
  const vfloat low = splat(1.f - p.clip_low), high = splat(1.f + p.clip_high), zero = splat(0.f);
  vdouble total[POLICY_STATS] = {};
  for (int64_t i = begin; i < end; i += LANES) {
    const int64_t n = end - i;
    const vfloat w = load_weights(p.mask, p.weights, i, n);
    const vfloat d =
        keep(w, load_some<Float32>(p.logprobs + i, n, 0.f) - load_some<Float32>(p.old_logprobs + i, n, 0.f));
    const vfloat a = keep(w, load_some<Float32>(p.advantages + i, n, 0.f));
    const vfloat r = vexp(d);
    const vfloat clamped = vmin(high, vmax(low, r));
    const vfloat plain = -a * r, clip = -a * clamped, dual = -a * p.dual_clip;
    vint active = clip > plain;
    vfloat l = active ? clip : plain;
    const vint beyond = (a < zero) & (dual < l);
    l = beyond ? dual : l;
    active |= beyond;
    store_some<Float32>(p.d_logprobs + i, w * scale * (active ? zero : plain), n);
    const vfloat h = p.entropy ? keep(w, load_some<Float32>(p.entropy + i, n, 0.f)) : zero;
    total[0] += widen_sum(w * l);
    total[1] += widen_sum(active ? w : zero);
    total[2] += widen_sum(w * k3(d, r));
    total[3] += widen_sum(w * r);
    total[4] += widen_sum(w * clamped);
    total[5] += widen_sum(w * h);
  }
  for (int64_t k = 0; k < POLICY_STATS; ++k) sums[k] = hsum(total[k]);
}

void policy_loss_cpu(const PolicyLossParams& p) {
  double parts[MAX_PARTS][POLICY_STATS];
  const int used = parallel_parts(
      p.count, 1 << 12, [&](int64_t begin, int64_t end, int part) { policy_loss_part(p, begin, end, parts[part]); });
  double sums[POLICY_STATS] = {};
  for (int i = 0; i < used; ++i) {
    for (int64_t k = 0; k < POLICY_STATS; ++k) sums[k] += parts[i][k];
  }
  for (int64_t k = 0; k < POLICY_STATS; ++k) p.stats[k] = float(sums[k] / p.num_tokens);
  p.loss[0] = float((sums[0] - double(p.entropy_coef) * sums[5]) / p.num_tokens);
}

}  // namespace aligner::ALIGNER_ISA
