#include "cuda_check.h"
#include "segment_sum.h"

CUDA_ENTRY(segment_sum)
CUDA_ENTRY(segment_sum_backward)

namespace {

using namespace check;

void compare_one(Random& random, const Array<int32_t>& cu_seqlens, bool masked, double share, bool mean) {
  const int64_t B = cu_seqlens.size - 1, N = cu_seqlens[B];
  const Array<float> x = normal_array(random, N, 1, 0.1f), d_result = normal_array(random, B);
  const Array<bool> mask = random_mask(random, masked ? share : 1, {&x});
  const bool* m = masked ? mask.data() : nullptr;
  const Array<float> result(B), want_result(B), d_x(N), want_d_x(N);
  run(aligner_segment_sum_cuda, aligner::SegmentSumParams{x.data(), m, cu_seqlens.data(), result.data(), B, mean});
  aligner::portable::segment_sum_cpu({x.data(), m, cu_seqlens.data(), want_result.data(), B, mean});
  expect_close("result", result, want_result, 1e-6, 1e-6);
  run(aligner_segment_sum_backward_cuda,
      aligner::SegmentSumBackwardParams{d_result.data(), m, cu_seqlens.data(), d_x.data(), B, mean});
  aligner::portable::segment_sum_backward_cpu({d_result.data(), m, cu_seqlens.data(), want_d_x.data(), B, mean});
  expect_close("d_x", d_x, want_d_x, 1e-7, 0);
}

void compare(Random& random) {
  compare_one(random, random_cu_seqlens(random, 0, 1), true, 0.5, true);
  for (const bool mean : {false, true}) {
    compare_one(random, random_cu_seqlens(random, 9, 400), true, 0.6, mean);
    compare_one(random, random_cu_seqlens(random, 9, 50), false, 1, mean);
    compare_one(random, random_cu_seqlens(random, 5, 30), true, 0, mean);
  }
}

void large() {
  Random random(0);
  const Array<int32_t> cu_seqlens = random_cu_seqlens(random, 128, 2048);
  const int64_t N = cu_seqlens[128];
  const Array<float> x(N, 1.f), d_x(N), result(128);
  const Array<bool> mask(N, true);
  minimum("segment_sums", N * 5 + 129 * 4, 128 * 4);
  minimum("segment_sum_spread", N + 129 * 4 + 128 * 4, N * 4);
  run(aligner_segment_sum_cuda,
      aligner::SegmentSumParams{x.data(), mask.data(), cu_seqlens.data(), result.data(), 128, true});
  run(aligner_segment_sum_backward_cuda,
      aligner::SegmentSumBackwardParams{result.data(), mask.data(), cu_seqlens.data(), d_x.data(), 128, false});
}

const Cases cases("segment_sum", compare, large);

}  // namespace
