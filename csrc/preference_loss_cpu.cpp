#include "log_sigmoid.h"
#include "parallel.h"
#include "preference_loss.h"
#include "simd.h"
#include "token_weights.h"

namespace aligner::ALIGNER_ISA {

constexpr int64_t PREFERENCE_STATS = 6;

struct Pairs {
  vfloat chosen, rejected, ref_chosen, ref_rejected, reward_gap;  // reward_gap: scaled
};
struct Term {
  vfloat loss, d_chosen, d_rejected;
};

// log(p / (1 - p)) of p = e^logp, and its slope 1 / (1 - p); logp < 0.
struct LogOdds {
  vfloat value, slope;
};
ALIGNER_INLINE LogOdds log_odds(vfloat logp) {
  vfloat series = splat(1.f / 11);  // e^x - 1 = x (1 + x/2 (1 + x/3 (...))) where 1 - p alone would cancel
  for (int k = 10; k >= 2; --k) series = 1.f / float(k) * (1.f + logp * series);
  const vfloat near = -(logp + logp * logp * series), far = 1.f - vexp(logp);
  const vfloat rest = logp > splat(-LN2) ? near : far;
  return {logp - vlog(rest), 1.f / rest};
}

template <PreferenceKind kind>
ALIGNER_INLINE Term term(const PreferenceLossParams& p, const Pairs& v) {
  const vfloat delta = (v.chosen - v.ref_chosen) - (v.rejected - v.ref_rejected), x = p.beta * delta;
  const float e = p.label_smoothing;
  if constexpr (kind == PreferenceKind::ipo) {
    const vfloat error = delta - 0.5f / p.beta;
    return {error * error, 2.f * error, -2.f * error};
  } else if constexpr (kind == PreferenceKind::rpo_sq) {
    const vfloat error = x - v.reward_gap, slope = 2.f * p.beta * error;
    return {error * error, slope, -slope};
  } else if constexpr (kind == PreferenceKind::orpo) {
    const LogOdds chosen = log_odds(v.chosen), rejected = log_odds(v.rejected);
    const LogSigmoid s = log_sigmoid(chosen.value - rejected.value);
    const vfloat slope = -p.beta * s.sigma_minus;
    return {-p.beta * s.plus, slope * chosen.slope, -slope * rejected.slope};
  } else if constexpr (kind == PreferenceKind::simpo) {
    const LogSigmoid s = log_sigmoid(p.beta * (v.chosen - v.rejected) - p.margin);
    const vfloat slope = -p.beta * s.sigma_minus;
    return {-s.plus, slope, -slope};
  } else {
    const LogSigmoid s = log_sigmoid(x);
    vfloat loss, slope;  // in x
    if constexpr (kind == PreferenceKind::dpo) {
      loss = -s.plus;
      slope = -s.sigma_minus;
    } else if constexpr (kind == PreferenceKind::cdpo) {
      loss = -(1.f - e) * s.plus - e * s.minus;
      slope = e * s.sigma_plus - (1.f - e) * s.sigma_minus;
    } else if constexpr (kind == PreferenceKind::rdpo) {
      const float scale = 1.f / (1.f - 2.f * e);
      loss = scale * (e * s.minus - (1.f - e) * s.plus);
      slope = -scale * ((1.f - e) * s.sigma_minus + e * s.sigma_plus);
    } else {
      const LogSigmoid g = log_sigmoid(v.reward_gap);
      if constexpr (kind == PreferenceKind::rpo_bwd_kl) {
        loss = g.sigma_plus * (g.plus - s.plus) + g.sigma_minus * (g.minus - s.minus);
        slope = s.sigma_plus - g.sigma_plus;
      } else {
        loss = s.sigma_plus * (s.plus - g.plus) + s.sigma_minus * (s.minus - g.minus);
        slope = s.sigma_plus * s.sigma_minus * (x - v.reward_gap);  // log-odds are x and the gap
      }
    }
    slope *= p.beta;
    return {loss, slope, -slope};
  }
}

template <PreferenceKind kind>
static void part(const PreferenceLossParams& p, int64_t begin, int64_t end, double* sums) {
  const float scale = float(1.0 / p.num_pairs);
  const vfloat zero = splat(0.f);
  vdouble total[PREFERENCE_STATS] = {};
  for (int64_t i = begin; i < end; i += LANES) {
    const int64_t n = end - i;
    // Lanes beyond the end hold -1: a probability that every loss can take.
    const auto load = [&](const float* x, float fill) { return load_some<Float32>(x + i, n, fill); };
    const auto load_or_zero = [&](const float* x) { return x ? load(x, 0.f) : zero; };
    const vfloat gap = load_or_zero(p.reward_chosen) - load_or_zero(p.reward_rejected);
    const Pairs v{load(p.policy_chosen, -1.f), load(p.policy_rejected, -1.f), load_or_zero(p.ref_chosen),
                  load_or_zero(p.ref_rejected), p.reward_scale * gap};
    const Term t = term<kind>(p, v);
    store_some<Float32>(p.d_chosen + i, scale * (t.d_chosen - p.sft_coef), n);
    store_some<Float32>(p.d_rejected + i, scale * t.d_rejected, n);
    const vfloat w = load_weights(nullptr, nullptr, i, n);
    const vfloat chosen = p.beta * (v.chosen - v.ref_chosen), rejected = p.beta * (v.rejected - v.ref_rejected);
    total[0] += widen_sum(keep(w, t.loss));
    total[1] += widen_sum(keep(w, -v.chosen));
    total[2] += widen_sum(chosen > rejected ? w : zero);
    total[3] += widen_sum(keep(w, chosen));
    total[4] += widen_sum(keep(w, rejected));
    total[5] += widen_sum(keep(w, chosen - rejected));
  }
  for (int64_t k = 0; k < PREFERENCE_STATS; ++k) sums[k] = hsum(total[k]);
}

using Part = void (*)(const PreferenceLossParams&, int64_t, int64_t, double*);
static Part part_of(PreferenceKind kind) {
  switch (kind) {
    case PreferenceKind::dpo:
      return part<PreferenceKind::dpo>;
    case PreferenceKind::cdpo:
      return part<PreferenceKind::cdpo>;
    case PreferenceKind::rdpo:
      return part<PreferenceKind::rdpo>;
    case PreferenceKind::ipo:
      return part<PreferenceKind::ipo>;
    case PreferenceKind::rpo_sq:
      return part<PreferenceKind::rpo_sq>;
    case PreferenceKind::rpo_fwd_kl:
      return part<PreferenceKind::rpo_fwd_kl>;
    case PreferenceKind::rpo_bwd_kl:
      return part<PreferenceKind::rpo_bwd_kl>;
    case PreferenceKind::simpo:
      return part<PreferenceKind::simpo>;
    default:
      return part<PreferenceKind::orpo>;
  }
}

void preference_loss_cpu(const PreferenceLossParams& p) {
  double parts[MAX_PARTS][PREFERENCE_STATS];
  const Part sum = part_of(p.kind);
  const int used = parallel_parts(p.count, 1 << 12,
                                  [&](int64_t begin, int64_t end, int number) { sum(p, begin, end, parts[number]); });
  double sums[PREFERENCE_STATS] = {};
  for (int i = 0; i < used; ++i) {
    for (int64_t k = 0; k < PREFERENCE_STATS; ++k) sums[k] += parts[i][k];
  }
  for (int64_t k = 0; k < PREFERENCE_STATS; ++k) p.stats[k] = float(sums[k] / p.num_pairs);
  p.loss[0] = float((sums[0] + double(p.sft_coef) * sums[1]) / p.num_pairs);
}

}  // namespace aligner::ALIGNER_ISA
