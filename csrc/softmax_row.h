// Online softmax statistics of a row and the gradient through them. Included only by *_cpu.cpp.
// The maximum and the logarithm of the sum are kept apart: added up, a maximum of 1e4 would swallow the other's digits.
#pragma once
#include <math.h>

#include "simd.h"

namespace aligner::ALIGNER_ISA {

// z = (x - max) * inverse_temperature over the elements seen; sum = sum e^z, weighted = sum e^z z. While a row is read
// `max` need not be the largest element: it is one that none of them exceeds by much, so that no e^z overflows.
struct RowStats {
  float max = -INFINITY, largest = -INFINITY;
  double sum = 0, weighted = 0;
};

template <class D>
ALIGNER_INLINE float row_max(const typename D::T* x, int64_t count) {
  vfloat m0 = splat(-INFINITY), m1 = m0, m2 = m0, m3 = m0;
  int64_t i = 0;
  for (; i + 4 * LANES <= count; i += 4 * LANES) {
    m0 = vmax(D::load(x + i), m0);
    m1 = vmax(D::load(x + i + LANES), m1);
    m2 = vmax(D::load(x + i + 2 * LANES), m2);
    m3 = vmax(D::load(x + i + 3 * LANES), m3);
  }
  for (; i < count; i += LANES) m0 = vmax(load_some<D>(x + i, count - i, -INFINITY), m0);
  return hmax(vmax(vmax(m0, m1), vmax(m2, m3)));
}

struct BlockStats {
  double sum, weighted;  // of base-2 exponents: sum 2^y, sum 2^y y
  float max;
};

// One reading of `count` elements against the reference `max`.
template <class D>
ALIGNER_INLINE BlockStats read_block(const typename D::T* x, int64_t count, float reference,
                                     float inverse_temperature) {
  const vfloat max = splat(reference), k = splat(inverse_temperature * LOG2E);
  vfloat s0{}, s1{}, t0{}, t1{}, m0 = splat(-INFINITY), m1 = m0;
  int64_t i = 0;
  for (; i + 2 * LANES <= count; i += 2 * LANES) {
    const vfloat x0 = D::load(x + i), x1 = D::load(x + i + LANES);
    vfloat y0 = (x0 - max) * k, y1 = (x1 - max) * k;
    const vfloat e0 = exp2_or_zero(y0), e1 = exp2_or_zero(y1);
    m0 = vmax(x0, m0);
    m1 = vmax(x1, m1);
    s0 += e0;
    s1 += e1;
    t0 += e0 * y0;
    t1 += e1 * y1;
  }
  for (; i < count; i += LANES) {
    const vfloat x0 = load_some<D>(x + i, count - i, -INFINITY);
    vfloat y = (x0 - max) * k;
    const vfloat e = exp2_or_zero(y);
    m0 = vmax(x0, m0);
    s0 += e;
    t0 += e * y;
  }
  return {hsum(s0) + hsum(s1), hsum(t0) + hsum(t1), hmax(vmax(m0, m1))};
}

// The statistics with another reference.
ALIGNER_INLINE void move_reference(RowStats& s, float max, float inverse_temperature) {
  if (s.sum > 0) {
    const double z = (double(s.max) - max) * inverse_temperature, scale = ::exp(z);
    s.weighted = scale > 0 ? scale * (s.weighted + s.sum * z) : 0.0;
    s.sum *= scale;
  }
  s.max = max;
}

// Adds `count` more elements of a row. The reference is the first block's maximum; where a later one exceeds it by more
// than e^6 the block, still in the L1 cache, is read again.
template <class D>
ALIGNER_INLINE void update_row(RowStats& s, const typename D::T* x, int64_t count, float inverse_temperature) {
  if (s.max == -INFINITY) s.max = row_max<D>(x, count);
  const float reference = s.max == -INFINITY ? 0.f : s.max;
  BlockStats b = read_block<D>(x, count, reference, inverse_temperature);
  if ((b.max - reference) * inverse_temperature > 6.f && s.max != -INFINITY) {
    move_reference(s, b.max, inverse_temperature);
    b = read_block<D>(x, count, b.max, inverse_temperature);
  }
  s.largest = b.max > s.largest ? b.max : s.largest;
  s.sum += b.sum;
  s.weighted += b.weighted * 0.6931471805599453;
}

// After the last block: `max` is the largest element.
ALIGNER_INLINE void finish_row(RowStats& s, float inverse_temperature) {
  if (s.largest != s.max) move_reference(s, s.largest, inverse_temperature);
}

// Statistics of the elements of both.
ALIGNER_INLINE RowStats merge_rows(const RowStats& a, const RowStats& b, float inverse_temperature) {
  const RowStats &high = a.max >= b.max ? a : b, &low = a.max >= b.max ? b : a;
  const double z = (double(low.max) - high.max) * inverse_temperature, scale = low.sum > 0 ? ::exp(z) : 0.0;
  RowStats s = high;
  if (scale > 0) {
    s.weighted += scale * (low.weighted + low.sum * z);
    s.sum += scale * low.sum;
  } else if (low.sum != low.sum) {
    s.sum = low.sum;  // NaN
  }
  return s;
}

// Entropy in nats: log(sum) - E[z]. Both terms are >= 0, so nothing cancels.
ALIGNER_INLINE double row_entropy(const RowStats& s) { return ::log(s.sum) - s.weighted / s.sum; }

// What the gradient of a row needs; target is negative when it is not among the row's elements.
struct RowGradient {
  float max, log_sum, entropy;  // raw logit unit; nats; nats
  float d_logprob, d_entropy;   // upstream gradients
  float inverse_temperature;
  int64_t target;
};

// dx_j = ((j == target) d_logprob - p_j (d_logprob + d_entropy (log p_j + H))) / temperature; dx may be x itself.
template <class D>
ALIGNER_INLINE void gradient_row(const RowGradient& g, const typename D::T* x, typename D::T* dx, int64_t count) {
  const float it = g.inverse_temperature;
  const vfloat k = splat(it * LOG2E), max = splat(g.max), shift = splat(-g.log_sum * LOG2E);
  const vfloat a = splat(-it * (g.d_logprob + g.d_entropy * g.entropy)), b = splat(-it * g.d_entropy * LN2);
  const bool here = g.target >= 0 && g.target < count;
  float at_target = 0.f;
  if (here) {
    vfloat y = (splat(D::get(x + g.target)) - max) * k + shift;
    const vfloat p = exp2_or_zero(y);
    at_target = it * g.d_logprob * (1.f - p[0]) - it * g.d_entropy * p[0] * (y[0] * LN2 + g.entropy);
  }
  constexpr bool sixteen_bit = sizeof(typename D::T) == 2;  // whose rounding hides a shorter polynomial
  int64_t i = 0;
  for (; i + 2 * LANES <= count; i += 2 * LANES) {
    vfloat y0 = (D::load(x + i) - max) * k + shift, y1 = (D::load(x + i + LANES) - max) * k + shift;
    const vfloat p0 = exp2_or_zero<sixteen_bit>(y0), p1 = exp2_or_zero<sixteen_bit>(y1);
    D::store_two(dx + i, p0 * (b * y0 + a), p1 * (b * y1 + a));
  }
  for (; i < count; i += LANES) {
    vfloat y = (load_some<D>(x + i, count - i, -INFINITY) - max) * k + shift;
    const vfloat p = exp2_or_zero<sixteen_bit>(y);
    store_some<D>(dx + i, p * (b * y + a), count - i);
  }
  if (here) store_part<D>(dx + g.target, splat(at_target), 1);
}

}  // namespace aligner::ALIGNER_ISA
