// Kahneman-Tversky loss on single responses labelled desirable or not, its gradient and statistics in one pass.
//   h = policy - ref,   desirable: l = desirable_weight (1 - s(beta (h - kl))),   else: undesirable_weight (1 - s(beta
//   (kl - h))) loss = sum_b l_b / num_responses
// Source: Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8.
#pragma once
#include <cstdint>

#include "dispatch.h"

namespace aligner {

struct KtoLossParams {
  const float* policy;    // [B] nats, log-probability of the response
  const float* ref;       // [B] nats
  const bool* desirable;  // [B]
  const float* kl;        // [1] nats, >= 0, the reference point z_0
  float* d_policy;        // [B] out, d loss / d policy, 1/nats
  float* loss;            // [1] out
  float* stats;   // [4] out, sum_b x_b / num_responses of: l, desirable, beta h where desirable, beta h elsewhere
  int64_t count;  // B
  double num_responses;                        // denominator of the whole optimizer step
  float beta;                                  // 1/nats
  float desirable_weight, undesirable_weight;  // dimensionless
};

ALIGNER_CPU_KERNEL(kto_loss_cpu, KtoLossParams)

}  // namespace aligner
