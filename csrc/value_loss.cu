// Source: see value_loss.h.
#include "cuda_kernel.cuh"
#include "token_weights.cuh"
#include "value_loss.h"

namespace aligner {
namespace {

constexpr int STATS = 4;

__device__ __forceinline__ float rho(float error, float huber) {
  const float size = fabsf(error), inside = smaller(size, huber);
  return size <= huber ? 0.5f * error * error : inside * (size - 0.5f * inside);
}

__global__ void __launch_bounds__(TOKEN_BLOCK) value_loss_tokens(ValueLossParams p, double* workspace) {
  const float scale = float(1.0 / p.num_tokens);
  Sums<STATS> sums{};
  for_each_token(p.count, [&](int64_t i) {
    const float w = load_weight(p.mask, p.weights, i);
    const float v = keep(w, load(p.values + i));
    const float old = keep(w, load(p.old_values + i));
    const float target = keep(w, load(p.returns + i));
    const float moved = v - old;
    const bool outside = moved > p.clip || moved < -p.clip;
    const float plain = v - target;
    const float clip = outside ? (old + smaller(p.clip, larger(-p.clip, moved))) - target : plain;
    const float rho_plain = rho(plain, p.huber), rho_clip = rho(clip, p.huber);
    const bool active = rho_clip > rho_plain;
    // Where the clipped branch is larger v is outside the bounds, so it does not move that branch.
    store(p.d_values + i, w * scale * (active ? 0.f : smaller(p.huber, larger(-p.huber, plain))));
    sums.value[0] += w * (active ? rho_clip : rho_plain);
    sums.value[1] += active ? w : 0.f;
    sums.value[2] += w * v;
    sums.value[3] += w * target;
  });
  store_part(workspace, sums);
}

__global__ void __launch_bounds__(TOKEN_BLOCK) value_loss_sum(ValueLossParams p, const double* workspace, int blocks) {
  const Sums<STATS> sums = sum_parts<STATS>(workspace, blocks);
  if (threadIdx.x != 0) return;
  for (int k = 0; k < STATS; ++k) store(p.stats + k, float(sums.value[k] / p.num_tokens));
  store(p.loss, float(sums.value[0] / p.num_tokens));
}

}  // namespace

static void value_loss(const ValueLossParams& p, double* workspace, cudaStream_t stream) {
  const int blocks = token_blocks(p.count);
  ALIGNER_LAUNCH(value_loss_tokens, blocks, TOKEN_BLOCK, stream, p, workspace);
  ALIGNER_LAUNCH(value_loss_sum, 1, TOKEN_BLOCK, stream, p, workspace, blocks);
}

}  // namespace aligner

ALIGNER_CUDA_KERNEL(value_loss, ValueLossParams)
