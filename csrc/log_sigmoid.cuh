// Logistic function and its logarithm, on both sides and without cancellation. Included only by .cu files.
#pragma once
#include "cuda_kernel.cuh"

namespace aligner {

struct LogSigmoid {
  float plus, minus;              // log s(x), log s(-x)
  float sigma_plus, sigma_minus;  // s(x), s(-x)
};

__device__ __forceinline__ LogSigmoid log_sigmoid(float x) {
  const float e = expf(-fabsf(x)), tail = log1pf(e), large = 1.f / (1.f + e), small = e * large;
  return {fminf(x, 0.f) - tail, fminf(-x, 0.f) - tail, x > 0.f ? large : small, x > 0.f ? small : large};
}

}  // namespace aligner
