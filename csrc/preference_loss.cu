// Source: see preference_loss.h.
#include "cuda_kernel.cuh"
#include "log_sigmoid.cuh"
#include "preference_loss.h"

namespace aligner {
namespace {

constexpr int STATS = 6;

struct Pair {
  float chosen, rejected, ref_chosen, ref_rejected, reward_gap;  // reward_gap: scaled
};
struct Term {
  float loss, d_chosen, d_rejected;
};

// log(p / (1 - p)) of p = e^logp, and its slope 1 / (1 - p); logp < 0.
struct LogOdds {
  float value, slope;
};
__device__ __forceinline__ LogOdds log_odds(float logp) {
  const float rest = -expm1f(logp);
  return {logp - logf(rest), 1.f / rest};
}

// Loss and slope in x = beta delta of the losses that are functions of it alone.
struct Slope {
  float loss, slope;
};
__device__ __forceinline__ Slope sigmoid_loss(const PreferenceLossParams& p, float x, float reward_gap) {
  const LogSigmoid s = log_sigmoid(x);
  const float e = p.label_smoothing;
  switch (p.kind) {
    case PreferenceKind::cdpo:
      return {-(1.f - e) * s.plus - e * s.minus, e * s.sigma_plus - (1.f - e) * s.sigma_minus};
    case PreferenceKind::rdpo: {
      const float scale = 1.f / (1.f - 2.f * e);
      return {scale * (e * s.minus - (1.f - e) * s.plus), -scale * ((1.f - e) * s.sigma_minus + e * s.sigma_plus)};
    }
    case PreferenceKind::rpo_bwd_kl: {
      const LogSigmoid g = log_sigmoid(reward_gap);
      return {g.sigma_plus * (g.plus - s.plus) + g.sigma_minus * (g.minus - s.minus), s.sigma_plus - g.sigma_plus};
    }
    case PreferenceKind::rpo_fwd_kl: {
      const LogSigmoid g = log_sigmoid(reward_gap);
      return {s.sigma_plus * (s.plus - g.plus) + s.sigma_minus * (s.minus - g.minus),
              s.sigma_plus * s.sigma_minus * (x - reward_gap)};  // log-odds are x and the gap
    }
    default:  // dpo
      return {-s.plus, -s.sigma_minus};
  }
}

__device__ __forceinline__ Term term(const PreferenceLossParams& p, const Pair& v) {
  const float delta = (v.chosen - v.ref_chosen) - (v.rejected - v.ref_rejected), x = p.beta * delta;
  switch (p.kind) {
    case PreferenceKind::ipo: {
      const float error = delta - 0.5f / p.beta;
      return {error * error, 2.f * error, -2.f * error};
    }
    case PreferenceKind::rpo_sq: {
      const float error = x - v.reward_gap, slope = 2.f * p.beta * error;
      return {error * error, slope, -slope};
    }
    case PreferenceKind::orpo: {
      const LogOdds chosen = log_odds(v.chosen), rejected = log_odds(v.rejected);
      const LogSigmoid s = log_sigmoid(chosen.value - rejected.value);
      const float slope = -p.beta * s.sigma_minus;
      return {-p.beta * s.plus, slope * chosen.slope, -slope * rejected.slope};
    }
    case PreferenceKind::simpo: {
      const LogSigmoid s = log_sigmoid(p.beta * (v.chosen - v.rejected) - p.margin);
      const float slope = -p.beta * s.sigma_minus;
      return {-s.plus, slope, -slope};
    }
    default: {
      const Slope s = sigmoid_loss(p, x, v.reward_gap);
      return {s.loss, s.slope * p.beta, -s.slope * p.beta};
    }
  }
}

__global__ void __launch_bounds__(TOKEN_BLOCK) preference_loss_pairs(PreferenceLossParams p, double* workspace) {
  const float scale = float(1.0 / p.num_pairs);
  Sums<STATS> sums{};
  for_each_token(p.count, [&](int64_t i) {
    const auto load_or_zero = [&](const float* x) { return x ? load(x + i) : 0.f; };
    Pair v{load(p.policy_chosen + i), load(p.policy_rejected + i), 0.f, 0.f, 0.f};
    v.ref_chosen = load_or_zero(p.ref_chosen);
    v.ref_rejected = load_or_zero(p.ref_rejected);
    const float reward_chosen = load_or_zero(p.reward_chosen);
    v.reward_gap = p.reward_scale * (reward_chosen - load_or_zero(p.reward_rejected));
    const Term t = term(p, v);
    store(p.d_chosen + i, scale * (t.d_chosen - p.sft_coef));
    store(p.d_rejected + i, scale * t.d_rejected);
    const float chosen = p.beta * (v.chosen - v.ref_chosen), rejected = p.beta * (v.rejected - v.ref_rejected);
    sums.value[0] += t.loss;
    sums.value[1] -= v.chosen;
    sums.value[2] += chosen > rejected ? 1.f : 0.f;
    sums.value[3] += chosen;
    sums.value[4] += rejected;
    sums.value[5] += chosen - rejected;
  });
  store_part(workspace, sums);
}

__global__ void __launch_bounds__(TOKEN_BLOCK)
    preference_loss_sum(PreferenceLossParams p, const double* workspace, int blocks) {
  const Sums<STATS> sums = sum_parts<STATS>(workspace, blocks);
  if (threadIdx.x != 0) return;
  for (int k = 0; k < STATS; ++k) store(p.stats + k, float(sums.value[k] / p.num_pairs));
  store(p.loss, float((sums.value[0] + double(p.sft_coef) * sums.value[1]) / p.num_pairs));
}

}  // namespace

static void preference_loss(const PreferenceLossParams& p, double* workspace, cudaStream_t stream) {
  const int blocks = token_blocks(p.count);
  ALIGNER_LAUNCH(preference_loss_pairs, blocks, TOKEN_BLOCK, stream, p, workspace);
  ALIGNER_LAUNCH(preference_loss_sum, 1, TOKEN_BLOCK, stream, p, workspace, blocks);
}

}  // namespace aligner

ALIGNER_CUDA_KERNEL(preference_loss, PreferenceLossParams)
