// Source: see whiten.h. The moments are taken in one reading of x: each thread sums deviations from the first value it
// meets, which is near enough the mean for doubles to lose nothing, and pairs of moments are merged as in Chan et al.
#include "cuda_kernel.cuh"
#include "whiten.h"

namespace aligner {
namespace {

struct Moments {
  double count, mean, deviation;  // deviation: sum of squared deviations from the mean
};

struct MergeMoments {
  __device__ Moments operator()(const Moments& a, const Moments& b) const {
    const double count = a.count + b.count;
    if (count == 0) return a;
    const double delta = b.mean - a.mean, share = b.count / count;
    return {count, a.mean + delta * share, a.deviation + b.deviation + delta * delta * a.count * share};
  }
};

__global__ void whiten_moments_parts(WhitenMomentsParams p, double* workspace) {
  double first = 0, count = 0, sum = 0, square = 0;
  for_each_token(p.count, [&](int64_t i) {
    const bool takes_part = load(p.mask + i);
    const double x = load(p.x + i);
    if (!takes_part) return;
    if (count == 0) first = x;
    count += 1;
    sum += x - first;
    square += (x - first) * (x - first);
  });
  const Moments mine{count, count > 0 ? first + sum / count : 0.0, count > 0 ? square - sum * sum / count : 0.0};
  const Moments all = block_reduce(mine, Moments{0, 0, 0}, MergeMoments{});
  if (threadIdx.x == 0) {
    store(workspace + blockIdx.x, all.count);
    store(workspace + gridDim.x + blockIdx.x, all.mean);
    store(workspace + 2 * gridDim.x + blockIdx.x, all.deviation);
  }
}

__global__ void whiten_moments_merge(WhitenMomentsParams p, const double* workspace, int blocks) {
  Moments mine{0, 0, 0};
  for (int block = threadIdx.x; block < blocks; block += blockDim.x) {
    const Moments part{load(workspace + block), load(workspace + blocks + block), load(workspace + 2 * blocks + block)};
    mine = MergeMoments{}(mine, part);
  }
  const Moments all = block_reduce(mine, Moments{0, 0, 0}, MergeMoments{});
  if (threadIdx.x == 0) {
    store(p.moments, all.count);
    store(p.moments + 1, all.mean);
    store(p.moments + 2, all.deviation);
  }
}

__global__ void whiten_apply_tokens(WhitenApplyParams p) {
  ALIGNER_SHARED(double, shift_and_scale, 2);
  if (threadIdx.x == 0) {
    const double count = load(p.moments);
    shift_and_scale[0] = load(p.moments + 1);
    shift_and_scale[1] = count > 0 ? 1.0 / sqrt(load(p.moments + 2) / count + 1e-8) : 0.0;
  }
  __syncthreads();
  const double shift = shift_and_scale[0], scale = shift_and_scale[1];
  for_each_token(p.count, [&](int64_t i) {
    const bool takes_part = load(p.mask + i);
    const float x = load(p.x + i);
    store(p.y + i, takes_part ? float((x - shift) * scale) : 0.f);
  });
}

}  // namespace

static void whiten_moments(const WhitenMomentsParams& p, double* workspace, cudaStream_t stream) {
  const int blocks = token_blocks(p.count);
  ALIGNER_LAUNCH(whiten_moments_parts, blocks, TOKEN_BLOCK, stream, p, workspace);
  ALIGNER_LAUNCH(whiten_moments_merge, 1, TOKEN_BLOCK, stream, p, workspace, blocks);
}

static void whiten_apply(const WhitenApplyParams& p, double*, cudaStream_t stream) {
  ALIGNER_LAUNCH(whiten_apply_tokens, token_blocks(p.count), TOKEN_BLOCK, stream, p);
}

}  // namespace aligner

ALIGNER_CUDA_KERNEL(whiten_moments, WhitenMomentsParams)
ALIGNER_CUDA_KERNEL(whiten_apply, WhitenApplyParams)
