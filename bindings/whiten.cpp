#include "whiten.h"

#include "checks.h"

namespace aligner {
namespace {

Tensor whiten_moments(const Tensor& x_, const Tensor& mask_) {
  const int64_t N = x_.numel();
  const Tensor x = checked("whiten", "x", x_, ScalarType::Float, {N});
  const Tensor mask = checked("whiten", "mask", mask_, ScalarType::Bool, {N});
  Tensor moments = torch::stable::new_empty(x, {3}, ScalarType::Double);
  whiten_moments_cpu({data<float>(x), data<bool>(mask), out<double>(moments), N});
  return moments;
}

Tensor whiten_apply(const Tensor& x_, const Tensor& mask_, const Tensor& moments_) {
  const int64_t N = x_.numel();
  const Tensor x = checked("whiten", "x", x_, ScalarType::Float, {N});
  const Tensor mask = checked("whiten", "mask", mask_, ScalarType::Bool, {N});
  const Tensor moments = checked("whiten", "moments", moments_, ScalarType::Double, {3});
  Tensor y = new_float(x, {N});
  whiten_apply_cpu({data<float>(x), data<bool>(mask), data<double>(moments), out<float>(y), N});
  return y;
}

}  // namespace
}  // namespace aligner

STABLE_TORCH_LIBRARY_FRAGMENT(aligner, m) {
  m.def("whiten_moments(Tensor x, Tensor mask) -> Tensor");
  m.def("whiten_apply(Tensor x, Tensor mask, Tensor moments) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(aligner, CPU, m) {
  m.impl("whiten_moments", TORCH_BOX(&aligner::whiten_moments));
  m.impl("whiten_apply", TORCH_BOX(&aligner::whiten_apply));
}
