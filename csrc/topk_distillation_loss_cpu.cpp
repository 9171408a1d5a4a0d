#include "parallel.h"
#include "softmax_row.h"
#include "topk_distillation_loss.h"

namespace aligner::ALIGNER_ISA {

constexpr int64_t BLOCK = 2048;  // elements; a block stays in L1 for its second reading

// Teacher and student on the top k of one token. All in double: k is small, and 1 - sum cancels.
template <class D, class P>
struct TopK {
  const P& p;
  const typename D::T* z;
  const int64_t* ids;
  const float* teacher;
  double teacher_log_sum, max, log_sum;

  TopK(const P& params, int64_t n)
      : p(params),
        z(static_cast<const typename D::T*>(p.logits) + n * p.row_stride),
        ids(p.topk_ids + n * p.k),
        teacher(p.topk_logits + n * p.k),
        teacher_log_sum(p.teacher_log_sum ? p.teacher_log_sum[n] : log_sum_of_teacher()) {}

  double log_sum_of_teacher() const {
    double largest = -INFINITY, sum = 0;
    for (int64_t i = 0; i < p.k; ++i) largest = teacher[i] > largest ? teacher[i] : largest;
    for (int64_t i = 0; i < p.k; ++i) sum += ::exp((teacher[i] - largest) * p.inverse_temperature);
    return largest * p.inverse_temperature + ::log(sum);
  }
  double student(int64_t i) const { return D::get(z + ids[i]); }
  double log_p(int64_t i) const { return double(teacher[i]) * p.inverse_temperature - teacher_log_sum; }
  double log_q(int64_t i) const { return (student(i) - max) * p.inverse_temperature - log_sum; }
};

// x log(x / y), where 0 log 0 = 0.
ALIGNER_INLINE double kl_term(double log_x, double log_y) {
  const double x = ::exp(log_x);
  return x > 0 ? x * (log_x - log_y) : 0.0;
}

// Statistics of the student's row outside the top k: what remains is not 1 - sum, which would cancel.
template <class D, class P>
static RowStats rest_of_row(const TopK<D, P>& t) {
  RowStats s;
  float block[BLOCK];
  for (int64_t v = 0; v < t.p.columns; v += BLOCK) {
    const int64_t count = smaller(BLOCK, t.p.columns - v);
    for (int64_t i = 0; i < count; i += LANES) {
      store_some<Float32>(block + i, load_some<D>(t.z + v + i, count - i, 0.f), count - i);
    }
    for (int64_t i = 0; i < t.p.k; ++i) {
      if (t.ids[i] >= v && t.ids[i] < v + count) block[t.ids[i] - v] = -INFINITY;
    }
    update_row<Float32>(s, block, count, t.p.inverse_temperature);
  }
  finish_row(s, t.p.inverse_temperature);
  return s;
}

template <class D>
static void forward_row(const TopkDistillationLossParams& p, int64_t n) {
  TopK<D, TopkDistillationLossParams> t(p, n);
  const RowStats rest = p.teacher_log_sum ? rest_of_row<D>(t) : RowStats{};
  t.max = rest.max;
  for (int64_t i = 0; i < p.k; ++i) t.max = t.student(i) > t.max ? t.student(i) : t.max;
  const double rest_sum = rest.sum > 0 ? rest.sum * ::exp((rest.max - t.max) * p.inverse_temperature) : 0.0;
  double sum = rest_sum;
  for (int64_t i = 0; i < p.k; ++i) sum += ::exp((t.student(i) - t.max) * p.inverse_temperature);
  t.log_sum = ::log(sum);
  double kl = 0, rest_p = 1;
  const double rest_q = rest_sum / sum;
  for (int64_t i = 0; i < p.k; ++i) {
    const double log_p = t.log_p(i), log_q = t.log_q(i);
    kl += p.backward_kl ? kl_term(log_q, log_p) : kl_term(log_p, log_q);
    rest_p -= ::exp(log_p);
  }
  p.max[n] = float(t.max);
  p.log_sum[n] = float(t.log_sum);
  p.rest[n] = float(rest_q);
  if (p.teacher_log_sum) {
    const double log_p = ::log(rest_p > REST_FLOOR ? rest_p : REST_FLOOR);
    const double log_q = ::log(rest_q > REST_FLOOR ? rest_q : REST_FLOOR);
    kl += p.backward_kl ? kl_term(log_q, log_p) : kl_term(log_p, log_q);
  }
  p.kl[n] = float(kl);
}

// d KL / d z_j = q_j (g_e - sum_e q_e g_e) / T with g_e = d KL / d q_e: -p_e / q_e, or log(q_e / p_e) + 1.
template <class D>
static void backward_row(const TopkDistillationLossBackwardParams& p, int64_t n) {
  auto* dz = static_cast<typename D::T*>(p.d_logits) + n * p.columns;
  if (p.d_kl[n] == 0.f || (p.mask && !p.mask[n])) {
    memset(dz, 0, p.columns * sizeof *dz);
    return;
  }
  TopK<D, TopkDistillationLossBackwardParams> t(p, n);
  t.max = p.max[n];
  t.log_sum = p.log_sum[n];
  double mean = 0, rest_p = 1, rest_slope = 0;  // mean = sum_e q_e g_e
  const double rest_q = p.rest[n];
  for (int64_t i = 0; i < p.k; ++i) {
    const double log_p = t.log_p(i), log_q = t.log_q(i), q = ::exp(log_q);
    mean += !p.backward_kl ? -::exp(log_p) : q > 0 ? q * (log_q - log_p + 1) : 0.0;
    rest_p -= ::exp(log_p);
  }
  if (p.teacher_log_sum && rest_q > REST_FLOOR) {
    if (rest_p < REST_FLOOR) rest_p = REST_FLOOR;
    rest_slope = p.backward_kl ? ::log(rest_q / rest_p) + 1 : -rest_p / rest_q;
    mean += rest_q * rest_slope;
  }
  const double scale = double(p.d_kl[n]) * p.inverse_temperature;
  if (p.teacher_log_sum) {
    const RowGradient g{p.max[n], p.log_sum[n],          0.f, float(p.d_kl[n] * (mean - rest_slope)),
                        0.f,      p.inverse_temperature, -1};
    gradient_row<D>(g, t.z, dz, p.columns);
  } else {
    memset(dz, 0, p.columns * sizeof *dz);
  }
  for (int64_t i = 0; i < p.k; ++i) {
    const double log_p = t.log_p(i), log_q = t.log_q(i), q = ::exp(log_q);
    const double own = !p.backward_kl ? -::exp(log_p) : q > 0 ? q * (log_q - log_p + 1) : 0.0;
    store_part<D>(dz + t.ids[i], splat(float(scale * (own - q * mean))), 1);
  }
}

template <class D>
static void forward_rows(const TopkDistillationLossParams& p, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    if (!p.mask || p.mask[n]) {
      forward_row<D>(p, n);
    } else {
      p.kl[n] = p.max[n] = p.log_sum[n] = p.rest[n] = 0.f;
    }
  }
}

void topk_distillation_loss_cpu(const TopkDistillationLossParams& p) {
  parallel_parts(p.rows, 1, [&](int64_t begin, int64_t end, int) {
    with_dtype(p.dtype, [&](auto d) { forward_rows<decltype(d)>(p, begin, end); });
  });
}

void topk_distillation_loss_backward_cpu(const TopkDistillationLossBackwardParams& p) {
  parallel_parts(p.rows, 1, [&](int64_t begin, int64_t end, int) {
    with_dtype(p.dtype, [&](auto d) {
      for (int64_t n = begin; n < end; ++n) backward_row<decltype(d)>(p, n);
    });
  });
}

}  // namespace aligner::ALIGNER_ISA
