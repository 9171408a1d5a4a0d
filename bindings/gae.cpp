#include "gae.h"

#include "checks.h"

namespace aligner {
namespace {

std::tuple<Tensor, Tensor> gae(const Tensor& rewards_, const Tensor& values_, const Tensor& action_mask_,
                               const Tensor& cu_seqlens_, double gamma, double lam) {
  const int64_t N = rewards_.numel(), B = cu_seqlens_.numel() - 1;
  const Tensor rewards = checked("gae", "rewards", rewards_, ScalarType::Float, {N});
  const Tensor values = checked("gae", "values", values_, ScalarType::Float, {N});
  const Tensor action_mask = checked("gae", "action_mask", action_mask_, ScalarType::Bool, {N});
  const Tensor cu_seqlens = checked("gae", "cu_seqlens", cu_seqlens_, ScalarType::Int, {B + 1});
  const int32_t* cu = data<int32_t>(cu_seqlens);
  STD_TORCH_CHECK(B >= 0 && cu[0] == 0 && cu[B] == N, "gae: cu_seqlens must start with 0 and end with ", N,
                  " (the number of tokens), got ", B >= 0 ? cu[0] : -1, " and ", B >= 0 ? cu[B] : -1);
  for (int64_t b = 0; b < B; ++b) {
    STD_TORCH_CHECK(cu[b] <= cu[b + 1], "gae: cu_seqlens must never decrease, got ", cu[b], " then ", cu[b + 1],
                    " at index ", b);
  }
  Tensor advantages = new_float(rewards, {N}), returns = new_float(rewards, {N});
  gae_cpu({data<float>(rewards), data<float>(values), data<bool>(action_mask), cu, out<float>(advantages),
           out<float>(returns), B, gamma, lam});
  return {advantages, returns};
}

}  // namespace
}  // namespace aligner

STABLE_TORCH_LIBRARY_FRAGMENT(aligner, m) {
  m.def(
      "gae(Tensor rewards, Tensor values, Tensor action_mask, Tensor cu_seqlens, float gamma, float lam)"
      " -> (Tensor advantages, Tensor returns)");
}
STABLE_TORCH_LIBRARY_IMPL(aligner, CPU, m) { m.impl("gae", TORCH_BOX(&aligner::gae)); }
