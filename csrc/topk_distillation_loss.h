// KL divergence between a teacher known by its top k logits and a student, per token, and its gradient.
//   p = teacher, q = student;   forward KL: sum_e p_e log(p_e / q_e),   backward KL: sum_e q_e log(q_e / p_e)
//   without teacher_log_sum: the events e are the k tokens, p and q renormalised over them
//   with it: p_k = e^{t_k / T - teacher_log_sum}, q_k = softmax(z / T)_k, and one more event holds the rest of each,
//   but never less than 1e-8 d / d z_j of the forward KL = (q_j - p_e q_j / q_e) / T,   of the backward KL = q_j
//   (log(q_e / p_e) - KL) / T,   e the event of j
// Source: Hinton et al. 2015, arXiv:1503.02531, section 2; forward and backward KL: Gu et al. 2023, arXiv:2306.08543,
// section 2.1; the rest as one event: as in NeMo-Aligner.
#pragma once
#include <cstdint>

#include "dispatch.h"
#include "dtype.h"

namespace aligner {

constexpr double REST_FLOOR = 1e-8;  // of the probability outside the top k

struct TopkDistillationLossParams {
  const void* logits;            // [N, V] of dtype, the student's
  const int64_t* topk_ids;       // [N, K] in [0, V), different within a row
  const float* topk_logits;      // [N, K] the teacher's
  const float* teacher_log_sum;  // [N] nats, log sum_v e^{t_v / T} over its whole vocabulary; or null
  const bool* mask;              // [N] token takes part; null for all
  float* kl;                     // [N] out, nats; 0 where masked out
  float* max;                    // [N] out, largest student logit of the events' vocabulary (not divided by T)
  float* log_sum;                // [N] out, log sum e^{(z - max) / T} over it, nats
  float* rest;                   // [N] out, the student's probability outside the top k; 0 without teacher_log_sum
  int64_t rows, columns, k;      // N, V, K
  int64_t row_stride;            // elements between rows of logits
  float inverse_temperature;     // 1 / T, dimensionless, > 0
  bool backward_kl;
  Dtype dtype;  // of logits
};

struct TopkDistillationLossBackwardParams {
  const void* logits;            // as above
  const int64_t* topk_ids;       // as above
  const float* topk_logits;      // as above
  const float* teacher_log_sum;  // as above
  const bool* mask;              // as above
  const float* max;              // [N] as above
  const float* log_sum;          // [N] as above
  const float* rest;             // [N] as above
  const float* d_kl;             // [N] upstream gradient
  void* d_logits;                // [N, V] out, of dtype, contiguous
  int64_t rows, columns, k;      // N, V, K
  int64_t row_stride;            // elements between rows of logits
  float inverse_temperature;     // 1 / T, dimensionless, > 0
  bool backward_kl;
  Dtype dtype;  // of logits and d_logits
};

ALIGNER_CPU_KERNEL(topk_distillation_loss_cpu, TopkDistillationLossParams)
ALIGNER_CPU_KERNEL(topk_distillation_loss_backward_cpu, TopkDistillationLossBackwardParams)

}  // namespace aligner
