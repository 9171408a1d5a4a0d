// Source: see group_advantages.h. One warp takes the groups that begin in its 32 responses, one after another.
#include "cuda_kernel.cuh"
#include "group_advantages.h"

namespace aligner {
namespace {

constexpr int WARPS = 4;  // of a block

// The first response after `begin` that is of another group.
__device__ __forceinline__ int64_t end_of_group(const GroupAdvantagesParams& p, int64_t begin, int lane) {
  const int64_t group = load(p.groups + begin);
  for (int64_t first = begin;; first += WARP) {
    const bool same = first + lane < p.count && load(p.groups + first + lane) == group;
    const unsigned others = ~__ballot_sync(ALL_LANES, same);
    if (others) return first + __ffs(int(others)) - 1;
  }
}

__device__ __forceinline__ void one_group(const GroupAdvantagesParams& p, int64_t begin, int lane) {
  const int64_t end = end_of_group(p, begin, lane), n = end - begin;
  double sum = 0, squares = 0;
  for (int64_t i = begin + lane; i < end; i += WARP) sum += load(p.rewards + i);
  const double mean = warp_reduce(sum, Add{}) / double(n);
  for (int64_t i = begin + lane; i < end; i += WARP) {
    const double distance = load(p.rewards + i) - mean;
    squares += distance * distance;
  }
  squares = warp_reduce(squares, Add{});
  double scale = 1;
  if (p.kind == GroupAdvantage::grpo) scale = n > 1 ? 1 / (sqrt(squares / double(n - 1)) + 1e-6) : 0;
  if (p.kind == GroupAdvantage::rloo) scale = n > 1 ? double(n) / double(n - 1) : 0;
  for (int64_t i = begin + lane; i < end; i += WARP) {
    store(p.advantages + i, float((load(p.rewards + i) - mean) * scale));
  }
}

__global__ void __launch_bounds__(WARPS* WARP) group_advantages_groups(GroupAdvantagesParams p) {
  const int lane = threadIdx.x % WARP;
  const int64_t first = (int64_t(blockIdx.x) * WARPS + threadIdx.x / WARP) * WARP, i = first + lane;
  const bool begins = i < p.count && (i == 0 || load(p.groups + i - 1) != load(p.groups + i));
  for (unsigned rest = __ballot_sync(ALL_LANES, begins); rest; rest &= rest - 1) {
    one_group(p, first + __ffs(int(rest)) - 1, lane);
  }
}

}  // namespace

static void group_advantages(const GroupAdvantagesParams& p, double*, cudaStream_t stream) {
  if (p.count == 0) return;
  ALIGNER_LAUNCH(group_advantages_groups, (p.count + WARPS * WARP - 1) / (WARPS * WARP), WARPS * WARP, stream, p);
}

}  // namespace aligner

ALIGNER_CUDA_KERNEL(group_advantages, GroupAdvantagesParams)
