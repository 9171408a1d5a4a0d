#include "gae.h"
#include "parallel.h"

namespace aligner::ALIGNER_ISA {

static void gae_sequence(const GaeParams& p, int64_t begin, int64_t end) {
  float advantage = 0.f, next_value = 0.f;
  for (int64_t t = end - 1; t >= begin; --t) {
    if (!p.action_mask[t]) {
      p.advantages[t] = p.returns[t] = 0.f;
      continue;
    }
    const float value = p.values[t];
    const float delta = p.rewards[t] + p.gamma * next_value - value;
    advantage = delta + p.gamma * p.lam * advantage;
    next_value = value;
    p.advantages[t] = advantage;
    p.returns[t] = advantage + value;
  }
}

void gae_cpu(const GaeParams& p) {
  parallel_parts(p.num_sequences, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t b = begin; b < end; ++b) gae_sequence(p, p.cu_seqlens[b], p.cu_seqlens[b + 1]);
  });
}

}  // namespace aligner::ALIGNER_ISA
