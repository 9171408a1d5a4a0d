// The parts of a decoder layer between its matrix products. Activations are float32; rows are independent.
#pragma once
#include <cstdint>

#include "dispatch.h"
#include "dtype.h"

namespace aligner {

// y[i] = table[tokens[i]]
struct EmbedParams {
  const void* table;      // [vocabulary, width]
  const int32_t* tokens;  // [rows] ids
  float* y;               // [rows, width] out
  int64_t rows, width;    // elements
  Dtype dtype;            // of table
};

// y = x / sqrt(mean(x^2) + epsilon) * weight.   Source: Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4.
struct RmsNormParams {
  const float* x;       // [rows, width]
  const void* weight;   // [width]
  float* y;             // [rows, width] out
  int64_t rows, width;  // elements
  float epsilon;        // dimensionless
  Dtype dtype;          // of weight
};

// y = silu(gate) * up.   Source: Shazeer 2020, arXiv:2002.05202, eq. 6.
struct SwigluParams {
  const float* gate_up;  // [rows, 2 width]: gate, then up
  float* y;              // [rows, width] out
  int64_t rows, width;   // elements
};

ALIGNER_CPU_KERNEL(embed_cpu, EmbedParams)
ALIGNER_CPU_KERNEL(rms_norm_cpu, RmsNormParams)
ALIGNER_CPU_KERNEL(swiglu_cpu, SwigluParams)

}  // namespace aligner
