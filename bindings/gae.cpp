#include "gae.h"

#include "checks.h"

namespace aligner {
namespace {

std::tuple<Tensor, Tensor> gae(const Tensor& rewards_, const Tensor& values_, const Tensor& action_mask_,
                               const Tensor& cu_seqlens_, double gamma, double lam) {
  const Call call("gae", rewards_);
  const int64_t N = rewards_.numel();
  const Tensor rewards = checked(call, "rewards", rewards_, ScalarType::Float, {N});
  const Tensor values = checked(call, "values", values_, ScalarType::Float, {N});
  const Tensor action_mask = checked(call, "action_mask", action_mask_, ScalarType::Bool, {N});
  const Tensor cu_seqlens = checked_cu_seqlens(call, cu_seqlens_, N);
  Tensor advantages = new_float(rewards, {N}), returns = new_float(rewards, {N});
  run<GaeParams>(call, gae_cpu, "gae",
                 {data<float>(rewards), data<float>(values), data<bool>(action_mask), data<int32_t>(cu_seqlens),
                  out<float>(advantages), out<float>(returns), cu_seqlens.numel() - 1, gamma, lam});
  return {advantages, returns};
}

}  // namespace
}  // namespace aligner

STABLE_TORCH_LIBRARY_FRAGMENT(aligner, m) {
  m.def(
      "gae(Tensor rewards, Tensor values, Tensor action_mask, Tensor cu_seqlens, float gamma, float lam)"
      " -> (Tensor advantages, Tensor returns)");
}
STABLE_TORCH_LIBRARY_IMPL(aligner, CompositeExplicitAutograd, m) { m.impl("gae", TORCH_BOX(&aligner::gae)); }
