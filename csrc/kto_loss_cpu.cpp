#include "kto_loss.h"
#include "log_sigmoid.h"
#include "parallel.h"
#include "token_weights.h"

namespace aligner::ALIGNER_ISA {

constexpr int64_t KTO_STATS = 4;

static void kto_part(const KtoLossParams& p, int64_t begin, int64_t end, double* sums) {
  const float scale = float(1.0 / p.num_responses), kl = p.kl[0];
  const vfloat zero = splat(0.f);
  vdouble total[KTO_STATS] = {};
  for (int64_t i = begin; i < end; i += LANES) {
    const int64_t n = end - i;
    const vfloat w = load_weights(nullptr, nullptr, i, n), desirable = load_weights(p.desirable, nullptr, i, n);
    const vint good = desirable != zero;
    const vfloat h = load_some<Float32>(p.policy + i, n, 0.f) - load_some<Float32>(p.ref + i, n, 0.f);
    const vfloat weight = good ? splat(p.desirable_weight) : splat(p.undesirable_weight);
    const vfloat x = p.beta * (good ? h - kl : kl - h);
    const LogSigmoid s = log_sigmoid(x);
    const vfloat slope = weight * p.beta * (s.sigma_plus * s.sigma_minus);
    store_some<Float32>(p.d_policy + i, scale * (good ? -slope : slope), n);
    const vfloat reward = keep(w, p.beta * h);
    total[0] += widen_sum(keep(w, weight * s.sigma_minus));
    total[1] += widen_sum(desirable);
    total[2] += widen_sum(good ? reward : zero);
    total[3] += widen_sum(good ? zero : reward);
  }
  for (int64_t k = 0; k < KTO_STATS; ++k) sums[k] = hsum(total[k]);
}

void kto_loss_cpu(const KtoLossParams& p) {
  double parts[MAX_PARTS][KTO_STATS];
  const int used = parallel_parts(p.count, 1 << 12,
                                  [&](int64_t begin, int64_t end, int part) { kto_part(p, begin, end, parts[part]); });
  double sums[KTO_STATS] = {};
  for (int i = 0; i < used; ++i) {
    for (int64_t k = 0; k < KTO_STATS; ++k) sums[k] += parts[i][k];
  }
  for (int64_t k = 0; k < KTO_STATS; ++k) p.stats[k] = float(sums[k] / p.num_responses);
  p.loss[0] = p.stats[0];
}

}  // namespace aligner::ALIGNER_ISA
