#include "policy_loss.h"

#include <limits>

#include "checks.h"

namespace aligner {
namespace {

KlEstimator checked_kl(const Call& call, const std::string& kl) {
  STD_TORCH_CHECK(kl == "k1" || kl == "k2" || kl == "k3", call.op, ": kl must be k1, k2 or k3, got ", kl);
  return kl == "k1" ? KlEstimator::k1 : kl == "k2" ? KlEstimator::k2 : KlEstimator::k3;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> policy_loss(
    const Tensor& logprobs_, const Tensor& old_logprobs_, const Tensor& advantages_, const Tensor& mask,
    const std::optional<Tensor>& importance_, const std::optional<Tensor>& ref_logprobs_,
    const std::optional<Tensor>& entropy_, double num_tokens, double clip_low, double clip_high,
    std::optional<double> dual_clip, double entropy_coef, double kl_coef, std::string kl) {
  const Call call("policy_loss", logprobs_);
  const int64_t N = logprobs_.numel();
  const Tensor logprobs = checked(call, "logprobs", logprobs_, ScalarType::Float, {N});
  const Tensor old_logprobs = checked(call, "old_logprobs", old_logprobs_, ScalarType::Float, {N});
  const Tensor advantages = checked(call, "advantages", advantages_, ScalarType::Float, {N});
  const TokenWeights weights = checked_weights(call, mask, N);
  const auto importance = checked_optional(call, "importance", importance_, ScalarType::Float, {N});
  const auto ref_logprobs = checked_optional(call, "ref_logprobs", ref_logprobs_, ScalarType::Float, {N});
  const auto entropy = checked_optional(call, "entropy", entropy_, ScalarType::Float, {N});
  Tensor loss = new_float(logprobs, {}), stats = new_float(logprobs, {8}), d_logprobs = new_float(logprobs, {N});
  Tensor d_entropy = new_float(logprobs, {entropy && entropy_coef != 0 ? N : 0});
  run<PolicyLossParams>(call, policy_loss_cpu, "policy_loss",
                        {data<float>(logprobs),
                         data<float>(old_logprobs),
                         data<float>(advantages),
                         weights.mask,
                         weights.weights,
                         data_or_null(importance),
                         data_or_null(ref_logprobs),
                         data_or_null(entropy),
                         out<float>(d_logprobs),
                         d_entropy.numel() ? out<float>(d_entropy) : nullptr,
                         out<float>(loss),
                         out<float>(stats),
                         N,
                         num_tokens,
                         float(clip_low),
                         float(clip_high),
                         dual_clip ? float(*dual_clip) : std::numeric_limits<float>::infinity(),
                         float(entropy_coef),
                         float(kl_coef),
                         checked_kl(call, kl)});
  return {loss, stats, d_logprobs, d_entropy};
}

}  // namespace
}  // namespace aligner

STABLE_TORCH_LIBRARY_FRAGMENT(aligner, m) {
  m.def(
      "policy_loss(Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor mask, Tensor? importance,"
      " Tensor? ref_logprobs, Tensor? entropy, float num_tokens, float clip_low, float clip_high, float? dual_clip,"
      " float entropy_coef, float kl_coef, str kl) -> (Tensor loss, Tensor stats, Tensor d_logprobs, Tensor "
      "d_entropy)");
}
STABLE_TORCH_LIBRARY_IMPL(aligner, CompositeExplicitAutograd, m) {
  m.impl("policy_loss", TORCH_BOX(&aligner::policy_loss));
}
