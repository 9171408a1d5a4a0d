// Weight of a token in a loss, and the losses' float arithmetic on NaN, as on the CPU. Included only by .cu files.
#pragma once
#include "cuda_kernel.cuh"

namespace aligner {

// From a bool mask, from float weights, or 1 where neither is given.
__device__ __forceinline__ float load_weight(const bool* mask, const float* weights, int64_t i) {
  if (weights) return load(weights + i);
  return !mask || load(mask + i) ? 1.f : 0.f;
}

// What a left-out token holds must not reach a sum, not even multiplied by zero: it may be NaN.
__device__ __forceinline__ float keep(float weight, float x) { return weight != 0.f ? x : 0.f; }

// b where either is NaN, while fmaxf and fminf would hide a NaN.
__device__ __forceinline__ float larger(float a, float b) { return a > b ? a : b; }
__device__ __forceinline__ float smaller(float a, float b) { return a < b ? a : b; }

}  // namespace aligner
