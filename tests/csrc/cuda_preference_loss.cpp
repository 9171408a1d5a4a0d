#include "cuda_check.h"
#include "preference_loss.h"

CUDA_ENTRY(preference_loss)

namespace {

using namespace check;
using aligner::PreferenceKind;

void compare_one(Random& random, int64_t B, PreferenceKind kind, bool ref, bool rewards) {
  const bool averaged = kind == PreferenceKind::simpo || kind == PreferenceKind::orpo;
  const float scale = averaged ? 0.5f : 8;
  const auto log_probabilities = [&] {
    Array<float> x = normal_array(random, B, scale, -4 * scale);
    for (int64_t i = 0; i < B; ++i) x[i] = std::min(x[i], -1e-3f);
    return x;
  };
  const Array<float> chosen = log_probabilities(), rejected = log_probabilities();
  const Array<float> ref_chosen = log_probabilities(), ref_rejected = log_probabilities();
  const Array<float> reward_chosen = normal_array(random, B), reward_rejected = normal_array(random, B);
  const Array<float> d_chosen(B), d_rejected(B), want_d_chosen(B), want_d_rejected(B);
  const Array<float> loss(1), want_loss(1), stats(6), want_stats(6);
  aligner::PreferenceLossParams p{};
  p.policy_chosen = chosen.data();
  p.policy_rejected = rejected.data();
  p.ref_chosen = ref ? ref_chosen.data() : nullptr;
  p.ref_rejected = ref ? ref_rejected.data() : nullptr;
  p.reward_chosen = rewards ? reward_chosen.data() : nullptr;
  p.reward_rejected = rewards ? reward_rejected.data() : nullptr;
  p.count = B;
  p.num_pairs = B + 1.0;
  p.kind = kind;
  p.beta = averaged ? 1.5f : 0.1f;
  p.label_smoothing = 0.1f;
  p.margin = 0.5f;
  p.reward_scale = 1.2f;
  p.sft_coef = 0.01f;
  auto want = p;
  p.d_chosen = d_chosen.data();
  p.d_rejected = d_rejected.data();
  p.loss = loss.data();
  p.stats = stats.data();
  want.d_chosen = want_d_chosen.data();
  want.d_rejected = want_d_rejected.data();
  want.loss = want_loss.data();
  want.stats = want_stats.data();
  run(aligner_preference_loss_cuda, p);
  aligner::portable::preference_loss_cpu(want);
  expect_close("d_chosen", d_chosen, want_d_chosen, 1e-5, 1e-6 / (B + 1.0));
  expect_close("d_rejected", d_rejected, want_d_rejected, 1e-5, 1e-6 / (B + 1.0));
  expect_close("loss", loss, want_loss, 3e-6, 1e-6);
  expect_close("stats", stats, want_stats, 3e-6, 1e-6);
}

void compare(Random& random) {
  for (const PreferenceKind kind :
       {PreferenceKind::dpo, PreferenceKind::cdpo, PreferenceKind::rdpo, PreferenceKind::ipo, PreferenceKind::rpo_sq,
        PreferenceKind::rpo_fwd_kl, PreferenceKind::rpo_bwd_kl, PreferenceKind::simpo, PreferenceKind::orpo}) {
    compare_one(random, 301, kind, true, true);
  }
  for (const int64_t B : {0, 1, 2050}) {
    compare_one(random, B, PreferenceKind::dpo, true, false);
    compare_one(random, B, PreferenceKind::simpo, false, false);
  }
}

void large() {
  const int64_t B = 1 << 16;
  const Array<float> x(B, -1.f), d_chosen(B), d_rejected(B), loss(1), stats(6);
  aligner::PreferenceLossParams p{};
  p.policy_chosen = p.policy_rejected = p.ref_chosen = p.ref_rejected = x.data();
  p.d_chosen = d_chosen.data();
  p.d_rejected = d_rejected.data();
  p.loss = loss.data();
  p.stats = stats.data();
  p.count = B;
  p.num_pairs = double(B);
  p.beta = 0.1f;
  minimum("preference_loss_pairs", B * 16, B * 8);
  run(aligner_preference_loss_cuda, p);
}

const Cases cases("preference_loss", compare, large);

}  // namespace
