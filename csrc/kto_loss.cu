// Source: see kto_loss.h.
#include "cuda_kernel.cuh"
#include "kto_loss.h"
#include "log_sigmoid.cuh"

namespace aligner {
namespace {

constexpr int STATS = 4;

__global__ void __launch_bounds__(TOKEN_BLOCK) kto_loss_responses(KtoLossParams p, double* workspace) {
  const float scale = float(1.0 / p.num_responses), kl = load(p.kl);
  Sums<STATS> sums{};
  for_each_token(p.count, [&](int64_t i) {
    const bool good = load(p.desirable + i);
    const float policy = load(p.policy + i), h = policy - load(p.ref + i);
    const float weight = good ? p.desirable_weight : p.undesirable_weight;
    const LogSigmoid s = log_sigmoid(p.beta * (good ? h - kl : kl - h));
    const float slope = weight * p.beta * (s.sigma_plus * s.sigma_minus);
    store(p.d_policy + i, scale * (good ? -slope : slope));
    sums.value[0] += weight * s.sigma_minus;
    sums.value[1] += good ? 1.f : 0.f;
    sums.value[2] += good ? p.beta * h : 0.f;
    sums.value[3] += good ? 0.f : p.beta * h;
  });
  store_part(workspace, sums);
}

__global__ void __launch_bounds__(TOKEN_BLOCK) kto_loss_sum(KtoLossParams p, const double* workspace, int blocks) {
  const Sums<STATS> sums = sum_parts<STATS>(workspace, blocks);
  if (threadIdx.x != 0) return;
  for (int k = 0; k < STATS; ++k) store(p.stats + k, float(sums.value[k] / p.num_responses));
  store(p.loss, float(sums.value[0] / p.num_responses));
}

}  // namespace

static void kto_loss(const KtoLossParams& p, double* workspace, cudaStream_t stream) {
  const int blocks = token_blocks(p.count);
  ALIGNER_LAUNCH(kto_loss_responses, blocks, TOKEN_BLOCK, stream, p, workspace);
  ALIGNER_LAUNCH(kto_loss_sum, 1, TOKEN_BLOCK, stream, p, workspace, blocks);
}

}  // namespace aligner

ALIGNER_CUDA_KERNEL(kto_loss, KtoLossParams)
