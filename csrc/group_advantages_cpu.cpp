#include <math.h>

#include "group_advantages.h"
#include "parallel.h"

namespace aligner::ALIGNER_ISA {

static void one_group(const GroupAdvantagesParams& p, int64_t begin, int64_t end) {
  const int64_t n = end - begin;
  double sum = 0, squares = 0;
  for (int64_t i = begin; i < end; ++i) sum += p.rewards[i];
  const double mean = sum / double(n);
  for (int64_t i = begin; i < end; ++i) squares += (p.rewards[i] - mean) * (p.rewards[i] - mean);
  double scale = 1;
  if (p.kind == GroupAdvantage::grpo) scale = n > 1 ? 1 / (::sqrt(squares / double(n - 1)) + 1e-6) : 0;
  if (p.kind == GroupAdvantage::rloo) scale = n > 1 ? double(n) / double(n - 1) : 0;
  for (int64_t i = begin; i < end; ++i) p.advantages[i] = float((p.rewards[i] - mean) * scale);
}

// A part has the groups that begin in it.
void group_advantages_cpu(const GroupAdvantagesParams& p) {
  parallel_parts(p.count, 1 << 12, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end;) {
      int64_t next = i + 1;
      while (next < p.count && p.groups[next] == p.groups[i]) ++next;
      if (i == 0 || p.groups[i - 1] != p.groups[i]) one_group(p, i, next);
      i = next;
    }
  });
}

}  // namespace aligner::ALIGNER_ISA
