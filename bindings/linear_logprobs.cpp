#include "linear_logprobs.h"

#include "checks.h"

namespace aligner {
namespace {

const char* const OP = "linear_logprobs";

struct Inputs {
  Tensor hidden, weight;
  std::optional<Tensor> mask;
  std::vector<int64_t> targets, rows;  // columns of this rank's shard; active rows
  Dtype dtype;
  int64_t N, V, H;
};

Inputs checked_inputs(const Tensor& hidden, const Tensor& weight, const Tensor& targets,
                      const std::optional<Tensor>& mask, int64_t vocab_start, int64_t vocab_size) {
  STD_TORCH_CHECK(hidden.dim() == 2 && weight.dim() == 2, OP, ": hidden and weight must have 2 dimensions, got ",
                  hidden.dim(), " and ", weight.dim());
  STD_TORCH_CHECK(hidden.scalar_type() == weight.scalar_type(), OP, ": hidden and weight must have one dtype, got ",
                  torch::headeronly::toString(hidden.scalar_type()), " and ",
                  torch::headeronly::toString(weight.scalar_type()));
  const Call call(OP, hidden);
  Inputs in;
  in.N = hidden.size(0), in.H = hidden.size(1), in.V = weight.size(0);
  in.dtype = checked_dtype(call, "hidden", hidden);
  in.hidden = checked_rows(call, "hidden", hidden, in.N, in.H);
  in.weight = checked_rows(call, "weight", weight, in.V, in.H);
  in.mask = checked_optional(call, "mask", mask, ScalarType::Bool, {in.N});
  const bool* keep = in.mask ? data<bool>(*in.mask) : nullptr;
  const Tensor ids = checked_targets(call, targets, keep, in.N, vocab_size);
  for (int64_t n = 0; n < in.N; ++n) in.targets.push_back(data<int64_t>(ids)[n] - vocab_start);
  for (int64_t n = 0; n < in.N; ++n) {
    if (!keep || keep[n]) in.rows.push_back(n);
  }
  return in;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_logprobs(const Tensor& hidden, const Tensor& weight,
                                                           const Tensor& targets, const std::optional<Tensor>& mask,
                                                           double temperature, int64_t vocab_start,
                                                           int64_t vocab_size) {
  const Inputs in = checked_inputs(hidden, weight, targets, mask, vocab_start, vocab_size);
  auto zeros = [&] { return torch::stable::new_zeros(in.hidden, {in.N}, ScalarType::Float); };
  Tensor logprobs = zeros(), entropy = zeros(), max = zeros(), log_sum = zeros();
  linear_logprobs_cpu({in.hidden.const_data_ptr(), in.weight.const_data_ptr(), in.rows.data(), in.targets.data(),
                       out<float>(logprobs), out<float>(entropy), out<float>(max), out<float>(log_sum),
                       int64_t(in.rows.size()), in.V, in.H, in.hidden.stride(0), in.weight.stride(0),
                       float(1 / temperature), in.dtype});
  return {logprobs, entropy, max, log_sum};
}

// A gradient that is not asked for comes back with 0 elements.
std::tuple<Tensor, Tensor> linear_logprobs_backward(const Tensor& hidden, const Tensor& weight, const Tensor& targets,
                                                    const std::optional<Tensor>& mask, double temperature,
                                                    int64_t vocab_start, int64_t vocab_size, const Tensor& max_,
                                                    const Tensor& log_sum_, const Tensor& entropy_,
                                                    const std::optional<Tensor>& d_logprobs_,
                                                    const std::optional<Tensor>& d_entropy_, bool need_hidden,
                                                    bool need_weight) {
  Inputs in = checked_inputs(hidden, weight, targets, mask, vocab_start, vocab_size);
  const Call call(OP, hidden);
  const Tensor max = checked(call, "max", max_, ScalarType::Float, {in.N});
  const Tensor log_sum = checked(call, "log_sum", log_sum_, ScalarType::Float, {in.N});
  const Tensor entropy = checked(call, "entropy", entropy_, ScalarType::Float, {in.N});
  const auto d_logprobs = checked_optional(call, "d_logprobs", d_logprobs_, ScalarType::Float, {in.N});
  const auto d_entropy = checked_optional(call, "d_entropy", d_entropy_, ScalarType::Float, {in.N});
  const float *g = data_or_null(d_logprobs), *g_entropy = data_or_null(d_entropy);
  std::vector<int64_t> rows;  // a row whose loss is clipped or masked has no upstream gradient, and costs nothing
  for (int64_t n : in.rows) {
    if ((g && g[n] != 0.f) || (g_entropy && g_entropy[n] != 0.f)) rows.push_back(n);
  }
  Tensor d_hidden = torch::stable::new_zeros(in.hidden, {need_hidden ? in.N : 0, in.H});
  Tensor d_weight = new_large(in.weight, need_weight ? in.V : 0, in.H);
  linear_logprobs_backward_cpu({in.hidden.const_data_ptr(), in.weight.const_data_ptr(), rows.data(), in.targets.data(),
                                data<float>(max), data<float>(log_sum), data<float>(entropy), g, g_entropy,
                                need_hidden ? d_hidden.mutable_data_ptr() : nullptr,
                                need_weight ? d_weight.mutable_data_ptr() : nullptr, int64_t(rows.size()), in.V, in.H,
                                in.hidden.stride(0), in.weight.stride(0), float(1 / temperature), in.dtype});
  return {d_hidden, d_weight};
}

}  // namespace
}  // namespace aligner

STABLE_TORCH_LIBRARY_FRAGMENT(aligner, m) {
  m.def(
      "linear_logprobs(Tensor hidden, Tensor weight, Tensor targets, Tensor? mask, float temperature,"
      " SymInt vocab_start, SymInt vocab_size) -> (Tensor logprobs, Tensor entropy, Tensor max, Tensor log_sum)");
  m.def(
      "linear_logprobs_backward(Tensor hidden, Tensor weight, Tensor targets, Tensor? mask, float temperature,"
      " SymInt vocab_start, SymInt vocab_size, Tensor max, Tensor log_sum, Tensor entropy, Tensor? d_logprobs,"
      " Tensor? d_entropy, bool need_hidden, bool need_weight) -> (Tensor d_hidden, Tensor d_weight)");
}
STABLE_TORCH_LIBRARY_IMPL(aligner, CPU, m) {
  m.impl("linear_logprobs", TORCH_BOX(&aligner::linear_logprobs));
  m.impl("linear_logprobs_backward", TORCH_BOX(&aligner::linear_logprobs_backward));
}
