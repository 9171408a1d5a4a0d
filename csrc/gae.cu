// Source: see gae.h. The recurrence A_t = delta_t + decay A_next is a scan of the maps A -> b + a A from the last token
// to the first: Blelloch 1990, "Prefix sums and their applications", section 1.4. One warp takes one sequence, 32
// tokens at a time, a token that is not an action being the identity.
#include "cuda_kernel.cuh"
#include "gae.h"

namespace aligner {
namespace {

constexpr int WARPS = 4;  // of a block, each with its own sequence

struct Token {
  float reward, value;
  bool is_action;
};

__device__ __forceinline__ Token load_token(const GaeParams& p, int64_t t, int64_t begin, int64_t end) {
  const bool inside = t >= begin && t < end;
  return {load_if(inside, p.rewards + t, 0.f), load_if(inside, p.values + t, 0.f),
          load_if(inside, p.action_mask + t, false)};
}

__global__ void __launch_bounds__(WARPS* WARP) gae_sequences(GaeParams p) {
  const int lane = threadIdx.x % WARP;
  const int64_t sequence = int64_t(blockIdx.x) * WARPS + threadIdx.x / WARP;
  if (sequence >= p.num_sequences) return;
  const int64_t begin = load(p.cu_seqlens + sequence), end = load(p.cu_seqlens + sequence + 1);
  // Windows lie on multiples of 32 tokens so that each is whole sectors of memory; lane 0 holds the last token.
  int64_t t = (end + WARP - 1) / WARP * WARP - 1 - lane;
  double next_advantage = 0, next_value = 0;  // of the first action after the window
  Token next = load_token(p, t, begin, end);
  for (; t + lane >= begin; t -= WARP) {
    const Token token = next;
    next = load_token(p, t - WARP, begin, end);  // in flight while this window is scanned
    const unsigned actions = __ballot_sync(ALL_LANES, token.is_action);
    const unsigned later = actions & ((1u << lane) - 1);  // actions after this token
    const int follower = later ? 31 - __clz(later) : 0;
    const double follower_value = __shfl_sync(ALL_LANES, double(token.value), follower);
    const double value_after = later ? follower_value : next_value;
    double a = token.is_action ? p.gamma * p.lam : 1.0;
    double b = token.is_action ? token.reward + p.gamma * value_after - token.value : 0.0;
#pragma unroll
    for (int distance = 1; distance < WARP; distance *= 2) {
      const double a_after = __shfl_up_sync(ALL_LANES, a, distance), b_after = __shfl_up_sync(ALL_LANES, b, distance);
      if (lane < distance) continue;
      b += a * b_after;
      a *= a_after;
    }
    const double advantage = b + a * next_advantage;
    const bool inside = t >= begin && t < end;
    store_if(inside, p.advantages + t, token.is_action ? float(advantage) : 0.f);
    store_if(inside, p.returns + t, token.is_action ? float(advantage + token.value) : 0.f);
    next_advantage = __shfl_sync(ALL_LANES, advantage, WARP - 1);
    const int first = actions ? 31 - __clz(actions) : 0;
    const double first_value = __shfl_sync(ALL_LANES, double(token.value), first);
    if (actions) next_value = first_value;
  }
}

}  // namespace

static void gae(const GaeParams& p, double*, cudaStream_t stream) {
  if (p.num_sequences == 0) return;
  ALIGNER_LAUNCH(gae_sequences, (p.num_sequences + WARPS - 1) / WARPS, WARPS * WARP, stream, p);
}

}  // namespace aligner

ALIGNER_CUDA_KERNEL(gae, GaeParams)
