// Losses on pairs of a chosen and a rejected response, their gradients and statistics in one pass.
//   delta = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected),   x = beta delta,   y = reward_scale *
//   (reward_chosen - reward_rejected) dpo      -log s(x) cdpo     -(1 - e) log s(x) - e log s(-x) e = label_smoothing
//   rdpo     (-(1 - e) log s(x) + e log s(-x)) / (1 - 2 e)
//   ipo      (delta - 1 / (2 beta))^2
//   rpo_sq   (x - y)^2
//   rpo_bwd_kl   KL(Bernoulli(s(y)) || Bernoulli(s(x)));   rpo_fwd_kl   KL(Bernoulli(s(x)) || Bernoulli(s(y)))
//   simpo    -log s(beta (policy_chosen - policy_rejected) - margin)           log-probabilities averaged over tokens
//   orpo     -beta log s(o_chosen - o_rejected), o = logp - log(1 - e^logp)    log-probabilities averaged over tokens
//   loss = sum_b (l_b - sft_coef policy_chosen_b) / num_pairs
// Source: dpo Rafailov et al. 2023, arXiv:2305.18290, eq. 7; cdpo Mitchell 2023, ericmitchell.ai/cdpo.pdf; rdpo Ray
// Chowdhury et al. 2024, arXiv:2403.00409, eq. 12; ipo Azar et al. 2023, arXiv:2310.12036, eq. 17; rpo Sun et al. 2025,
// arXiv:2502.00203, section 3, directions as in NeMo-Aligner; simpo Meng et al. 2024, arXiv:2405.14734, eq. 6; orpo
// Hong et al. 2024, arXiv:2403.07691, eq. 6-7.
#pragma once
#include <cstdint>

#include "dispatch.h"

namespace aligner {

enum class PreferenceKind { dpo, cdpo, rdpo, ipo, rpo_sq, rpo_fwd_kl, rpo_bwd_kl, simpo, orpo };

struct PreferenceLossParams {
  const float* policy_chosen;    // [B] nats, log-probability of the response
  const float* policy_rejected;  // [B] nats
  const float* ref_chosen;       // [B] nats; null counts as 0
  const float* ref_rejected;     // [B] nats; null counts as 0
  const float* reward_chosen;    // [B] reward units; null counts as 0
  const float* reward_rejected;  // [B] reward units; null counts as 0
  float* d_chosen;               // [B] out, d loss / d policy_chosen, 1/nats
  float* d_rejected;             // [B] out, d loss / d policy_rejected, 1/nats
  float* loss;                   // [1] out
  float* stats;                  // [6] out, sum_b x_b / num_pairs of: l, -policy_chosen in nats, delta > 0,
                                 //     beta (policy - ref) of chosen, of rejected, their difference
  int64_t count;                 // B
  double num_pairs;              // pairs, denominator of the whole optimizer step
  PreferenceKind kind;
  float beta;             // 1/nats; orpo: dimensionless
  float label_smoothing;  // dimensionless, in [0, 1/2)
  float margin;           // dimensionless, target margin of simpo
  float reward_scale;     // 1/reward units
  float sft_coef;         // dimensionless
};

ALIGNER_CPU_KERNEL(preference_loss_cpu, PreferenceLossParams)

}  // namespace aligner
