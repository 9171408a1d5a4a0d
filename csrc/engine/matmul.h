// Y (+)= X W^T with W as it lies in a checkpoint: one row an output. Rows of X are independent: each output is summed
// in the same order whatever the number of rows and of threads, so a sequence gets the same bits in any batch.
#pragma once
#include <cstdint>

#include "dispatch.h"
#include "dtype.h"

namespace aligner {

struct MatmulParams {
  const float* x;                // [rows, depth]
  const void* weight;            // [outputs, depth] float32, bfloat16 or, with scales, int8
  float* y;                      // [rows, outputs]
  int64_t rows, outputs, depth;  // elements
  Dtype dtype;                   // of weight without scales; sums are float32
  bool add;                      // to what y holds
  const float* scales;           // [outputs], or null: what an int8 row is multiplied by
};

ALIGNER_CPU_KERNEL(matmul_cpu, MatmulParams)

}  // namespace aligner
