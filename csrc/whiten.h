// Masked whitening: y = (x - mean) / sqrt(var + 1e-8), in two passes so that ranks can combine their moments between.
// Source: Chan, Golub, LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".
#pragma once
#include <cstdint>

#include "dispatch.h"

namespace aligner {

struct WhitenMomentsParams {
  const float* x;    // [N] any unit
  const bool* mask;  // [N] token takes part
  double* moments;   // [3] out: count (tokens), mean (unit of x), sum of squared deviations from it (unit squared)
  int64_t count;     // N
};

struct WhitenApplyParams {
  const float* x;         // [N] any unit
  const bool* mask;       // [N] token takes part
  const double* moments;  // [3] as above, of all tokens of all ranks
  float* y;               // [N] out, dimensionless, 0 where masked out
  int64_t count;          // N
};

ALIGNER_CPU_KERNEL(whiten_moments_cpu, WhitenMomentsParams)
ALIGNER_CPU_KERNEL(whiten_apply_cpu, WhitenApplyParams)

}  // namespace aligner
