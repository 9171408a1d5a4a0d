// Log-probability of each row's target and entropy of each row, from logits; forward and backward.
//   logprob = z_target - log sum_j e^{z_j},   H = -sum_j p_j log p_j,   z = logits / temperature
// Source: Milakov and Gimelshein 2018, arXiv:1805.02867, algorithm 3 (online softmax).
#pragma once
#include <cstdint>

#include "dispatch.h"
#include "dtype.h"

namespace aligner {

struct LogprobsParams {
  const void* logits;         // [N, V] of dtype; -inf allowed
  const int64_t* targets;     // [N] token id; in column id - vocab_start, outside [0, V) when it is in another shard
  float* logprobs;            // [N] out, nats; 0 where the target is in another shard
  float* entropy;             // [N] out, nats
  float* max;                 // [N] out, largest logit (not divided by the temperature)
  float* log_sum;             // [N] out, log sum_j e^{(logit_j - max) / temperature}, nats
  int64_t rows, columns;      // N, V
  int64_t row_stride;         // elements between rows
  int64_t vocab_start;        // token id of column 0
  float inverse_temperature;  // dimensionless, > 0
  Dtype dtype;                // of logits
};

struct LogprobsBackwardParams {
  const void* logits;         // [N, V] of dtype
  const int64_t* targets;     // [N] as above
  const float* max;           // [N] of the whole vocabulary, as above
  const float* log_sum;       // [N] of the whole vocabulary, as above
  const float* entropy;       // [N] nats
  const float* d_logprobs;    // [N] upstream gradient, or null
  const float* d_entropy;     // [N] upstream gradient, or null
  void* d_logits;             // [N, V] out, of dtype; may be logits itself
  int64_t rows, columns;      // N, V
  int64_t row_stride;         // elements between rows of logits
  int64_t d_row_stride;       // elements between rows of d_logits
  int64_t vocab_start;        // token id of column 0
  float inverse_temperature;  // dimensionless, > 0
  Dtype dtype;                // of logits and d_logits
};

ALIGNER_CPU_KERNEL(logprobs_cpu, LogprobsParams)
ALIGNER_CPU_KERNEL(logprobs_backward_cpu, LogprobsBackwardParams)

}  // namespace aligner
