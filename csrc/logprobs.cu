// Source: see logprobs.h. Forward: one block reads one row once. Backward: a row is spread over blocks.
#include "cuda_kernel.cuh"
#include "logprobs.h"
#include "softmax_row.cuh"

namespace aligner {
namespace {

constexpr int ROW_BLOCK = 512;              // threads at most
constexpr int64_t GRADIENT_PART = 1 << 14;  // elements of a row for one block of the backward kernel

template <class T>
__global__ void __launch_bounds__(ROW_BLOCK) logprobs_row(LogprobsParams p) {
  const int64_t n = blockIdx.x;
  const T* row = static_cast<const T*>(p.logits) + n * p.row_stride;
  const RowStats s = block_row_stats(row, p.columns, p.inverse_temperature);
  if (threadIdx.x != 0) return;
  const double log_sum = log(s.sum);
  const int64_t target = load(p.targets + n) - p.vocab_start;
  double logprob = 0;
  if (target >= 0 && target < p.columns) {
    logprob = (double(to_float(load(row + target))) - s.max) * p.inverse_temperature - log_sum;
  }
  store(p.logprobs + n, float(logprob));
  store(p.entropy + n, float(row_entropy(s)));
  store(p.max + n, s.max);
  store(p.log_sum + n, float(log_sum));
}

template <class T>
__global__ void __launch_bounds__(ROW_BLOCK) logprobs_gradient(LogprobsBackwardParams p, int blocks_per_row) {
  const int64_t n = blockIdx.x / blocks_per_row;
  const int part = blockIdx.x % blocks_per_row;
  const RowGradient gradient{load(p.max + n),
                             load(p.log_sum + n),
                             load(p.entropy + n),
                             p.d_logprobs ? load(p.d_logprobs + n) : 0.f,
                             p.d_entropy ? load(p.d_entropy + n) : 0.f,
                             p.inverse_temperature,
                             load(p.targets + n) - p.vocab_start};
  const T* row = static_cast<const T*>(p.logits) + n * p.row_stride;
  T* dx = static_cast<T*>(p.d_logits) + n * p.d_row_stride;
  if (gradient.d_logprob == 0.f && gradient.d_entropy == 0.f) {
    block_row_zero(dx, p.columns, part, blocks_per_row);
  } else {
    block_row_gradient(row, dx, p.columns, gradient, part, blocks_per_row);
  }
}

template <class T>
void launch_forward(const LogprobsParams& p, cudaStream_t stream) {
  ALIGNER_LAUNCH(logprobs_row<T>, p.rows, row_threads(p.columns, p.dtype, ROW_BLOCK), stream, p);
}

template <class T>
void launch_backward(const LogprobsBackwardParams& p, cudaStream_t stream) {
  const int blocks = int((p.columns + GRADIENT_PART - 1) / GRADIENT_PART);
  ALIGNER_LAUNCH(logprobs_gradient<T>, p.rows * blocks, row_threads(p.columns, p.dtype, ROW_BLOCK), stream, p, blocks);
}

}  // namespace

static void logprobs(const LogprobsParams& p, double*, cudaStream_t stream) {
  if (p.rows == 0) return;
  with_dtype(p.dtype, [&](auto zero) { launch_forward<decltype(zero)>(p, stream); });
}

static void logprobs_backward(const LogprobsBackwardParams& p, double*, cudaStream_t stream) {
  if (p.rows == 0 || p.columns == 0) return;
  with_dtype(p.dtype, [&](auto zero) { launch_backward<decltype(zero)>(p, stream); });
}

}  // namespace aligner

ALIGNER_CUDA_KERNEL(logprobs, LogprobsParams)
ALIGNER_CUDA_KERNEL(logprobs_backward, LogprobsBackwardParams)
