#include "topk_distillation_loss.h"

#include "checks.h"

namespace aligner {
namespace {

const char* const OP = "topk_distillation_loss";

struct Inputs {
  Tensor logits, topk_ids, topk_logits;
  std::optional<Tensor> teacher_log_sum, mask;
  int64_t N, V, K;
  Dtype dtype;
};

Inputs checked_inputs(const Call& call, const Tensor& logits, const Tensor& topk_ids, const Tensor& topk_logits,
                      const std::optional<Tensor>& teacher_log_sum, const std::optional<Tensor>& mask) {
  STD_TORCH_CHECK(logits.dim() == 2 && topk_ids.dim() == 2, OP, ": logits and topk_ids must have 2 dimensions, got ",
                  logits.dim(), " and ", topk_ids.dim());
  Inputs in;
  in.N = logits.size(0), in.V = logits.size(1), in.K = topk_ids.size(1);
  in.dtype = checked_dtype(call, "logits", logits);
  in.logits = checked_rows(call, "logits", logits, in.N, in.V);
  in.topk_ids = checked(call, "topk_ids", topk_ids, ScalarType::Long, {in.N, in.K});
  in.topk_logits = checked(call, "topk_logits", topk_logits, ScalarType::Float, {in.N, in.K});
  in.teacher_log_sum = checked_optional(call, "teacher_log_sum", teacher_log_sum, ScalarType::Float, {in.N});
  in.mask = checked_optional(call, "mask", mask, ScalarType::Bool, {in.N});
  STD_TORCH_CHECK(in.K > 0, OP, ": topk_ids must have at least one column, got 0");
  for (int64_t i = 0; call.is_cpu && i < in.N * in.K; ++i) {
    const int64_t id = data<int64_t>(in.topk_ids)[i];
    STD_TORCH_CHECK((in.mask && !data<bool>(*in.mask)[i / in.K]) || (id >= 0 && id < in.V), OP,
                    ": topk_ids must be in [0, ", in.V, "), got ", id, " in row ", i / in.K);
  }
  return in;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> topk_distillation_loss(const Tensor& logits, const Tensor& topk_ids,
                                                                  const Tensor& topk_logits,
                                                                  const std::optional<Tensor>& teacher_log_sum,
                                                                  const std::optional<Tensor>& mask, double temperature,
                                                                  bool backward_kl) {
  const Call call(OP, logits);
  const Inputs in = checked_inputs(call, logits, topk_ids, topk_logits, teacher_log_sum, mask);
  Tensor kl = new_float(logits, {in.N}), max = new_float(logits, {in.N}), log_sum = new_float(logits, {in.N});
  Tensor rest = new_float(logits, {in.N});
  run<TopkDistillationLossParams>(call, topk_distillation_loss_cpu, "topk_distillation_loss",
                                  {in.logits.const_data_ptr(), data<int64_t>(in.topk_ids), data<float>(in.topk_logits),
                                   data_or_null(in.teacher_log_sum), in.mask ? data<bool>(*in.mask) : nullptr,
                                   out<float>(kl), out<float>(max), out<float>(log_sum), out<float>(rest), in.N, in.V,
                                   in.K, in.logits.stride(0), float(1 / temperature), backward_kl, in.dtype});
  return {kl, max, log_sum, rest};
}

Tensor topk_distillation_loss_backward(const Tensor& logits, const Tensor& topk_ids, const Tensor& topk_logits,
                                       const std::optional<Tensor>& teacher_log_sum, const std::optional<Tensor>& mask,
                                       double temperature, bool backward_kl, const Tensor& max_, const Tensor& log_sum_,
                                       const Tensor& rest_, const Tensor& d_kl_) {
  const Call call(OP, logits);
  const Inputs in = checked_inputs(call, logits, topk_ids, topk_logits, teacher_log_sum, mask);
  const Tensor max = checked(call, "max", max_, ScalarType::Float, {in.N});
  const Tensor log_sum = checked(call, "log_sum", log_sum_, ScalarType::Float, {in.N});
  const Tensor rest = checked(call, "rest", rest_, ScalarType::Float, {in.N});
  const Tensor d_kl = checked(call, "d_kl", d_kl_, ScalarType::Float, {in.N});
  Tensor d_logits = new_large(logits, in.N, in.V);
  run<TopkDistillationLossBackwardParams>(
      call, topk_distillation_loss_backward_cpu, "topk_distillation_loss_backward",
      {in.logits.const_data_ptr(), data<int64_t>(in.topk_ids), data<float>(in.topk_logits),
       data_or_null(in.teacher_log_sum), in.mask ? data<bool>(*in.mask) : nullptr, data<float>(max),
       data<float>(log_sum), data<float>(rest), data<float>(d_kl), d_logits.mutable_data_ptr(), in.N, in.V, in.K,
       in.logits.stride(0), float(1 / temperature), backward_kl, in.dtype});
  return d_logits;
}

}  // namespace
}  // namespace aligner

STABLE_TORCH_LIBRARY_FRAGMENT(aligner, m) {
  m.def(
      "topk_distillation_loss(Tensor logits, Tensor topk_ids, Tensor topk_logits, Tensor? teacher_log_sum,"
      " Tensor? mask, float temperature, bool backward_kl) -> (Tensor kl, Tensor max, Tensor log_sum, Tensor rest)");
  m.def(
      "topk_distillation_loss_backward(Tensor logits, Tensor topk_ids, Tensor topk_logits, Tensor? teacher_log_sum,"
      " Tensor? mask, float temperature, bool backward_kl, Tensor max, Tensor log_sum, Tensor rest, Tensor "
      "d_kl)"
      " -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(aligner, CompositeExplicitAutograd, m) {
  m.impl("topk_distillation_loss", TORCH_BOX(&aligner::topk_distillation_loss));
  m.impl("topk_distillation_loss_backward", TORCH_BOX(&aligner::topk_distillation_loss_backward));
}
