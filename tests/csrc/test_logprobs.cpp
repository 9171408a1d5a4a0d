#include <cmath>
#include <cstdio>
#include <initializer_list>

#include "linear_logprobs.h"
#include "logprobs.h"

namespace {

int failures = 0;

void expect(const char* what, float got, double want) {
  if (std::fabs(got - want) <= 1e-6) return;
  std::printf("%s is %.8f, want %.8f\n", what, got, want);
  ++failures;
}

// p = (1/4, 3/4): log 3 apart. The entropy is log 4 - 3/4 log 3.
void two_words() {
  const float logits[] = {2, 2 + std::log(3.f)};
  const int64_t target = 1;
  float logprob, entropy, max, log_sum;
  aligner::logprobs_cpu(
      {logits, &target, &logprob, &entropy, &max, &log_sum, 1, 2, 2, 0, 1.f, aligner::Dtype::float32});
  expect("logprob", logprob, std::log(0.75));
  expect("entropy", entropy, std::log(4.0) - 0.75 * std::log(3.0));

  const float one = 1;
  float d[2];
  aligner::logprobs_backward_cpu(
      {logits, &target, &max, &log_sum, &entropy, &one, nullptr, d, 1, 2, 2, 2, 0, 1.f, aligner::Dtype::float32});
  expect("d_logit 0", d[0], -0.25);
  expect("d_logit 1", d[1], 0.25);
}

// The same distribution as hidden = 1 times weight = (2, 2 + log 3); row 0 is left out.
void two_words_linear() {
  const float hidden[] = {99, 1}, weight[] = {2, 2 + std::log(3.f)}, one[] = {1, 1};
  const int64_t rows[] = {1}, targets[] = {0, 1};
  float logprobs[2] = {}, entropy[2] = {}, max[2] = {}, log_sum[2] = {}, d_hidden[2] = {}, d_weight[2];
  aligner::linear_logprobs_cpu(
      {hidden, weight, rows, targets, logprobs, entropy, max, log_sum, 1, 2, 1, 1, 1, 1.f, aligner::Dtype::float32});
  expect("left out", logprobs[0], 0);
  expect("linear logprob", logprobs[1], std::log(0.75));
  expect("linear entropy", entropy[1], std::log(4.0) - 0.75 * std::log(3.0));
  aligner::linear_logprobs_backward_cpu({hidden, weight, rows, targets, max, log_sum, entropy, one, nullptr, d_hidden,
                                         d_weight, 1, 2, 1, 1, 1, 1.f, aligner::Dtype::float32});
  expect("d_hidden 0", d_hidden[0], 0);
  expect("d_hidden 1", d_hidden[1], -0.25 * weight[0] + 0.25 * weight[1]);
  expect("d_weight 0", d_weight[0], -0.25);
  expect("d_weight 1", d_weight[1], 0.25);
}

}  // namespace

int main() {
  for (const char* isa : {"portable", "avx2", "avx512"}) {
    if (!aligner::force_cpu_isa(isa)) continue;
    two_words();
    two_words_linear();
  }
  return failures;
}
