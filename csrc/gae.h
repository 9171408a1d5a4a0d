// Generalized advantage estimation over packed sequences, skipping tokens that are not actions.
//   A_t = delta_t + gamma * lam * A_next,   delta_t = r_t + gamma * V_next - V_t,   next: the next action token
// Source: Schulman et al. 2015, arXiv:1506.02438, eq. 16.
#pragma once
#include <cstdint>

#include "dispatch.h"

namespace aligner {

struct GaeParams {
  const float* rewards;       // [N] reward units
  const float* values;        // [N] reward units, V before token t
  const bool* action_mask;    // [N] token t is an action
  const int32_t* cu_seqlens;  // [B+1] tokens, prefix sum of lengths
  float* advantages;          // [N] out, reward units, 0 where not an action
  float* returns;             // [N] out, reward units, advantages + values, 0 where not an action
  int64_t num_sequences;      // B
  double gamma, lam;          // dimensionless, in [0, 1]
};

ALIGNER_CPU_KERNEL(gae_cpu, GaeParams)

}  // namespace aligner
