// Advantage of each response over the others to the same prompt.
//   dr_grpo: A = r - mean;   grpo: A = (r - mean) / (std + 1e-6);   rloo: A = r - (mean of the others)
//   std has the correction of a sample, sqrt(sum (r - mean)^2 / (n - 1)); a group of one gets 0.
// Source: Shao et al. 2024, arXiv:2402.03300, section 4.1.2 (grpo); Liu et al. 2025, arXiv:2503.20783, section 3.2
// (dr_grpo); Ahmadian et al. 2024, arXiv:2402.14740, eq. 7 (rloo).
#pragma once
#include <cstdint>

#include "dispatch.h"

namespace aligner {

enum class GroupAdvantage { grpo, dr_grpo, rloo };

struct GroupAdvantagesParams {
  const float* rewards;   // [B] reward units
  const int64_t* groups;  // [B] which prompt; equal ones are adjacent
  float* advantages;      // [B] out, reward units; dimensionless for grpo
  int64_t count;          // B
  GroupAdvantage kind;
};

ALIGNER_CPU_KERNEL(group_advantages_cpu, GroupAdvantagesParams)

}  // namespace aligner
