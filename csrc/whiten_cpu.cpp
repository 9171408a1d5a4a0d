#include <math.h>

#include "parallel.h"
#include "whiten.h"

namespace aligner::ALIGNER_ISA {

constexpr int64_t GRAIN = 1 << 14;

void whiten_moments_cpu(const WhitenMomentsParams& p) {
  double sums[MAX_PARTS];
  int64_t counts[MAX_PARTS];
  int parts = parallel_parts(p.count, GRAIN, [&](int64_t begin, int64_t end, int part) {
    double sum = 0;
    int64_t count = 0;
#pragma omp simd reduction(+ : sum, count)
    for (int64_t i = begin; i < end; ++i) {
      sum += p.mask[i] ? double(p.x[i]) : 0.0;
      count += p.mask[i];
    }
    sums[part] = sum;
    counts[part] = count;
  });
  double sum = 0, count = 0;
  for (int i = 0; i < parts; ++i) {
    sum += sums[i];
    count += double(counts[i]);
  }
  const double mean = count > 0 ? sum / count : 0.0;
  parts = parallel_parts(p.count, GRAIN, [&](int64_t begin, int64_t end, int part) {
    double squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = begin; i < end; ++i) {
      const double d = p.mask[i] ? double(p.x[i]) - mean : 0.0;
      squares += d * d;
    }
    sums[part] = squares;
  });
  double squares = 0;
  for (int i = 0; i < parts; ++i) squares += sums[i];
  p.moments[0] = count;
  p.moments[1] = mean;
  p.moments[2] = squares;
}

void whiten_apply_cpu(const WhitenApplyParams& p) {
  const double count = p.moments[0], mean = p.moments[1];
  const double scale = count > 0 ? 1.0 / sqrt(p.moments[2] / count + 1e-8) : 0.0;
  parallel_parts(p.count, GRAIN, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) p.y[i] = p.mask[i] ? float((double(p.x[i]) - mean) * scale) : 0.f;
  });
}

}  // namespace aligner::ALIGNER_ISA
