#include "parallel.h"
#include "segment_sum.h"
#include "simd.h"
#include "token_weights.h"

namespace aligner::ALIGNER_ISA {

constexpr int64_t SEQUENCES = 8;  // fewer are not worth a thread

static void sum_sequence(const SegmentSumParams& p, int64_t b) {
  const int64_t end = p.cu_seqlens[b + 1];
  vdouble sum{}, count{};
  for (int64_t i = p.cu_seqlens[b]; i < end; i += LANES) {
    const vfloat w = load_weights(p.mask, nullptr, i, end - i);
    sum += widen_sum(keep(w, load_some<Float32>(p.x + i, end - i, 0.f)));
    count += widen_sum(w);
  }
  const double tokens = hsum(count);
  p.result[b] = float(p.mean && tokens > 1 ? hsum(sum) / tokens : hsum(sum));
}

void segment_sum_cpu(const SegmentSumParams& p) {
  parallel_parts(p.num_sequences, SEQUENCES, [&](int64_t begin, int64_t end, int) {
    for (int64_t b = begin; b < end; ++b) sum_sequence(p, b);
  });
}

static void spread_sequence(const SegmentSumBackwardParams& p, int64_t b) {
  const int64_t begin = p.cu_seqlens[b], end = p.cu_seqlens[b + 1];
  int64_t tokens = end - begin;
  if (p.mask) {
    tokens = 0;
    for (int64_t i = begin; i < end; ++i) tokens += p.mask[i];
  }
  const float d = p.mean && tokens > 1 ? float(double(p.d_result[b]) / tokens) : p.d_result[b];
  for (int64_t i = begin; i < end; i += LANES) {
    const vfloat w = load_weights(p.mask, nullptr, i, end - i);
    store_some<Float32>(p.d_x + i, keep(w, splat(d)), end - i);
  }
}

void segment_sum_backward_cpu(const SegmentSumBackwardParams& p) {
  parallel_parts(p.num_sequences, SEQUENCES, [&](int64_t begin, int64_t end, int) {
    for (int64_t b = begin; b < end; ++b) spread_sequence(p, b);
  });
}

}  // namespace aligner::ALIGNER_ISA
