#include "cuda_check.h"
#include "topk_distillation_loss.h"

CUDA_ENTRY(topk_distillation_loss)
CUDA_ENTRY(topk_distillation_loss_backward)

namespace {

using namespace check;
using aligner::Dtype;

struct Case {
  Dtype dtype;
  int64_t N, V, k, stride, offset;
  bool rest, masked, backward_kl;
  float temperature;
};

struct Inputs {
  explicit Inputs(const Case& c)
      : bytes(aligner::dtype_bytes(c.dtype)),
        offset(c.offset),
        memory((c.offset + c.N * c.stride + c.V) * bytes),
        ids(c.N * c.k),
        teacher(c.N * c.k),
        teacher_log_sum(c.N),
        d_kl(c.N),
        mask(c.N, true) {}
  void* logits() const { return memory.data() + offset * bytes; }

  int64_t bytes, offset;
  Array<uint8_t> memory;
  Array<int64_t> ids;
  Array<float> teacher, teacher_log_sum, d_kl;
  Array<bool> mask;
};

void fill(Random& random, const Case& c, const Inputs& in) {
  for (int64_t n = 0; n < c.N; ++n) {
    const Array<float> x = normal_array(random, c.V, 3);
    if (n == 1) x[random.below(c.V)] = 1e4f;
    if (n == 2) x[c.V - 1] = -INFINITY;
    in.mask[n] = n != 3;
    if (c.masked && n == 3) x[0] = NAN;
    set_values(in.logits(), c.dtype, n * c.stride, x);
    double sum = 0;
    for (int64_t i = 0; i < c.k; ++i) {  // different ids: a random start and a stride of 1
      in.ids[n * c.k + i] = (n * 37 + i * (c.V / c.k)) % c.V;
      in.teacher[n * c.k + i] = 4 * random.normal();
      sum += std::exp(in.teacher[n * c.k + i] / c.temperature);
    }
    in.teacher_log_sum[n] = float(std::log(sum + (n == 4 ? 0 : 2)));
    in.d_kl[n] = n == 0 ? 0 : random.normal();
  }
}

template <class Params>
Params params_of(const Case& c, const Inputs& in) {
  Params p{};
  p.logits = in.logits();
  p.topk_ids = in.ids.data();
  p.topk_logits = in.teacher.data();
  p.teacher_log_sum = c.rest ? in.teacher_log_sum.data() : nullptr;
  p.mask = c.masked ? in.mask.data() : nullptr;
  p.rows = c.N;
  p.columns = c.V;
  p.k = c.k;
  p.row_stride = c.stride;
  p.inverse_temperature = 1 / c.temperature;
  p.backward_kl = c.backward_kl;
  p.dtype = c.dtype;
  return p;
}

struct Outputs {
  explicit Outputs(int64_t N) : kl(N), max(N), log_sum(N), rest(N) {}
  Array<float> kl, max, log_sum, rest;
};
aligner::TopkDistillationLossParams forward(const Case& c, const Inputs& in, const Outputs& out) {
  auto p = params_of<aligner::TopkDistillationLossParams>(c, in);
  p.kl = out.kl.data();
  p.max = out.max.data();
  p.log_sum = out.log_sum.data();
  p.rest = out.rest.data();
  return p;
}
aligner::TopkDistillationLossBackwardParams backward(const Case& c, const Inputs& in, const Outputs& out, void* d) {
  auto p = params_of<aligner::TopkDistillationLossBackwardParams>(c, in);
  p.max = out.max.data();
  p.log_sum = out.log_sum.data();
  p.rest = out.rest.data();
  p.d_kl = in.d_kl.data();
  p.d_logits = d;
  return p;
}

void compare_one(Random& random, const Case& c) {
  const Inputs in(c);
  fill(random, c, in);
  const Outputs got(c.N), want(c.N);
  run(aligner_topk_distillation_loss_cuda, forward(c, in, got));
  aligner::portable::topk_distillation_loss_cpu(forward(c, in, want));
  expect_close("kl", got.kl, want.kl, 2e-6, 2e-6);
  expect_close("log denominator", log_denominator(got.max, got.log_sum, c.temperature),
               log_denominator(want.max, want.log_sum, c.temperature), 0, 2e-6);
  expect_close("rest", got.rest, want.rest, 1e-5, 1e-30);

  const Array<uint8_t> d(c.N * c.V * in.bytes), want_d(c.N * c.V * in.bytes);
  run(aligner_topk_distillation_loss_backward_cuda, backward(c, in, want, d.data()));
  aligner::portable::topk_distillation_loss_backward_cpu(backward(c, in, want, want_d.data()));
  const double step = c.dtype == Dtype::float32 ? 1e-5 : c.dtype == Dtype::bfloat16 ? 8e-3 : 1e-3;
  expect_close("d_logits", values(d.data(), c.dtype, 0, c.N * c.V), values(want_d.data(), c.dtype, 0, c.N * c.V), step,
               5e-7);
}

void compare(Random& random) {
  for (const bool backward_kl : {false, true}) {
    compare_one(random, {Dtype::float32, 6, 1003, 17, 1003, 0, true, true, backward_kl, 1});
    compare_one(random, {Dtype::float32, 5, 130, 33, 131, 3, false, true, backward_kl, 2});
    compare_one(random, {Dtype::bfloat16, 6, 2050, 64, 2055, 1, true, false, backward_kl, 0.8f});
    compare_one(random, {Dtype::float16, 5, 515, 8, 520, 5, true, true, backward_kl, 1});
  }
  compare_one(random, {Dtype::float32, 2, 40, 40, 40, 0, true, false, false, 1});
  compare_one(random, {Dtype::bfloat16, 1, 66001, 5, 66001, 0, true, false, false, 1});
  compare_one(random, {Dtype::float16, 0, 40, 3, 40, 0, true, false, true, 1});
}

void large() {
  const Case c{Dtype::float32, 8, 49152, 64, 49152, 0, true, false, false, 1};
  Random random(0);
  const Inputs in(c);
  fill(random, c, in);
  const Outputs out(c.N);
  const Array<uint8_t> d(c.N * c.V * in.bytes);
  const int64_t bytes = c.N * c.V * in.bytes, top = c.N * c.k * 12;
  minimum("topk_distillation_row<T>", bytes + top, c.N * 16);
  minimum("topk_distillation_gradient<T>", bytes + top, bytes);
  run(aligner_topk_distillation_loss_cuda, forward(c, in, out));
  in.d_kl[0] = 1;
  run(aligner_topk_distillation_loss_backward_cuda, backward(c, in, out, d.data()));
}

const Cases cases("topk_distillation_loss", compare, large);

}  // namespace
