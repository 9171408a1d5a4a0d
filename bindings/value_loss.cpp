#include "value_loss.h"

#include <limits>

#include "checks.h"

namespace aligner {
namespace {

std::tuple<Tensor, Tensor, Tensor> value_loss(const Tensor& values_, const Tensor& old_values_, const Tensor& returns_,
                                              const Tensor& mask, double num_tokens, std::optional<double> clip,
                                              std::optional<double> huber) {
  const Call call("value_loss", values_);
  constexpr float infinity = std::numeric_limits<float>::infinity();
  const int64_t N = values_.numel();
  const Tensor values = checked(call, "values", values_, ScalarType::Float, {N});
  const Tensor old_values = checked(call, "old_values", old_values_, ScalarType::Float, {N});
  const Tensor returns = checked(call, "returns", returns_, ScalarType::Float, {N});
  const TokenWeights weights = checked_weights(call, mask, N);
  Tensor loss = new_float(values, {}), stats = new_float(values, {4}), d_values = new_float(values, {N});
  run<ValueLossParams>(call, value_loss_cpu, "value_loss",
                       {data<float>(values), data<float>(old_values), data<float>(returns), weights.mask,
                        weights.weights, out<float>(d_values), out<float>(loss), out<float>(stats), N, num_tokens,
                        clip ? float(*clip) : infinity, huber ? float(*huber) : infinity});
  return {loss, stats, d_values};
}

}  // namespace
}  // namespace aligner

STABLE_TORCH_LIBRARY_FRAGMENT(aligner, m) {
  m.def(
      "value_loss(Tensor values, Tensor old_values, Tensor returns, Tensor mask, float num_tokens, float? clip,"
      " float? huber) -> (Tensor loss, Tensor stats, Tensor d_values)");
}
STABLE_TORCH_LIBRARY_IMPL(aligner, CompositeExplicitAutograd, m) {
  m.impl("value_loss", TORCH_BOX(&aligner::value_loss));
}
