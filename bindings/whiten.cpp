#include "whiten.h"

#include "checks.h"

namespace aligner {
namespace {

Tensor whiten_moments(const Tensor& x_, const Tensor& mask_) {
  const Call call("whiten", x_);
  const int64_t N = x_.numel();
  const Tensor x = checked(call, "x", x_, ScalarType::Float, {N});
  const Tensor mask = checked(call, "mask", mask_, ScalarType::Bool, {N});
  Tensor moments = torch::stable::new_empty(x, {3}, ScalarType::Double);
  run<WhitenMomentsParams>(call, whiten_moments_cpu, "whiten_moments",
                           {data<float>(x), data<bool>(mask), out<double>(moments), N});
  return moments;
}

Tensor whiten_apply(const Tensor& x_, const Tensor& mask_, const Tensor& moments_) {
  const Call call("whiten", x_);
  const int64_t N = x_.numel();
  const Tensor x = checked(call, "x", x_, ScalarType::Float, {N});
  const Tensor mask = checked(call, "mask", mask_, ScalarType::Bool, {N});
  const Tensor moments = checked(call, "moments", moments_, ScalarType::Double, {3});
  Tensor y = new_float(x, {N});
  run<WhitenApplyParams>(call, whiten_apply_cpu, "whiten_apply",
                         {data<float>(x), data<bool>(mask), data<double>(moments), out<float>(y), N});
  return y;
}

}  // namespace
}  // namespace aligner

STABLE_TORCH_LIBRARY_FRAGMENT(aligner, m) {
  m.def("whiten_moments(Tensor x, Tensor mask) -> Tensor");
  m.def("whiten_apply(Tensor x, Tensor mask, Tensor moments) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(aligner, CompositeExplicitAutograd, m) {
  m.impl("whiten_moments", TORCH_BOX(&aligner::whiten_moments));
  m.impl("whiten_apply", TORCH_BOX(&aligner::whiten_apply));
}
