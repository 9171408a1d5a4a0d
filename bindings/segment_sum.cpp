#include "segment_sum.h"

#include "checks.h"

namespace aligner {
namespace {

const char* const OP = "segment_sum";

Tensor segment_sum(const Tensor& x_, const std::optional<Tensor>& mask_, const Tensor& cu_seqlens_, bool mean) {
  const Call call(OP, x_);
  const int64_t N = x_.numel();
  const Tensor x = checked(call, "x", x_, ScalarType::Float, {N});
  const auto mask = checked_optional(call, "mask", mask_, ScalarType::Bool, {N});
  const Tensor cu_seqlens = checked_cu_seqlens(call, cu_seqlens_, N);
  const int64_t B = cu_seqlens.numel() - 1;
  Tensor result = new_float(x, {B});
  run<SegmentSumParams>(
      call, segment_sum_cpu, "segment_sum",
      {data<float>(x), mask ? data<bool>(*mask) : nullptr, data<int32_t>(cu_seqlens), out<float>(result), B, mean});
  return result;
}

Tensor segment_sum_backward(const Tensor& d_result_, const std::optional<Tensor>& mask_, const Tensor& cu_seqlens_,
                            int64_t N, bool mean) {
  const Call call(OP, d_result_);
  const int64_t B = cu_seqlens_.numel() - 1;
  const Tensor d_result = checked(call, "d_result", d_result_, ScalarType::Float, {B});
  const auto mask = checked_optional(call, "mask", mask_, ScalarType::Bool, {N});
  const Tensor cu_seqlens = checked_cu_seqlens(call, cu_seqlens_, N);
  Tensor d_x = new_float(d_result, {N});
  run<SegmentSumBackwardParams>(
      call, segment_sum_backward_cpu, "segment_sum_backward",
      {data<float>(d_result), mask ? data<bool>(*mask) : nullptr, data<int32_t>(cu_seqlens), out<float>(d_x), B, mean});
  return d_x;
}

}  // namespace
}  // namespace aligner

STABLE_TORCH_LIBRARY_FRAGMENT(aligner, m) {
  m.def("segment_sum(Tensor x, Tensor? mask, Tensor cu_seqlens, bool mean) -> Tensor");
  m.def("segment_sum_backward(Tensor d_result, Tensor? mask, Tensor cu_seqlens, SymInt tokens, bool mean) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(aligner, CompositeExplicitAutograd, m) {
  m.impl("segment_sum", TORCH_BOX(&aligner::segment_sum));
  m.impl("segment_sum_backward", TORCH_BOX(&aligner::segment_sum_backward));
}
