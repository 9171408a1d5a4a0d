#include "cuda_check.h"
#include "gae.h"

CUDA_ENTRY(gae)

namespace {

using namespace check;

void compare_one(Random& random, const Array<int32_t>& cu_seqlens, double share, double gamma, double lam) {
  const int64_t B = cu_seqlens.size - 1, N = cu_seqlens[B];
  const Array<float> rewards = normal_array(random, N), values = normal_array(random, N, 3);
  const Array<bool> action = random_mask(random, share, {&rewards, &values});
  const Array<float> advantages(N), returns(N), want_advantages(N), want_returns(N);
  const auto params = [&](const Array<float>& a, const Array<float>& r) {
    return aligner::GaeParams{
        rewards.data(), values.data(), action.data(), cu_seqlens.data(), a.data(), r.data(), B, gamma, lam};
  };
  run(aligner_gae_cuda, params(advantages, returns));
  aligner::portable::gae_cpu(params(want_advantages, want_returns));
  expect_close("advantages", advantages, want_advantages, 1e-6, 1e-6);
  expect_close("returns", returns, want_returns, 1e-6, 1e-6);
}

void compare(Random& random) {
  compare_one(random, random_cu_seqlens(random, 0, 1), 1, 1, 1);
  compare_one(random, random_cu_seqlens(random, 9, 200), 0.6, 0.99, 0.95);
  compare_one(random, random_cu_seqlens(random, 5, 400), 0.02, 1, 1);
  compare_one(random, random_cu_seqlens(random, 6, 40), 0, 1, 0.9);
  compare_one(random, random_cu_seqlens(random, 3, 700), 1, 1, 0.95);
}

void large() {
  Random random(0);
  const Array<int32_t> cu_seqlens = random_cu_seqlens(random, 128, 2048);
  const int64_t N = cu_seqlens[128];
  const Array<float> rewards(N, 1.f), values(N, 1.f), advantages(N), returns(N);
  const Array<bool> action(N, true);
  minimum("gae_sequences", N * (4 + 4 + 1) + 129 * 4, N * 8);
  run(aligner_gae_cuda, aligner::GaeParams{rewards.data(), values.data(), action.data(), cu_seqlens.data(),
                                           advantages.data(), returns.data(), 128, 1, 0.95});
}

const Cases cases("gae", compare, large);

}  // namespace
