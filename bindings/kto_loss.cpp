#include "kto_loss.h"

#include "checks.h"

namespace aligner {
namespace {

std::tuple<Tensor, Tensor, Tensor> kto_loss(const Tensor& policy_, const Tensor& ref_, const Tensor& desirable_,
                                            const Tensor& kl_, double num_responses, double beta,
                                            double desirable_weight, double undesirable_weight) {
  const Call call("kto_loss", policy_);
  const int64_t B = policy_.numel();
  const Tensor policy = checked(call, "policy", policy_, ScalarType::Float, {B});
  const Tensor ref = checked(call, "ref", ref_, ScalarType::Float, {B});
  const Tensor desirable = checked(call, "desirable", desirable_, ScalarType::Bool, {B});
  const Tensor kl = checked(call, "kl", kl_, ScalarType::Float, {});
  Tensor loss = new_float(policy, {}), stats = new_float(policy, {4}), d_policy = new_float(policy, {B});
  run<KtoLossParams>(call, kto_loss_cpu, "kto_loss",
                     {data<float>(policy), data<float>(ref), data<bool>(desirable), data<float>(kl),
                      out<float>(d_policy), out<float>(loss), out<float>(stats), B, num_responses, float(beta),
                      float(desirable_weight), float(undesirable_weight)});
  return {loss, stats, d_policy};
}

}  // namespace
}  // namespace aligner

STABLE_TORCH_LIBRARY_FRAGMENT(aligner, m) {
  m.def(
      "kto_loss(Tensor policy, Tensor ref, Tensor desirable, Tensor kl, float num_responses, float beta,"
      " float desirable_weight, float undesirable_weight) -> (Tensor loss, Tensor stats, Tensor d_policy)");
}
STABLE_TORCH_LIBRARY_IMPL(aligner, CompositeExplicitAutograd, m) { m.impl("kto_loss", TORCH_BOX(&aligner::kto_loss)); }
