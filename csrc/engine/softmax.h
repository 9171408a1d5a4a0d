// One row of logits as unnormalised probabilities, with sums by block so that a drawn number is found quickly.
#pragma once
#include <cstdint>

#include "dispatch.h"

namespace aligner {

constexpr int64_t SUM_BLOCK = 256;  // columns summed at once

struct SoftmaxParams {
  const float* logits;  // [count]
  float* weights;       // [count] out, e^((logit - max) * inverse_temperature)
  double* block_sums;   // [ceil(count / SUM_BLOCK)] out, of weights
  float* max;           // [1] out, the largest logit
  int64_t count;
  float inverse_temperature;  // dimensionless
};

ALIGNER_CPU_KERNEL(softmax_cpu, SoftmaxParams)

}  // namespace aligner
