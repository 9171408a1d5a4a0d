#include "cuda_check.h"
#include "value_loss.h"

CUDA_ENTRY(value_loss)

namespace {

using namespace check;

void compare_one(Random& random, int64_t N, bool weighted, double share, float clip, float huber) {
  const Array<float> values = normal_array(random, N), old = normal_array(random, N), target = normal_array(random, N);
  const Array<bool> mask = random_mask(random, share, {&values, &old, &target});
  const Array<float> weights = random_weights(random, mask);
  const Array<float> d(N), want_d(N), loss(1), want_loss(1), stats(4), want_stats(4);
  const auto params = [&](const Array<float>& gradient, const Array<float>& sum, const Array<float>& parts) {
    return aligner::ValueLossParams{values.data(),
                                    old.data(),
                                    target.data(),
                                    weighted ? nullptr : mask.data(),
                                    weighted ? weights.data() : nullptr,
                                    gradient.data(),
                                    sum.data(),
                                    parts.data(),
                                    N,
                                    N + 1.0,
                                    clip,
                                    huber};
  };
  run(aligner_value_loss_cuda, params(d, loss, stats));
  aligner::portable::value_loss_cpu(params(want_d, want_loss, want_stats));
  expect_close("d_values", d, want_d, 1e-6, 1e-12);
  expect_close("loss", loss, want_loss, 1e-6, 1e-7);
  expect_close("stats", stats, want_stats, 1e-6, 1e-7);
}

void compare(Random& random) {
  for (const int64_t N : {0, 1, 31, 257, 3001}) {
    compare_one(random, N, N % 2 == 0, 0.7, 0.2f, INFINITY);
    compare_one(random, N, N % 2 == 1, 0.7, 0.5f, 0.8f);
  }
  compare_one(random, 500, false, 0, 0.2f, INFINITY);
  compare_one(random, 500, true, 0.9, INFINITY, 1.f);
}

void large() {
  const int64_t N = 1 << 17;
  const Array<float> x(N, 1.f), d(N), loss(1), stats(4);
  const Array<bool> mask(N, true);
  minimum("value_loss_tokens", N * 13, N * 4);
  run(aligner_value_loss_cuda, aligner::ValueLossParams{x.data(), x.data(), x.data(), mask.data(), nullptr, d.data(),
                                                        loss.data(), stats.data(), N, double(N), 0.2f, INFINITY});
}

const Cases cases("value_loss", compare, large);

}  // namespace
