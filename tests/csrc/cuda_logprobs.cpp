#include <sys/mman.h>

#include "cuda_check.h"
#include "logprobs.h"

CUDA_ENTRY(logprobs)
CUDA_ENTRY(logprobs_backward)

namespace {

using namespace check;
using aligner::Dtype;

constexpr float SMALL = 1e-6f;

struct Rows {  // N rows of V logits of any dtype, `offset` elements into their memory, `stride` apart
  Rows(Dtype dtype, int64_t N, int64_t V, int64_t stride, int64_t offset)
      : bytes(aligner::dtype_bytes(dtype)), offset(offset), memory((offset + N * stride + V) * bytes) {}
  void* data() const { return memory.data() + offset * bytes; }

  int64_t bytes, offset;
  Array<uint8_t> memory;
};

struct Case {
  Dtype dtype;
  int64_t N, V, stride, offset;
  float scale, temperature;
  int64_t vocab_start = 0;
};

void fill(Random& random, const Case& c, const Rows& logits, Array<int64_t>& targets) {
  for (int64_t n = 0; n < c.N; ++n) {
    targets[n] = random.below(c.V + 2 * c.vocab_start);
    const Array<float> x = normal_array(random, c.V, c.scale);
    for (int64_t v = 0; v < c.V; ++v) {
      if (random.chance(0.02) && v != targets[n] - c.vocab_start) x[v] = -INFINITY;
    }
    if (n == 2) x[random.below(c.V)] = 1e4f;
    if (n == 3) x[random.below(c.V)] = NAN;
    if (n == 4) x[0] = -1e4f;
    set_values(logits.data(), c.dtype, n * c.stride, x);
  }
}

void compare_backward(Random& random, const Case& c, const Rows& logits, const Array<int64_t>& targets,
                      const Array<float>* statistics, int64_t d_offset, bool in_place) {
  const Array<float> d_logprobs = normal_array(random, c.N), d_entropy = normal_array(random, c.N);
  if (c.N > 1) d_logprobs[1] = d_entropy[1] = 0;
  const bool both = random.chance(0.7);
  const Rows got(c.dtype, c.N, c.V, c.stride, d_offset), want(c.dtype, c.N, c.V, c.stride, d_offset);
  const auto params = [&](void* d_logits) {
    aligner::LogprobsBackwardParams p{};
    p.logits = logits.data();
    p.targets = targets.data();
    p.max = statistics[2].data();
    p.log_sum = statistics[3].data();
    p.entropy = statistics[1].data();
    p.d_logprobs = d_logprobs.data();
    p.d_entropy = both ? d_entropy.data() : nullptr;
    p.d_logits = d_logits;
    p.rows = c.N;
    p.columns = c.V;
    p.row_stride = p.d_row_stride = c.stride;
    p.vocab_start = c.vocab_start;
    p.inverse_temperature = 1 / c.temperature;
    p.dtype = c.dtype;
    return p;
  };
  aligner::portable::logprobs_backward_cpu(params(want.data()));
  run(aligner_logprobs_backward_cuda, params(in_place ? logits.data() : got.data()));
  const void* result = in_place ? logits.data() : got.data();
  // Half precision may round to the neighbour.
  const double step = c.dtype == Dtype::float32 ? 4e-6 : c.dtype == Dtype::bfloat16 ? 8e-3 : 1e-3;
  for (int64_t n = 0; n < c.N; ++n) {
    expect_close("d_logits", values(result, c.dtype, n * c.stride, c.V),
                 values(want.data(), c.dtype, n * c.stride, c.V), step, c.dtype == Dtype::float16 ? 1e-7 : 2e-7);
  }
}

void compare_one(Random& random, const Case& c) {
  const Rows logits(c.dtype, c.N, c.V, c.stride, c.offset);
  Array<int64_t> targets(c.N);
  fill(random, c, logits, targets);
  // logprobs, entropy, max, log_sum
  const Array<float> got[4] = {Array<float>(c.N), Array<float>(c.N), Array<float>(c.N), Array<float>(c.N)};
  const Array<float> want[4] = {Array<float>(c.N), Array<float>(c.N), Array<float>(c.N), Array<float>(c.N)};
  const auto params = [&](const Array<float>* out) {
    return aligner::LogprobsParams{
        logits.data(), targets.data(), out[0].data(), out[1].data(),     out[2].data(), out[3].data(), c.N,
        c.V,           c.stride,       c.vocab_start, 1 / c.temperature, c.dtype};
  };
  run(aligner_logprobs_cuda, params(got));
  aligner::portable::logprobs_cpu(params(want));
  expect_close("logprobs", got[0], want[0], 1e-6, 2 * SMALL);
  expect_close("entropy", got[1], want[1], 1e-6, 2 * SMALL);
  expect_close("log denominator", log_denominator(got[2], got[3], c.temperature),
               log_denominator(want[2], want[3], c.temperature), 0, 2 * SMALL);
  compare_backward(random, c, logits, targets, want, c.offset, false);
  compare_backward(random, c, logits, targets, want, c.offset + 1, false);
  compare_backward(random, c, logits, targets, want, c.offset, true);
}

// A row more than 2^31 elements behind the first: of the memory between them only the pages touched exist.
void compare_far_rows() {
  const int64_t V = 40, stride = (int64_t(1) << 31) + 24, bytes = (stride + V) * 2;
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  expect("mmap of sparse memory", memory != MAP_FAILED);
  Random random(0);
  const Array<float> x = normal_array(random, V);
  for (const int64_t first : {int64_t(0), stride}) set_values(memory, Dtype::bfloat16, first, x);
  const Array<int64_t> targets(2, 7);
  const Array<float> logprobs(2), entropy(2), max(2), log_sum(2), one(2, 1.f);
  run(aligner_logprobs_cuda,
      aligner::LogprobsParams{memory, targets.data(), logprobs.data(), entropy.data(), max.data(), log_sum.data(), 2, V,
                              stride, 0, 1.f, Dtype::bfloat16});
  expect("far row: logprobs", logprobs[0] == logprobs[1] && logprobs[0] < 0);
  run(aligner_logprobs_backward_cuda,
      aligner::LogprobsBackwardParams{memory, targets.data(), max.data(), log_sum.data(), entropy.data(), one.data(),
                                      nullptr, memory, 2, V, stride, stride, 0, 1.f, Dtype::bfloat16});
  expect_close("far row: d_logits", values(memory, Dtype::bfloat16, stride, V), values(memory, Dtype::bfloat16, 0, V),
               0, 0);
  expect("far row: d_logits at the target", values(memory, Dtype::bfloat16, stride + 7, 1)[0] > 0);
  munmap(memory, bytes);
}

void compare(Random& random) {
  compare_one(random, {Dtype::float32, 0, 7, 7, 0, 1, 1});
  compare_one(random, {Dtype::float32, 5, 1, 1, 0, 1, 1});
  compare_one(random, {Dtype::float32, 6, 1003, 1003, 0, 4, 1});
  compare_one(random, {Dtype::float32, 5, 300, 304, 3, 4, 0.7f, 50});
  compare_one(random, {Dtype::bfloat16, 6, 2049, 2051, 5, 4, 1.3f});
  compare_one(random, {Dtype::bfloat16, 5, 37, 40, 0, 30, 1});
  compare_one(random, {Dtype::float16, 6, 515, 520, 1, 4, 1});
  compare_one(random, {Dtype::float16, 5, 4096, 4096, 0, 1, 1});
  compare_far_rows();
}

void large() {
  const int64_t N = 8, V = 49152;
  for (const Dtype dtype : {Dtype::float32, Dtype::bfloat16}) {
    const Rows logits(dtype, N, V, V, 0);
    for (int64_t n = 0; n < N; ++n) set_values(logits.data(), dtype, n * V, Array<float>(V, 0.5f));
    const Array<int64_t> targets(N, 11);
    const Array<float> logprobs(N), entropy(N), max(N), log_sum(N), one(N, 1.f);
    const int64_t bytes = N * V * aligner::dtype_bytes(dtype);
    minimum("logprobs_row<T>", bytes, N * 16);
    minimum("logprobs_gradient<T>", bytes, bytes);
    run(aligner_logprobs_cuda, aligner::LogprobsParams{logits.data(), targets.data(), logprobs.data(), entropy.data(),
                                                       max.data(), log_sum.data(), N, V, V, 0, 1.f, dtype});
    run(aligner_logprobs_backward_cuda,
        aligner::LogprobsBackwardParams{logits.data(), targets.data(), max.data(), log_sum.data(), entropy.data(),
                                        one.data(), nullptr, logits.data(), N, V, V, V, 0, 1.f, dtype});
  }
}

const Cases cases("logprobs", compare, large);

}  // namespace
