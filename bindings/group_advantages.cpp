#include "group_advantages.h"

#include <unordered_set>

#include "checks.h"

namespace aligner {
namespace {

GroupAdvantage checked_kind(const Call& call, const std::string& kind) {
  STD_TORCH_CHECK(kind == "grpo" || kind == "dr_grpo" || kind == "rloo", call.op,
                  ": kind must be grpo, dr_grpo or rloo, got ", kind);
  return kind == "grpo" ? GroupAdvantage::grpo : kind == "rloo" ? GroupAdvantage::rloo : GroupAdvantage::dr_grpo;
}

// A GPU's ids are brought here to be looked at: B numbers a step, against a wrong baseline.
void check_adjacent(const Call& call, const Tensor& groups) {
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  const Tensor host = call.is_cpu ? groups : torch::stable::to(groups, cpu);
  const int64_t* id = data<int64_t>(host);
  std::unordered_set<int64_t> seen;
  for (int64_t b = 0; b < host.numel(); ++b) {
    if (b > 0 && id[b] == id[b - 1]) continue;
    STD_TORCH_CHECK(seen.insert(id[b]).second, call.op, ": equal groups must be adjacent, got ", id[b],
                    " again at index ", b, "; sort by group");
  }
}

Tensor group_advantages(const Tensor& rewards_, const Tensor& groups_, std::string kind) {
  const Call call("group_advantages", rewards_);
  const int64_t B = rewards_.numel();
  const Tensor rewards = checked(call, "rewards", rewards_, ScalarType::Float, {B});
  const Tensor groups = checked(call, "groups", groups_, ScalarType::Long, {B});
  check_adjacent(call, groups);
  Tensor advantages = new_float(rewards, {B});
  run<GroupAdvantagesParams>(
      call, group_advantages_cpu, "group_advantages",
      {data<float>(rewards), data<int64_t>(groups), out<float>(advantages), B, checked_kind(call, kind)});
  return advantages;
}

}  // namespace
}  // namespace aligner

STABLE_TORCH_LIBRARY_FRAGMENT(aligner, m) {
  m.def("group_advantages(Tensor rewards, Tensor groups, str kind) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(aligner, CompositeExplicitAutograd, m) {
  m.impl("group_advantages", TORCH_BOX(&aligner::group_advantages));
}
