#include "cuda_check.h"
#include "policy_loss.h"

CUDA_ENTRY(policy_loss)

namespace {

using namespace check;

struct Options {
  bool weights, importance, entropy;
  const aligner::KlEstimator* kl;
  float dual_clip;
};
constexpr aligner::KlEstimator K1 = aligner::KlEstimator::k1, K2 = aligner::KlEstimator::k2,
                               K3 = aligner::KlEstimator::k3;

void compare_one(Random& random, int64_t N, double share, const Options& options) {
  const Array<float> logprobs = normal_array(random, N, 0.5f, -2), old = normal_array(random, N, 0.5f, -2),
                     ref = normal_array(random, N, 0.5f, -2), advantages = normal_array(random, N),
                     importance = normal_array(random, N, 0.2f, 1), entropy = normal_array(random, N, 1, 3);
  const Array<bool> mask = random_mask(random, share, {&logprobs, &old, &ref, &advantages, &importance, &entropy});
  const Array<float> weights = random_weights(random, mask);
  const Array<float> d(N), want_d(N), d_entropy(N), want_d_entropy(N), loss(1), want_loss(1), stats(8), want_stats(8);
  const auto params = [&](const Array<float>& gradient, const Array<float>& of_entropy, const Array<float>& sum,
                          const Array<float>& parts) {
    aligner::PolicyLossParams p{};
    p.logprobs = logprobs.data();
    p.old_logprobs = old.data();
    p.advantages = advantages.data();
    p.mask = options.weights ? nullptr : mask.data();
    p.weights = options.weights ? weights.data() : nullptr;
    p.importance = options.importance ? importance.data() : nullptr;
    p.ref_logprobs = options.kl ? ref.data() : nullptr;
    p.entropy = options.entropy ? entropy.data() : nullptr;
    p.d_logprobs = gradient.data();
    p.d_entropy = options.entropy ? of_entropy.data() : nullptr;
    p.loss = sum.data();
    p.stats = parts.data();
    p.count = N;
    p.num_tokens = N + 1.0;
    p.clip_low = 0.2f;
    p.clip_high = 0.28f;
    p.dual_clip = options.dual_clip;
    p.entropy_coef = 0.01f;
    p.kl_coef = 0.1f;
    p.kl = options.kl ? *options.kl : K1;
    return p;
  };
  run(aligner_policy_loss_cuda, params(d, d_entropy, loss, stats));
  aligner::portable::policy_loss_cpu(params(want_d, want_d_entropy, want_loss, want_stats));
  expect_close("d_logprobs", d, want_d, 2e-6, 1e-7 / (N + 1.0));
  expect_close("d_entropy", d_entropy, want_d_entropy, 2e-6, 1e-9);
  expect_close("loss", loss, want_loss, 2e-6, 2e-7);
  expect_close("stats", stats, want_stats, 2e-6, 2e-7);

  const Array<float> again_loss(1), again_stats(8);
  aligner_emulation_set_seed(random.below(1000));
  run(aligner_policy_loss_cuda, params(d, d_entropy, again_loss, again_stats));
  expect_close("loss in another schedule", again_loss, loss, 0, 0);
  expect_close("stats in another schedule", again_stats, stats, 0, 0);
}

void compare(Random& random) {
  for (const int64_t N : {0, 1, 33, 1025, 3001}) {
    compare_one(random, N, 0.7, {false, false, false, nullptr, INFINITY});
    compare_one(random, N, 0.7, {true, true, true, &K3, 3});
  }
  compare_one(random, 600, 0.8, {false, true, false, &K1, 1.5f});
  compare_one(random, 600, 0.8, {true, false, true, &K2, INFINITY});
  compare_one(random, 600, 0, {false, true, true, &K3, 3});
}

void large() {
  const int64_t N = 1 << 17;
  const Array<float> x(N, 1.f), d(N), d_entropy(N), loss(1), stats(8);
  const Array<bool> mask(N, true);
  aligner::PolicyLossParams p{};
  p.logprobs = p.old_logprobs = p.advantages = p.importance = p.ref_logprobs = p.entropy = x.data();
  p.mask = mask.data();
  p.d_logprobs = d.data();
  p.d_entropy = d_entropy.data();
  p.loss = loss.data();
  p.stats = stats.data();
  p.count = N;
  p.num_tokens = double(N);
  p.kl = K3;
  minimum("policy_loss_tokens", N * 25, N * 8);
  run(aligner_policy_loss_cuda, p);
}

const Cases cases("policy_loss", compare, large);

}  // namespace
