#include "parallel.h"
#include "policy_loss.h"
#include "simd.h"
#include "token_weights.h"

namespace aligner::ALIGNER_ISA {

constexpr int64_t POLICY_STATS = 8;

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

// Estimate of KL(new || ref) from x = logprob - ref_logprob, and its slope in x.
ALIGNER_INLINE vfloat kl_term(KlEstimator kind, vfloat x, vfloat& slope) {
  if (kind == KlEstimator::k1) {
    slope = splat(1.f);
    return x;
  }
  if (kind == KlEstimator::k2) {
    slope = x;
    return 0.5f * x * x;
  }
  const vfloat e = vexp(-x), value = k3(-x, e);
  slope = x - value;  // 1 - e^-x
  return value;
}

constexpr int64_t FEW = 8 * LANES;  // tokens whose terms are summed in float before they go into doubles

// The local copy of p tells the compiler that no store changes it.
static void policy_loss_few(const PolicyLossParams p, int64_t begin, int64_t end, vfloat (&sum)[POLICY_STATS]) {
  const float scale = float(1.0 / p.num_tokens);
  const vfloat low = splat(1.f - p.clip_low), high = splat(1.f + p.clip_high), zero = splat(0.f);
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
    const vfloat c = p.importance ? keep(w, load_some<Float32>(p.importance + i, n, 0.f)) : keep(w, splat(1.f));
    vfloat d_term = c * (active ? zero : plain), kl = zero;
    if (p.ref_logprobs) {
      const vfloat logprobs = load_some<Float32>(p.logprobs + i, n, 0.f);
      vfloat slope;
      kl = kl_term(p.kl, keep(w, logprobs - load_some<Float32>(p.ref_logprobs + i, n, 0.f)), slope);
      d_term += p.kl_coef * slope;
    }
    store_some<Float32>(p.d_logprobs + i, w * scale * d_term, n);
    if (p.d_entropy) store_some<Float32>(p.d_entropy + i, w * (-p.entropy_coef * scale), n);
    const vfloat h = p.entropy ? keep(w, load_some<Float32>(p.entropy + i, n, 0.f)) : zero;
    sum[0] += w * c * l;
    sum[1] += active ? w : zero;
    sum[2] += w * k3(d, r);
    sum[3] += w * r;
    sum[4] += w * clamped;
    sum[5] += w * h;
    sum[6] += w * kl;
    sum[7] += w * c;
  }
}

static void policy_loss_part(const PolicyLossParams& p, int64_t begin, int64_t end, double* sums) {
  vdouble total[POLICY_STATS] = {};
  for (int64_t i = begin; i < end; i += FEW) {
    vfloat sum[POLICY_STATS] = {};
    policy_loss_few(p, i, smaller(end, i + FEW), sum);
    for (int64_t k = 0; k < POLICY_STATS; ++k) total[k] += widen_sum(sum[k]);
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
  p.loss[0] = float((sums[0] - double(p.entropy_coef) * sums[5] + double(p.kl_coef) * sums[6]) / p.num_tokens);
}

}  // namespace aligner::ALIGNER_ISA
