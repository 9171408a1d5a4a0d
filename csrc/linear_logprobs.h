// Log-probability and entropy of logits = hidden weight^T that are never held: they are made a tile at a time, in the
// forward pass and again in the backward pass.
//   logprob = z_target - log sum_v e^{z_v},   H = -sum_v p_v log p_v,   z = hidden weight^T / temperature
// Source: Wijmans et al. 2024, arXiv:2411.09009 (cut cross-entropy), section 4.
#pragma once
#include <cstdint>

#include "dispatch.h"
#include "dtype.h"

namespace aligner {

struct LinearLogprobsParams {
  const void* hidden;         // [N, H] of dtype
  const void* weight;         // [V, H] of dtype, this rank's rows
  const int64_t* rows;        // [A] which rows of hidden take part, ascending
  const int64_t* targets;     // [N] row of weight, outside [0, V) when it is in another shard
  float* logprobs;            // [N] out at `rows`, nats; 0 where the target is in another shard
  float* entropy;             // [N] out at `rows`, nats
  float* max;                 // [N] out at `rows`, largest logit (not divided by the temperature)
  float* log_sum;             // [N] out at `rows`, log sum_v e^{(logit_v - max) / temperature}, nats
  int64_t active;             // A
  int64_t vocabulary, width;  // V, H
  int64_t hidden_stride;      // elements between rows of hidden
  int64_t weight_stride;      // elements between rows of weight
  float inverse_temperature;  // dimensionless, > 0
  Dtype dtype;                // of hidden and weight
};

struct LinearLogprobsBackwardParams {
  const void* hidden;         // [N, H] of dtype
  const void* weight;         // [V, H] of dtype
  const int64_t* rows;        // [A] which rows of hidden take part, ascending
  const int64_t* targets;     // [N] as above
  const float* max;           // [N] of the whole vocabulary, as above
  const float* log_sum;       // [N] of the whole vocabulary, as above
  const float* entropy;       // [N] nats
  const float* d_logprobs;    // [N] upstream gradient, or null
  const float* d_entropy;     // [N] upstream gradient, or null
  void* d_hidden;             // [N, H] out at `rows`, of dtype, contiguous; or null
  void* d_weight;             // [V, H] out, of dtype, contiguous; or null
  int64_t active;             // A
  int64_t vocabulary, width;  // V, H
  int64_t hidden_stride;      // elements between rows of hidden
  int64_t weight_stride;      // elements between rows of weight
  float inverse_temperature;  // dimensionless, > 0
  Dtype dtype;                // of hidden, weight and their gradients
};

ALIGNER_CPU_KERNEL(linear_logprobs_cpu, LinearLogprobsParams)
ALIGNER_CPU_KERNEL(linear_logprobs_backward_cpu, LinearLogprobsBackwardParams)

}  // namespace aligner
