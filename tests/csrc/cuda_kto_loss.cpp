#include "cuda_check.h"
#include "kto_loss.h"

CUDA_ENTRY(kto_loss)

namespace {

using namespace check;

void compare_one(Random& random, int64_t B, float scale) {
  const Array<float> policy = normal_array(random, B, scale, -3 * scale),
                     ref = normal_array(random, B, scale, -3 * scale);
  const Array<float> kl(1, 0.3f);
  const Array<bool> desirable(B);
  for (int64_t i = 0; i < B; ++i) desirable[i] = random.chance(0.6);
  const Array<float> d(B), want_d(B), loss(1), want_loss(1), stats(4), want_stats(4);
  const auto params = [&](const Array<float>& gradient, const Array<float>& sum, const Array<float>& parts) {
    return aligner::KtoLossParams{policy.data(),
                                  ref.data(),
                                  desirable.data(),
                                  kl.data(),
                                  gradient.data(),
                                  sum.data(),
                                  parts.data(),
                                  B,
                                  B + 1.0,
                                  0.1f,
                                  1.f,
                                  1.33f};
  };
  run(aligner_kto_loss_cuda, params(d, loss, stats));
  aligner::portable::kto_loss_cpu(params(want_d, want_loss, want_stats));
  expect_close("d_policy", d, want_d, 1e-5, 1e-12);
  expect_close("loss", loss, want_loss, 2e-6, 1e-7);
  expect_close("stats", stats, want_stats, 2e-6, 1e-6 * scale);
}

void compare(Random& random) {
  for (const int64_t B : {0, 1, 37, 2050}) compare_one(random, B, 4);
  compare_one(random, 300, 300);
}

void large() {
  const int64_t B = 1 << 17;
  const Array<float> x(B, 1.f), kl(1, 0.f), d(B), loss(1), stats(4);
  const Array<bool> desirable(B, true);
  minimum("kto_loss_responses", B * 9, B * 4);
  run(aligner_kto_loss_cuda, aligner::KtoLossParams{x.data(), x.data(), desirable.data(), kl.data(), d.data(),
                                                    loss.data(), stats.data(), B, double(B), 0.1f, 1.f, 1.f});
}

const Cases cases("kto_loss", compare, large);

}  // namespace
