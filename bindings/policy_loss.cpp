#include "policy_loss.h"

#include <limits>

#include "checks.h"

namespace aligner {
namespace {

std::tuple<Tensor, Tensor, Tensor> policy_loss(const Tensor& logprobs_, const Tensor& old_logprobs_,
                                               const Tensor& advantages_, const Tensor& mask,
                                               const std::optional<Tensor>& entropy_, double num_tokens,
                                               double clip_low, double clip_high, std::optional<double> dual_clip,
                                               double entropy_coef) {
  const char* op = "policy_loss";
  const int64_t N = logprobs_.numel();
  const Tensor logprobs = checked(op, "logprobs", logprobs_, ScalarType::Float, {N});
  const Tensor old_logprobs = checked(op, "old_logprobs", old_logprobs_, ScalarType::Float, {N});
  const Tensor advantages = checked(op, "advantages", advantages_, ScalarType::Float, {N});
  const TokenWeights weights = checked_weights(op, mask, N);
  std::optional<Tensor> entropy;
  if (entropy_) entropy = checked(op, "entropy", *entropy_, ScalarType::Float, {N});
  Tensor loss = new_float(logprobs, {}), stats = new_float(logprobs, {6}), d_logprobs = new_float(logprobs, {N});
  policy_loss_cpu({data<float>(logprobs), data<float>(old_logprobs), data<float>(advantages), weights.mask,
                   weights.weights, entropy ? data<float>(*entropy) : nullptr, out<float>(d_logprobs), out<float>(loss),
                   out<float>(stats), N, num_tokens, float(clip_low), float(clip_high),
                   dual_clip ? float(*dual_clip) : std::numeric_limits<float>::infinity(), float(entropy_coef)});
  return {loss, stats, d_logprobs};
}

}  // namespace
}  // namespace aligner

STABLE_TORCH_LIBRARY_FRAGMENT(aligner, m) {
  m.def(
      "policy_loss(Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor mask, Tensor? entropy,"
      " float num_tokens, float clip_low, float clip_high, float? dual_clip, float entropy_coef)"
      " -> (Tensor loss, Tensor stats, Tensor d_logprobs)");
}
STABLE_TORCH_LIBRARY_IMPL(aligner, CPU, m) { m.impl("policy_loss", TORCH_BOX(&aligner::policy_loss)); }
