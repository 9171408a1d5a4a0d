// Source: see policy_loss.h.
#include "cuda_kernel.cuh"
#include "policy_loss.h"
#include "token_weights.cuh"

namespace aligner {
namespace {

constexpr int STATS = 8;

// e^d - 1 - d without the cancellation near 0 that e^d alone would bring.
__device__ __forceinline__ float k3(float d, float ratio) {
  float series = 1.f / 5040;
  series = series * d + 1.f / 720;
  series = series * d + 1.f / 120;
  series = series * d + 1.f / 24;
  series = series * d + 1.f / 6;
  series = series * d + 0.5f;
  return fabsf(d) < 0.25f ? series * d * d : ratio - 1.f - d;
}

struct KlTerm {
  float value, slope;  // estimate of KL(new || ref) from x = logprob - ref_logprob, and its slope in x
};
__device__ __forceinline__ KlTerm kl_term(KlEstimator kind, float x) {
  if (kind == KlEstimator::k1) return {x, 1.f};
  if (kind == KlEstimator::k2) return {0.5f * x * x, x};
  const float value = k3(-x, expf(-x));
  return {value, x - value};  // 1 - e^-x
}

__global__ void __launch_bounds__(TOKEN_BLOCK) policy_loss_tokens(PolicyLossParams p, double* workspace) {
  const float scale = float(1.0 / p.num_tokens), low = 1.f - p.clip_low, high = 1.f + p.clip_high;
  Sums<STATS> sums{};
  for_each_token(p.count, [&](int64_t i) {
    const float w = load_weight(p.mask, p.weights, i);
    const float logprob = load(p.logprobs + i);
    const float d = keep(w, logprob - load(p.old_logprobs + i));
    const float a = keep(w, load(p.advantages + i));
    const float c = keep(w, p.importance ? load(p.importance + i) : 1.f);
    const float h = p.entropy ? keep(w, load(p.entropy + i)) : 0.f;
    const float ref = p.ref_logprobs ? load(p.ref_logprobs + i) : 0.f;

    const float r = expf(d), clamped = smaller(high, larger(low, r));
    const float plain = -a * r, clip = -a * clamped, dual = -a * p.dual_clip;
    bool active = clip > plain;
    float l = active ? clip : plain;
    if (a < 0.f && dual < l) {
      active = true;
      l = dual;
    }
    float d_term = c * (active ? 0.f : plain);
    KlTerm kl{0.f, 0.f};
    if (p.ref_logprobs) {
      kl = kl_term(p.kl, keep(w, logprob - ref));
      d_term += p.kl_coef * kl.slope;
    }
    store(p.d_logprobs + i, w * scale * d_term);
    if (p.d_entropy) store(p.d_entropy + i, w * (-p.entropy_coef * scale));
    sums.value[0] += w * c * l;
    sums.value[1] += active ? w : 0.f;
    sums.value[2] += w * k3(d, r);
    sums.value[3] += w * r;
    sums.value[4] += w * clamped;
    sums.value[5] += w * h;
    sums.value[6] += w * kl.value;
    sums.value[7] += w * c;
  });
  store_part(workspace, sums);
}

__global__ void __launch_bounds__(TOKEN_BLOCK)
    policy_loss_sum(PolicyLossParams p, const double* workspace, int blocks) {
  const Sums<STATS> sums = sum_parts<STATS>(workspace, blocks);
  if (threadIdx.x != 0) return;
  for (int k = 0; k < STATS; ++k) store(p.stats + k, float(sums.value[k] / p.num_tokens));
  const double total = sums.value[0] - double(p.entropy_coef) * sums.value[5] + double(p.kl_coef) * sums.value[6];
  store(p.loss, float(total / p.num_tokens));
}

}  // namespace

static void policy_loss(const PolicyLossParams& p, double* workspace, cudaStream_t stream) {
  const int blocks = token_blocks(p.count);
  ALIGNER_LAUNCH(policy_loss_tokens, blocks, TOKEN_BLOCK, stream, p, workspace);
  ALIGNER_LAUNCH(policy_loss_sum, 1, TOKEN_BLOCK, stream, p, workspace, blocks);
}

}  // namespace aligner

ALIGNER_CUDA_KERNEL(policy_loss, PolicyLossParams)
