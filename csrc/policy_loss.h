// PPO's clipped surrogate, its gradient and its statistics in one pass over the tokens.
//   l_t = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)),   r = exp(logprob - old_logprob)
//   dual clip, where A < 0: l_t = min(l_t, -A dual_clip)
//   loss = sum_t w_t (c_t l_t - entropy_coef H_t + kl_coef KL_t) / num_tokens,   x = logprob - ref_logprob
//   k1: KL = x, slope 1;   k2: KL = x^2 / 2, slope x;   k3: KL = e^-x - 1 + x, slope 1 - e^-x
// Source: Schulman et al. 2017, arXiv:1707.06347, eq. 7; dual clip: Ye et al. 2020, arXiv:1912.09729, eq. 5; KL in the
// loss: Shao et al. 2024, arXiv:2402.03300, eq. 3-4, estimators of Schulman 2020, joschu.net/blog/kl-approx.html.
#pragma once
#include <cstdint>

#include "dispatch.h"

namespace aligner {

enum class KlEstimator { k1, k2, k3 };

struct PolicyLossParams {
  const float* logprobs;      // [N] nats
  const float* old_logprobs;  // [N] nats
  const float* advantages;    // [N] reward units or dimensionless
  const bool* mask;           // [N] token takes part; null when weights is given
  const float* weights;       // [N] dimensionless, 0 leaves a token out whatever it holds; null when mask is given
  const float* importance;    // [N] dimensionless, the c_t above; null for 1
  const float* ref_logprobs;  // [N] nats; null for no KL term
  const float* entropy;       // [N] nats, or null
  float* d_logprobs;          // [N] out, d loss / d logprobs, 1/nats
  float* d_entropy;           // [N] out, d loss / d entropy, 1/nats; null when not wanted
  float* loss;                // [1] out
  float* stats;               // [8] out, sum w x / num_tokens of: c l, clipped (0 or 1), k3 estimate of KL(old || new)
                              //     in nats, ratio, clamped ratio, entropy in nats, KL(new || ref) in nats, c
  int64_t count;              // N
  double num_tokens;          // tokens, denominator of the whole optimizer step
  float clip_low, clip_high;  // dimensionless, >= 0
  float dual_clip;            // dimensionless, > 1; infinity switches it off
  float entropy_coef;         // dimensionless
  float kl_coef;              // dimensionless
  KlEstimator kl;             // of KL(new || ref)
};

ALIGNER_CPU_KERNEL(policy_loss_cpu, PolicyLossParams)

}  // namespace aligner
