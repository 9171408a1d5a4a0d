#include "gae.h"
#include "parallel.h"

namespace aligner::ALIGNER_ISA {

// In double: rounding errors of a float recursion would add up over a long sequence when gamma * lam is 1.
static void gae_sequence(const GaeParams& p, int64_t begin, int64_t end) {
  const double gamma = p.gamma, decay = p.gamma * p.lam;
  double advantage = 0, next_value = 0;
  for (int64_t t = end - 1; t >= begin; --t) {
    if (!p.action_mask[t]) {
      p.advantages[t] = p.returns[t] = 0.f;
      continue;
    }
    const double value = p.values[t];
    advantage = p.rewards[t] + gamma * next_value - value + decay * advantage;
    next_value = value;
    p.advantages[t] = float(advantage);
    p.returns[t] = float(advantage + value);
  }
}

void gae_cpu(const GaeParams& p) {
  parallel_parts(p.num_sequences, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t b = begin; b < end; ++b) gae_sequence(p, p.cu_seqlens[b], p.cu_seqlens[b + 1]);
  });
}

}  // namespace aligner::ALIGNER_ISA
