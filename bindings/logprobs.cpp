#include "logprobs.h"

#include "checks.h"

namespace aligner {
namespace {

const char* const OP = "logprobs";

std::tuple<Tensor, Tensor, Tensor, Tensor> logprobs(const Tensor& logits_, const Tensor& targets_, double temperature,
                                                    int64_t vocab_start, int64_t vocab_size) {
  STD_TORCH_CHECK(logits_.dim() == 2, OP, ": logits must have 2 dimensions, got ", logits_.dim());
  const int64_t N = logits_.size(0), V = logits_.size(1);
  const Call call(OP, logits_);
  const Dtype dtype = checked_dtype(call, "logits", logits_);
  const Tensor logits = checked_rows(call, "logits", logits_, N, V);
  const Tensor targets = checked_targets(call, targets_, nullptr, N, vocab_size);
  Tensor logprobs = new_float(logits, {N}), entropy = new_float(logits, {N});
  Tensor max = new_float(logits, {N}), log_sum = new_float(logits, {N});
  run<LogprobsParams>(
      call, logprobs_cpu, "logprobs",
      {logits.const_data_ptr(), data<int64_t>(targets), out<float>(logprobs), out<float>(entropy), out<float>(max),
       out<float>(log_sum), N, V, logits.stride(0), vocab_start, float(1 / temperature), dtype});
  return {logprobs, entropy, max, log_sum};
}

void backward_into(const Tensor& d_logits, const Tensor& logits, const Tensor& targets_, double temperature,
                   int64_t vocab_start, int64_t vocab_size, const Tensor& max_, const Tensor& log_sum_,
                   const Tensor& entropy_, const std::optional<Tensor>& d_logprobs_,
                   const std::optional<Tensor>& d_entropy_) {
  const int64_t N = logits.size(0), V = logits.size(1);
  const Call call(OP, logits);
  const Tensor targets = checked_targets(call, targets_, nullptr, N, vocab_size);
  const Tensor max = checked(call, "max", max_, ScalarType::Float, {N});
  const Tensor log_sum = checked(call, "log_sum", log_sum_, ScalarType::Float, {N});
  const Tensor entropy = checked(call, "entropy", entropy_, ScalarType::Float, {N});
  const auto d_logprobs = checked_optional(call, "d_logprobs", d_logprobs_, ScalarType::Float, {N});
  const auto d_entropy = checked_optional(call, "d_entropy", d_entropy_, ScalarType::Float, {N});
  run<LogprobsBackwardParams>(
      call, logprobs_backward_cpu, "logprobs_backward",
      {logits.const_data_ptr(), data<int64_t>(targets), data<float>(max), data<float>(log_sum), data<float>(entropy),
       data_or_null(d_logprobs), data_or_null(d_entropy), d_logits.mutable_data_ptr(), N, V, logits.stride(0),
       d_logits.stride(0), vocab_start, float(1 / temperature), checked_dtype(call, "logits", logits)});
}

Tensor logprobs_backward(const Tensor& logits_, const Tensor& targets, double temperature, int64_t vocab_start,
                         int64_t vocab_size, const Tensor& max, const Tensor& log_sum, const Tensor& entropy,
                         const std::optional<Tensor>& d_logprobs, const std::optional<Tensor>& d_entropy) {
  STD_TORCH_CHECK(logits_.dim() == 2, OP, ": logits must have 2 dimensions, got ", logits_.dim());
  const Tensor logits = checked_rows(Call(OP, logits_), "logits", logits_, logits_.size(0), logits_.size(1));
  Tensor d_logits = new_large(logits, logits.size(0), logits.size(1));
  backward_into(d_logits, logits, targets, temperature, vocab_start, vocab_size, max, log_sum, entropy, d_logprobs,
                d_entropy);
  return d_logits;
}

void logprobs_backward_(const Tensor& logits, const Tensor& targets, double temperature, int64_t vocab_start,
                        int64_t vocab_size, const Tensor& max, const Tensor& log_sum, const Tensor& entropy,
                        const std::optional<Tensor>& d_logprobs, const std::optional<Tensor>& d_entropy) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.stride(1) == 1, OP,
                  ": logits must be a matrix with unit column stride to be overwritten");
  backward_into(logits, logits, targets, temperature, vocab_start, vocab_size, max, log_sum, entropy, d_logprobs,
                d_entropy);
}

}  // namespace
}  // namespace aligner

STABLE_TORCH_LIBRARY_FRAGMENT(aligner, m) {
  m.def(
      "logprobs(Tensor logits, Tensor targets, float temperature, SymInt vocab_start, SymInt vocab_size)"
      " -> (Tensor logprobs, Tensor entropy, Tensor max, Tensor log_sum)");
  m.def(
      "logprobs_backward(Tensor logits, Tensor targets, float temperature, SymInt vocab_start, SymInt vocab_size,"
      " Tensor max, Tensor log_sum, Tensor entropy, Tensor? d_logprobs, Tensor? d_entropy) -> Tensor");
  m.def(
      "logprobs_backward_(Tensor(a!) logits, Tensor targets, float temperature, SymInt vocab_start, SymInt vocab_size,"
      " Tensor max, Tensor log_sum, Tensor entropy, Tensor? d_logprobs, Tensor? d_entropy) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(aligner, CompositeExplicitAutograd, m) {
  m.impl("logprobs", TORCH_BOX(&aligner::logprobs));
  m.impl("logprobs_backward", TORCH_BOX(&aligner::logprobs_backward));
  m.impl("logprobs_backward_", TORCH_BOX(&aligner::logprobs_backward_));
}
