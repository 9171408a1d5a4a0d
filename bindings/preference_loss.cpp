#include "preference_loss.h"

#include "checks.h"

namespace aligner {
namespace {

PreferenceKind checked_kind(const Call& call, const std::string& kind) {
  const char* names[] = {"dpo", "cdpo", "rdpo", "ipo", "rpo_sq", "rpo_fwd_kl", "rpo_bwd_kl", "simpo", "orpo"};
  int number = 0;
  for (const char* name : names) {
    if (kind == name) return PreferenceKind(number);
    ++number;
  }
  STD_TORCH_CHECK(false, call.op, ": kind is ", kind, ", expected one of dpo to orpo");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> preference_loss(
    const Tensor& policy_chosen_, const Tensor& policy_rejected_, const std::optional<Tensor>& ref_chosen_,
    const std::optional<Tensor>& ref_rejected_, const std::optional<Tensor>& reward_chosen_,
    const std::optional<Tensor>& reward_rejected_, double num_pairs, std::string kind, double beta,
    double label_smoothing, double margin, double reward_scale, double sft_coef) {
  const Call call("preference_loss", policy_chosen_);
  const int64_t B = policy_chosen_.numel();
  const Tensor policy_chosen = checked(call, "policy_chosen", policy_chosen_, ScalarType::Float, {B});
  const Tensor policy_rejected = checked(call, "policy_rejected", policy_rejected_, ScalarType::Float, {B});
  const auto ref_chosen = checked_optional(call, "ref_chosen", ref_chosen_, ScalarType::Float, {B});
  const auto ref_rejected = checked_optional(call, "ref_rejected", ref_rejected_, ScalarType::Float, {B});
  const auto reward_chosen = checked_optional(call, "reward_chosen", reward_chosen_, ScalarType::Float, {B});
  const auto reward_rejected = checked_optional(call, "reward_rejected", reward_rejected_, ScalarType::Float, {B});
  Tensor loss = new_float(policy_chosen, {}), stats = new_float(policy_chosen, {6});
  Tensor d_chosen = new_float(policy_chosen, {B}), d_rejected = new_float(policy_chosen, {B});
  run<PreferenceLossParams>(
      call, preference_loss_cpu, "preference_loss",
      {data<float>(policy_chosen), data<float>(policy_rejected), data_or_null(ref_chosen), data_or_null(ref_rejected),
       data_or_null(reward_chosen), data_or_null(reward_rejected), out<float>(d_chosen), out<float>(d_rejected),
       out<float>(loss), out<float>(stats), B, num_pairs, checked_kind(call, kind), float(beta), float(label_smoothing),
       float(margin), float(reward_scale), float(sft_coef)});
  return {loss, stats, d_chosen, d_rejected};
}

}  // namespace
}  // namespace aligner

STABLE_TORCH_LIBRARY_FRAGMENT(aligner, m) {
  m.def(
      "preference_loss(Tensor policy_chosen, Tensor policy_rejected, Tensor? ref_chosen, Tensor? ref_rejected,"
      " Tensor? reward_chosen, Tensor? reward_rejected, float num_pairs, str kind, float beta, float label_smoothing,"
      " float margin, float reward_scale, float sft_coef)"
      " -> (Tensor loss, Tensor stats, Tensor d_chosen, Tensor d_rejected)");
}
STABLE_TORCH_LIBRARY_IMPL(aligner, CompositeExplicitAutograd, m) {
  m.impl("preference_loss", TORCH_BOX(&aligner::preference_loss));
}
