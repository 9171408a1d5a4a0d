// Sum or mean of the tokens of each sequence, and the gradient through it.
//   sum_b = sum_{t in b} m_t x_t,   mean_b = sum_b / max(1, sum_{t in b} m_t)
#pragma once
#include <cstdint>

#include "dispatch.h"

namespace aligner {

struct SegmentSumParams {
  const float* x;             // [N] any unit
  const bool* mask;           // [N] token counts; null for all
  const int32_t* cu_seqlens;  // [B+1] tokens, prefix sum of lengths
  float* result;              // [B] out, unit of x; 0 where no token counts
  int64_t num_sequences;      // B
  bool mean;                  // divide by the tokens that count
};

struct SegmentSumBackwardParams {
  const float* d_result;      // [B] upstream gradient
  const bool* mask;           // [N] as above
  const int32_t* cu_seqlens;  // [B+1] as above
  float* d_x;                 // [N] out, 0 where a token does not count
  int64_t num_sequences;      // B
  bool mean;                  // as above
};

ALIGNER_CPU_KERNEL(segment_sum_cpu, SegmentSumParams)
ALIGNER_CPU_KERNEL(segment_sum_backward_cpu, SegmentSumBackwardParams)

}  // namespace aligner
