// Source: see segment_sum.h. One warp takes one sequence.
#include "cuda_kernel.cuh"
#include "segment_sum.h"

namespace aligner {
namespace {

constexpr int WARPS = 4;  // of a block

struct Sequence {
  int64_t number, begin, end;
};
// The sequence of this warp; none is left where its number is num_sequences or more.
__device__ __forceinline__ Sequence sequence_of_warp(const int32_t* cu_seqlens, int64_t num_sequences) {
  const int64_t b = int64_t(blockIdx.x) * WARPS + threadIdx.x / WARP;
  if (b >= num_sequences) return {b, 0, 0};
  return {b, load(cu_seqlens + b), load(cu_seqlens + b + 1)};
}

// body(t, inside) for the tokens of this lane. Lanes lie on multiples of 32 tokens, so that a warp reads whole sectors
// of memory wherever the sequence begins; `inside` is false for those before it.
template <class Body>
__device__ __forceinline__ void for_each_of(const Sequence& s, const Body& body) {
  const int64_t first = s.begin / WARP * WARP;
  for (int64_t t = first + threadIdx.x % WARP; t < s.end; t += WARP) body(t, t >= s.begin);
}

__global__ void __launch_bounds__(WARPS* WARP) segment_sums(SegmentSumParams p) {
  const Sequence s = sequence_of_warp(p.cu_seqlens, p.num_sequences);
  double sum = 0, tokens = 0;
  for_each_of(s, [&](int64_t t, bool inside) {
    const bool counts = p.mask ? load_if(inside, p.mask + t, false) : inside;
    const float x = load_if(inside, p.x + t, 0.f);
    sum += counts ? x : 0.f;
    tokens += counts ? 1 : 0;
  });
  sum = warp_reduce(sum, Add{});
  tokens = warp_reduce(tokens, Add{});
  if (threadIdx.x % WARP != 0 || s.number >= p.num_sequences) return;
  store(p.result + s.number, float(p.mean && tokens > 1 ? sum / tokens : sum));
}

__global__ void __launch_bounds__(WARPS* WARP) segment_sum_spread(SegmentSumBackwardParams p) {
  const Sequence s = sequence_of_warp(p.cu_seqlens, p.num_sequences);
  double tokens = double(s.end - s.begin);
  if (p.mean && p.mask) {
    tokens = 0;
    for_each_of(s, [&](int64_t t, bool inside) { tokens += load_if(inside, p.mask + t, false) ? 1 : 0; });
    tokens = warp_reduce(tokens, Add{});
  }
  if (s.number >= p.num_sequences) return;
  const float d_result = load(p.d_result + s.number);
  const float d = p.mean && tokens > 1 ? float(d_result / tokens) : d_result;
  for_each_of(s, [&](int64_t t, bool inside) {
    const bool counts = !p.mask || load_if(inside, p.mask + t, false);
    store_if(inside, p.d_x + t, counts ? d : 0.f);
  });
}

int blocks_of(int64_t num_sequences) { return int((num_sequences + WARPS - 1) / WARPS); }

}  // namespace

static void segment_sum(const SegmentSumParams& p, double*, cudaStream_t stream) {
  if (p.num_sequences == 0) return;
  ALIGNER_LAUNCH(segment_sums, blocks_of(p.num_sequences), WARPS * WARP, stream, p);
}

static void segment_sum_backward(const SegmentSumBackwardParams& p, double*, cudaStream_t stream) {
  if (p.num_sequences == 0) return;
  ALIGNER_LAUNCH(segment_sum_spread, blocks_of(p.num_sequences), WARPS * WARP, stream, p);
}

}  // namespace aligner

ALIGNER_CUDA_KERNEL(segment_sum, SegmentSumParams)
ALIGNER_CUDA_KERNEL(segment_sum_backward, SegmentSumBackwardParams)
