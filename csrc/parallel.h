// Splits work over OpenMP threads, whose number torch.set_num_threads controls. Included only by *_cpu.cpp.
#pragma once
#include <omp.h>
#include <stdint.h>

namespace aligner::ALIGNER_ISA {

constexpr int MAX_PARTS = 64;

// body(begin, end, part) for contiguous parts of [0, count), none smaller than `grain` but the only one. The same count
// and thread number always give the same parts, so a sum over parts in order is deterministic. Returns how many parts.
template <class Body>
static inline int parallel_parts(int64_t count, int64_t grain, const Body& body) {
  int64_t parts = count / grain;
  const int64_t limit = omp_in_parallel() ? 1 : omp_get_max_threads();
  parts = parts > limit ? limit : parts;
  parts = parts > MAX_PARTS ? MAX_PARTS : parts;
  if (parts <= 1) {
    body(int64_t(0), count, 0);
    return 1;
  }
#pragma omp parallel for schedule(static, 1) num_threads(int(parts))
  for (int64_t i = 0; i < parts; ++i) body(count * i / parts, count * (i + 1) / parts, int(i));
  return int(parts);
}

}  // namespace aligner::ALIGNER_ISA
