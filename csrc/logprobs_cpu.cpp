#include "logprobs.h"
#include "parallel.h"
#include "softmax_row.h"

namespace aligner::ALIGNER_ISA {

constexpr int64_t BLOCK = 2048;  // elements; a block stays in L1 for its second reading

template <class D>
static void forward_rows(const LogprobsParams& p, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const auto* x = static_cast<const typename D::T*>(p.logits) + n * p.row_stride;
    RowStats s;
    for (int64_t v = 0; v < p.columns; v += BLOCK) {
      update_row<D>(s, x + v, smaller(BLOCK, p.columns - v), p.inverse_temperature);
    }
    finish_row(s, p.inverse_temperature);
    const double log_sum = ::log(s.sum);
    const int64_t t = p.targets[n] - p.vocab_start;
    const bool here = t >= 0 && t < p.columns;
    p.logprobs[n] = here ? float((double(D::get(x + t)) - s.max) * p.inverse_temperature - log_sum) : 0.f;
    p.entropy[n] = float(row_entropy(s));
    p.max[n] = s.max;
    p.log_sum[n] = float(log_sum);
  }
}

template <class D>
static void backward_rows(const LogprobsBackwardParams& p, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const RowGradient g{p.max[n],
                        p.log_sum[n],
                        p.entropy[n],
                        p.d_logprobs ? p.d_logprobs[n] : 0.f,
                        p.d_entropy ? p.d_entropy[n] : 0.f,
                        p.inverse_temperature,
                        p.targets[n] - p.vocab_start};
    const auto* x = static_cast<const typename D::T*>(p.logits) + n * p.row_stride;
    auto* dx = static_cast<typename D::T*>(p.d_logits) + n * p.d_row_stride;
    if (g.d_logprob == 0.f && g.d_entropy == 0.f) {
      memset(dx, 0, p.columns * sizeof *dx);
    } else {
      gradient_row<D>(g, x, dx, p.columns);
    }
  }
}

void logprobs_cpu(const LogprobsParams& p) {
  parallel_parts(p.rows, 1, [&](int64_t begin, int64_t end, int) {
    with_dtype(p.dtype, [&](auto d) { forward_rows<decltype(d)>(p, begin, end); });
  });
}

void logprobs_backward_cpu(const LogprobsBackwardParams& p) {
  parallel_parts(p.rows, 1, [&](int64_t begin, int64_t end, int) {
    with_dtype(p.dtype, [&](auto d) { backward_rows<decltype(d)>(p, begin, end); });
  });
}

}  // namespace aligner::ALIGNER_ISA
