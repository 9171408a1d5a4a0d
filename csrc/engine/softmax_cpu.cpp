#include "engine/softmax.h"
#include "softmax_row.h"

namespace aligner::ALIGNER_ISA {

void softmax_cpu(const SoftmaxParams& p) {
  *p.max = row_max<Float32>(p.logits, p.count);
  const vfloat max = splat(*p.max), k = splat(p.inverse_temperature * LOG2E);
  for (int64_t block = 0; block < p.count; block += SUM_BLOCK) {
    const int64_t end = smaller(p.count, block + SUM_BLOCK);
    double sum = 0;
    for (int64_t i = block; i < end; i += 4 * LANES) {
      vfloat four{};  // sums of few terms in float, of these in double
      const int64_t stop = smaller(end, i + 4 * LANES);
      for (int64_t j = i; j < stop; j += LANES) {
        vfloat y = (load_some<Float32>(p.logits + j, end - j, -INFINITY) - max) * k;
        const vfloat e = exp2_or_zero(y);
        store_some<Float32>(p.weights + j, e, end - j);
        four += e;
      }
      sum += hsum(four);
    }
    p.block_sums[block / SUM_BLOCK] = sum;
  }
}

}  // namespace aligner::ALIGNER_ISA
