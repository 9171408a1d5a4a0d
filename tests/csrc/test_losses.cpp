// Losses and advantages by hand, and on every length up to two vectors: each buffer ends where its data ends, so that
// the address sanitizer sees a vector that reads or writes too far.
#include <cmath>
#include <cstdio>
#include <initializer_list>
#include <memory>
#include <vector>

#include "group_advantages.h"
#include "kto_loss.h"
#include "policy_loss.h"
#include "preference_loss.h"
#include "segment_sum.h"
#include "topk_distillation_loss.h"
#include "value_loss.h"
#include "whiten.h"

namespace {

using Floats = std::vector<float>;
int failures = 0;

void expect(const char* what, double got, double want, double tolerance = 1e-6) {
  if (std::fabs(got - want) <= tolerance) return;
  std::printf("%s is %.8f, want %.8f\n", what, got, want);
  ++failures;
}

// Equal tokens: every mean over them is the number of one token.
void policy(int64_t n) {
  const Floats logprobs(n, -1.f), old(n, -1.5f), advantages(n, 2.f), importance(n, 0.5f), ref(n, -2.f), entropy(n, 3.f);
  std::unique_ptr<bool[]> mask(new bool[n]);
  for (int64_t i = 0; i < n; ++i) mask[i] = true;
  Floats d(n), d_entropy(n), loss(1), stats(8);
  aligner::policy_loss_cpu({logprobs.data(),
                            old.data(),
                            advantages.data(),
                            mask.get(),
                            nullptr,
                            importance.data(),
                            ref.data(),
                            entropy.data(),
                            d.data(),
                            d_entropy.data(),
                            loss.data(),
                            stats.data(),
                            n,
                            double(n),
                            0.2f,
                            0.3f,
                            INFINITY,
                            0.1f,
                            0.2f,
                            aligner::KlEstimator::k3});
  const double kl = std::exp(-1.0) - 1 + 1, clipped = 0.5 * -2 * 1.3;  // the ratio e^0.5 is above 1.3
  expect("policy loss", loss[0], clipped - 0.1 * 3 + 0.2 * kl);
  expect("policy clip fraction", stats[1], 1);
  expect("entropy gradient", d_entropy[n - 1], -0.1 / double(n));
  expect("policy gradient", d[n - 1], 0.2 * (1 - std::exp(-1.0)) / double(n));
}

void value(int64_t n) {
  const Floats values(n, 5.f), old(n, 5.f), returns(n, 2.f), weights(n, 2.f);
  Floats d(n), loss(1), stats(4);
  aligner::value_loss_cpu({values.data(), old.data(), returns.data(), nullptr, weights.data(), d.data(), loss.data(),
                           stats.data(), n, double(n), 0.2f, 1.f});
  expect("value loss", loss[0], 2 * (3 - 0.5));  // an error of 3 where rho is linear from 1 on
  expect("value gradient", d[n - 1], 2.0 / double(n));
}

void preference(int64_t n) {
  const Floats chosen(n, -1.f), rejected(n, -2.f), ref(n, -1.5f);
  Floats d_chosen(n), d_rejected(n), loss(1), stats(6);
  for (int kind = 0; kind <= int(aligner::PreferenceKind::orpo); ++kind) {
    aligner::preference_loss_cpu({chosen.data(), rejected.data(), ref.data(), ref.data(), nullptr, nullptr,
                                  d_chosen.data(), d_rejected.data(), loss.data(), stats.data(), n, double(n),
                                  aligner::PreferenceKind(kind), 1.f, 0.f, 0.f, 1.f, 0.f});
    if (kind != 0) continue;
    expect("dpo", loss[0], std::log1p(std::exp(-1.0)));
    expect("dpo gradient", d_chosen[n - 1], -1 / (1 + std::exp(1.0)) / double(n));
    expect("dpo accuracy", stats[2], 1);
  }
}

void kto(int64_t n) {
  const Floats policy(n, -1.f), ref(n, -1.f);
  const float kl = 0;
  std::unique_ptr<bool[]> desirable(new bool[n]);
  for (int64_t i = 0; i < n; ++i) desirable[i] = i % 2;
  Floats d(n), loss(1), stats(4);
  aligner::kto_loss_cpu({policy.data(), ref.data(), desirable.get(), &kl, d.data(), loss.data(), stats.data(), n,
                         double(n), 1.f, 1.f, 1.f});
  expect("kto", loss[0], 0.5);
  expect("kto gradient", d[0], 0.25 / double(n));
}

void segments(int64_t n) {
  const Floats x(n, 3.f);
  const int32_t cu_seqlens[] = {0, 0, int32_t(n)};
  Floats sums(2), d(n);
  aligner::segment_sum_cpu({x.data(), nullptr, cu_seqlens, sums.data(), 2, false});
  expect("empty segment", sums[0], 0);
  expect("segment", sums[1], 3.0 * double(n));
  aligner::segment_sum_backward_cpu({sums.data(), nullptr, cu_seqlens, d.data(), 2, true});
  expect("segment gradient", d[n - 1], 3);
}

void advantages(int64_t n) {
  Floats rewards(n, 1.f), out(n), y(n);
  rewards[0] = 1.f + float(n);
  std::vector<int64_t> groups(n, 7);
  for (auto kind : {aligner::GroupAdvantage::dr_grpo, aligner::GroupAdvantage::rloo, aligner::GroupAdvantage::grpo}) {
    aligner::group_advantages_cpu({rewards.data(), groups.data(), out.data(), n, kind});
    if (kind == aligner::GroupAdvantage::dr_grpo) expect("dr_grpo", out[0], double(n) - 1, 1e-4);
    if (kind == aligner::GroupAdvantage::rloo) expect("rloo", out[0], n > 1 ? double(n) : 0, 1e-4);
  }
  std::unique_ptr<bool[]> mask(new bool[n]);
  for (int64_t i = 0; i < n; ++i) mask[i] = true;
  double moments[3];
  aligner::whiten_moments_cpu({rewards.data(), mask.get(), moments, n});
  expect("mean", moments[1], 2);
  aligner::whiten_apply_cpu({rewards.data(), mask.get(), moments, y.data(), n});
}

// The student is the teacher: no loss, no gradient.
void distillation(int64_t n) {
  Floats logits(n), top{1.f}, kl(1), max(1), log_sum(1), rest(1), d(n), one{1.f};
  logits[n - 1] = 1.f;
  const int64_t id = n - 1;
  const float teacher_log_sum = float(std::log(std::exp(1.0) + double(n) - 1));
  aligner::topk_distillation_loss_cpu({logits.data(), &id, top.data(), &teacher_log_sum, nullptr, kl.data(), max.data(),
                                       log_sum.data(), rest.data(), 1, n, 1, n, 1.f, false, aligner::Dtype::float32});
  expect("distillation", kl[0], 0, 1e-6);
  aligner::topk_distillation_loss_backward_cpu({logits.data(), &id, top.data(), &teacher_log_sum, nullptr, max.data(),
                                                log_sum.data(), rest.data(), one.data(), d.data(), 1, n, 1, n, 1.f,
                                                false, aligner::Dtype::float32});
  expect("distillation gradient", d[n - 1], 0, 1e-6);
}

}  // namespace

int main() {
  for (const char* isa : {"portable", "avx2", "avx512"}) {
    if (!aligner::force_cpu_isa(isa)) continue;
    for (int64_t n = 1; n <= 34; ++n) {
      policy(n);
      value(n);
      preference(n);
      if (n % 2 == 0) kto(n);
      segments(n);
      advantages(n);
      distillation(n);
    }
  }
  return failures;
}
