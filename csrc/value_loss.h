// Error of a critic, clipped around its old values: loss, gradient and statistics in one pass.
//   loss = sum_t w_t max(rho(v_clip - R), rho(v - R)) / num_tokens,   v_clip = v_old + clamp(v - v_old, -clip, clip)
//   rho(e) = e^2 / 2 where |e| <= huber, else huber (|e| - huber / 2)
// Source: Schulman et al. 2017, arXiv:1707.06347 (the PPO2 implementation's clipped value loss); rho: Huber 1964,
// "Robust estimation of a location parameter".
#pragma once
#include <cstdint>

#include "dispatch.h"

namespace aligner {

struct ValueLossParams {
  const float* values;      // [N] reward units
  const float* old_values;  // [N] reward units
  const float* returns;     // [N] reward units
  const bool* mask;         // [N] token takes part; null when weights is given
  const float* weights;     // [N] dimensionless, 0 leaves a token out whatever it holds; null when mask is given
  float* d_values;          // [N] out, d loss / d values, reward units
  float* loss;              // [1] out, reward units squared
  float* stats;             // [4] out, sum w x / num_tokens of: loss, clipped (0 or 1), value, return
  int64_t count;            // N
  double num_tokens;        // tokens, denominator of the whole optimizer step
  float clip;               // reward units, >= 0; infinity switches it off
  float huber;              // reward units, > 0, where rho turns linear; infinity for the squared error
};

ALIGNER_CPU_KERNEL(value_loss_cpu, ValueLossParams)

}  // namespace aligner
