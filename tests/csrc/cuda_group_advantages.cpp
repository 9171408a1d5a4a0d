#include "cuda_check.h"
#include "group_advantages.h"

CUDA_ENTRY(group_advantages)

namespace {

using namespace check;
using aligner::GroupAdvantage;

// Groups of up to `largest` responses; their ids fall, so that no order is taken for granted.
void compare_one(Random& random, int64_t B, int64_t largest) {
  const Array<float> rewards = normal_array(random, B);
  const Array<int64_t> groups(B);
  for (int64_t i = 0, id = 1000; i < B; --id) {
    for (const int64_t end = std::min(B, i + 1 + random.below(largest)); i < end; ++i) {
      groups[i] = id;
      if (id % 3 == 0) rewards[i] = 0.1f;  // a group of equals
    }
  }
  for (const GroupAdvantage kind : {GroupAdvantage::grpo, GroupAdvantage::dr_grpo, GroupAdvantage::rloo}) {
    const Array<float> advantages(B), want(B);
    run(aligner_group_advantages_cuda,
        aligner::GroupAdvantagesParams{rewards.data(), groups.data(), advantages.data(), B, kind});
    aligner::portable::group_advantages_cpu({rewards.data(), groups.data(), want.data(), B, kind});
    expect_close("advantages", advantages, want, 1e-6, 1e-7);
  }
}

void compare(Random& random) {
  compare_one(random, 0, 1);
  compare_one(random, 1, 1);
  compare_one(random, 200, 1);
  compare_one(random, 301, 9);
  compare_one(random, 300, 120);
  compare_one(random, 64, 1000);
  compare_one(random, 3000, 8);
  compare_one(random, 5000, 3000);  // longer than what a block holds
}

void large() {
  constexpr int64_t B = 1 << 17;
  const Array<float> rewards(B, 1.f), advantages(B);
  const Array<int64_t> groups(B);
  for (int64_t i = 0; i < B; ++i) groups[i] = i / 7;  // some begin in one block and end in the next
  minimum("group_advantages_groups", B * 12, B * 4);
  run(aligner_group_advantages_cuda,
      aligner::GroupAdvantagesParams{rewards.data(), groups.data(), advantages.data(), B, GroupAdvantage::grpo});
}

const Cases cases("group_advantages", compare, large);

}  // namespace
