// Source: see group_advantages.h. A block keeps a window of responses in shared memory, so that each is read and
// written once; a warp takes the groups that begin in its part of the window, one after another.
#include "cuda_kernel.cuh"
#include "group_advantages.h"

namespace aligner {
namespace {

constexpr int WARPS = 8;              // of a block
constexpr int PART = 128;             // responses of a warp
constexpr int WINDOW = WARPS * PART;  // responses of a block
constexpr int GROUP_THREADS = WARPS * WARP;

// The block's responses [begin, end). What a group has beyond them stays in global memory.
struct Window {
  const GroupAdvantagesParams& p;
  int64_t begin, end;
  int64_t* groups;
  float* values;  // rewards, then advantages

  __device__ __forceinline__ int64_t group(int64_t i) const {
    return i >= begin && i < end ? groups[i - begin] : load(p.groups + i);
  }
  __device__ __forceinline__ float reward(int64_t i) const { return i < end ? values[i - begin] : load(p.rewards + i); }
  __device__ __forceinline__ void advantage(int64_t i, float x) const {
    if (i < end) {
      values[i - begin] = x;
    } else {
      store(p.advantages + i, x);
    }
  }
};

// The first response after `begin` that is of another group.
__device__ __forceinline__ int64_t end_of_group(const Window& w, int64_t begin, int lane) {
  const int64_t group = w.group(begin);
  for (int64_t first = begin;; first += WARP) {
    const bool same = first + lane < w.p.count && w.group(first + lane) == group;
    const unsigned others = ~__ballot_sync(ALL_LANES, same);
    if (others) return first + __ffs(int(others)) - 1;
  }
}

__device__ __forceinline__ void one_group(const Window& w, int64_t begin, int lane) {
  const int64_t end = end_of_group(w, begin, lane), n = end - begin;
  double sum = 0, squares = 0;
  // Most groups take one round of these loops: unrolled they only cost registers.
#pragma unroll 1
  for (int64_t i = begin + lane; i < end; i += WARP) sum += w.reward(i);
  const double mean = warp_reduce(sum, Add{}) / double(n);
#pragma unroll 1
  for (int64_t i = begin + lane; i < end; i += WARP) {
    const double distance = w.reward(i) - mean;
    squares += distance * distance;
  }
  squares = warp_reduce(squares, Add{});
  double scale = 1;
  if (w.p.kind != GroupAdvantage::dr_grpo) {
    const bool grpo = w.p.kind == GroupAdvantage::grpo;
    scale = n > 1 ? (grpo ? 1.0 : double(n)) / (grpo ? sqrt(squares / double(n - 1)) + 1e-6 : double(n - 1)) : 0;
  }
#pragma unroll 1
  for (int64_t i = begin + lane; i < end; i += WARP) w.advantage(i, float((w.reward(i) - mean) * scale));
}

// The groups that begin in a warp's part; returns where the first of them does, or the window's end.
__device__ __forceinline__ int64_t groups_of_warp(const Window& w, int lane) {
  int64_t earliest = w.end;
  const int64_t part = w.begin + threadIdx.x / WARP * PART;
  for (int64_t first = part; first < part + PART && first < w.end; first += WARP) {
    const int64_t i = first + lane;
    const bool begins = i < w.end && (i == 0 || w.group(i - 1) != w.group(i));
    for (unsigned rest = __ballot_sync(ALL_LANES, begins); rest; rest &= rest - 1) {
      const int64_t begin = first + __ffs(int(rest)) - 1;
      earliest = begin < earliest ? begin : earliest;
      one_group(w, begin, lane);
    }
  }
  return earliest;
}

__global__ void __launch_bounds__(GROUP_THREADS) group_advantages_groups(GroupAdvantagesParams p) {
  ALIGNER_SHARED(int64_t, groups, WINDOW);
  ALIGNER_SHARED(float, values, WINDOW);
  ALIGNER_SHARED(int64_t, earliest, WARPS);
  const int64_t begin = int64_t(blockIdx.x) * WINDOW;
  const Window w{p, begin, begin + WINDOW < p.count ? begin + WINDOW : p.count, groups, values};
  for (int64_t i = begin + threadIdx.x; i < w.end; i += GROUP_THREADS) {
    groups[i - begin] = load(p.groups + i);
    values[i - begin] = load(p.rewards + i);
  }
  __syncthreads();
  const int lane = threadIdx.x % WARP;
  const int64_t of_warp = groups_of_warp(w, lane);
  if (lane == 0) earliest[threadIdx.x / WARP] = of_warp;
  __syncthreads();
  int64_t mine = w.end;  // what comes before belongs to a group of an earlier block
  for (int warp = 0; warp < WARPS; ++warp) mine = earliest[warp] < mine ? earliest[warp] : mine;
  for (int64_t i = begin + threadIdx.x; i < w.end; i += GROUP_THREADS) {
    store_if(i >= mine, p.advantages + i, values[i - begin]);
  }
}

}  // namespace

static void group_advantages(const GroupAdvantagesParams& p, double*, cudaStream_t stream) {
  if (p.count == 0) return;
  ALIGNER_LAUNCH(group_advantages_groups, (p.count + WINDOW - 1) / WINDOW, GROUP_THREADS, stream, p);
}

}  // namespace aligner

ALIGNER_CUDA_KERNEL(group_advantages, GroupAdvantagesParams)
