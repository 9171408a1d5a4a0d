#include "parallel.h"
#include "simd.h"
#include "token_weights.h"
#include "value_loss.h"

namespace aligner::ALIGNER_ISA {

constexpr int64_t VALUE_STATS = 4;

ALIGNER_INLINE vfloat rho(vfloat error, vfloat huber) {
  const vfloat size = vmax(error, -error), inside = vmin(size, huber);
  return size <= huber ? 0.5f * error * error : inside * (size - 0.5f * inside);
}

static void value_loss_part(const ValueLossParams& p, int64_t begin, int64_t end, double* sums) {
  const float scale = float(1.0 / p.num_tokens);
  const vfloat zero = splat(0.f), bound = splat(p.clip), huber = splat(p.huber);
  vdouble total[VALUE_STATS] = {};
  for (int64_t i = begin; i < end; i += LANES) {
    const int64_t n = end - i;
    const vfloat w = load_weights(p.mask, p.weights, i, n);
    const vfloat v = keep(w, load_some<Float32>(p.values + i, n, 0.f));
    const vfloat old = keep(w, load_some<Float32>(p.old_values + i, n, 0.f));
    const vfloat target = keep(w, load_some<Float32>(p.returns + i, n, 0.f));
    const vfloat moved = v - old;
    const vint outside = (moved > bound) | (moved < -bound);
    const vfloat plain = v - target;
    const vfloat clip = outside ? (old + vmin(bound, vmax(-bound, moved))) - target : plain;
    const vfloat rho_plain = rho(plain, huber), rho_clip = rho(clip, huber);
    const vint active = rho_clip > rho_plain;
    // Where the clipped branch is larger v is outside the bounds, so it does not move that branch.
    store_some<Float32>(p.d_values + i, w * scale * (active ? zero : vmin(huber, vmax(-huber, plain))), n);
    total[0] += widen_sum(w * (active ? rho_clip : rho_plain));
    total[1] += widen_sum(active ? w : zero);
    total[2] += widen_sum(w * v);
    total[3] += widen_sum(w * target);
  }
  for (int64_t k = 0; k < VALUE_STATS; ++k) sums[k] = hsum(total[k]);
}

void value_loss_cpu(const ValueLossParams& p) {
  double parts[MAX_PARTS][VALUE_STATS];
  const int used = parallel_parts(
      p.count, 1 << 12, [&](int64_t begin, int64_t end, int part) { value_loss_part(p, begin, end, parts[part]); });
  double sums[VALUE_STATS] = {};
  for (int i = 0; i < used; ++i) {
    for (int64_t k = 0; k < VALUE_STATS; ++k) sums[k] += parts[i][k];
  }
  for (int64_t k = 0; k < VALUE_STATS; ++k) p.stats[k] = float(sums[k] / p.num_tokens);
  p.loss[0] = p.stats[0];
}

}  // namespace aligner::ALIGNER_ISA
