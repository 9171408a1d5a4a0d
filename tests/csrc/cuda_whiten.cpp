#include "cuda_check.h"
#include "whiten.h"

CUDA_ENTRY(whiten_moments)
CUDA_ENTRY(whiten_apply)

namespace {

using namespace check;

void compare_one(Random& random, int64_t N, double share, float scale, float shift) {
  const Array<float> x = normal_array(random, N, scale, shift);
  const Array<bool> mask = random_mask(random, share, {&x});
  const Array<double> moments(3), want_moments(3);
  run(aligner_whiten_moments_cuda, aligner::WhitenMomentsParams{x.data(), mask.data(), moments.data(), N});
  aligner::portable::whiten_moments_cpu({x.data(), mask.data(), want_moments.data(), N});
  expect_close("moments", moments, want_moments, 1e-12, 1e-12 * std::fabs(shift));
  const Array<double> again(3);
  aligner_emulation_set_seed(random.below(1000));
  run(aligner_whiten_moments_cuda, aligner::WhitenMomentsParams{x.data(), mask.data(), again.data(), N});
  expect_close("moments in another schedule", again, moments, 0, 0);

  const Array<float> y(N), want_y(N);
  run(aligner_whiten_apply_cuda, aligner::WhitenApplyParams{x.data(), mask.data(), want_moments.data(), y.data(), N});
  aligner::portable::whiten_apply_cpu({x.data(), mask.data(), want_moments.data(), want_y.data(), N});
  expect_close("y", y, want_y, 1e-6, 1e-7);
}

void compare(Random& random) {
  for (const int64_t N : {0, 1, 31, 257, 1024, 3001}) {
    compare_one(random, N, 0.7, 3, 0.5f);
    compare_one(random, N, 0, 1, 0);
  }
  compare_one(random, 2000, 0.1, 1e-3f, 1e4f);
}

void large() {
  const int64_t N = 1 << 17;
  const Array<float> x(N, 1.f), y(N);
  const Array<bool> mask(N, true);
  const Array<double> moments(3);
  minimum("whiten_moments_parts", N * 5, 0);
  minimum("whiten_apply_tokens", N * 5, N * 4);
  run(aligner_whiten_moments_cuda, aligner::WhitenMomentsParams{x.data(), mask.data(), moments.data(), N});
  run(aligner_whiten_apply_cuda, aligner::WhitenApplyParams{x.data(), mask.data(), moments.data(), y.data(), N});
}

const Cases cases("whiten", compare, large);

}  // namespace
