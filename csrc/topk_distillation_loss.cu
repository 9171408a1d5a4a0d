// Source: see topk_distillation_loss.h. One block takes one token.
#include "cuda_kernel.cuh"
#include "softmax_row.cuh"
#include "topk_distillation_loss.h"

namespace aligner {
namespace {

constexpr int ROW_BLOCK = 512;  // threads at most
constexpr int PART = 1 << 16;   // columns whose bits are in shared memory at a time

struct Larger {
  __device__ double operator()(double a, double b) const { return b > a ? b : a; }
};

// Teacher and student on the top k of one token. All in double: k is small, and 1 - sum cancels.
template <class T>
struct TopK {
  const T* z;
  const int64_t* ids;
  const float* teacher;
  int64_t k;
  double inverse_temperature, teacher_log_sum, max, log_sum;

  template <class Params>
  __device__ TopK(const Params& p, int64_t n)
      : z(static_cast<const T*>(p.logits) + n * p.row_stride),
        ids(p.topk_ids + n * p.k),
        teacher(p.topk_logits + n * p.k),
        k(p.k),
        inverse_temperature(p.inverse_temperature) {}

  // body(i) for the events of this thread.
  template <class Body>
  __device__ void for_each(const Body& body) const {
    for (int64_t i = threadIdx.x; i < k; i += blockDim.x) body(i);
  }
  // The largest of `least` and all x(i); sum_i e^{(x(i) - largest) / T}: the same in every thread of the block.
  template <class Get>
  __device__ double block_max(const Get& x, double least) const {
    for_each([&](int64_t i) { least = Larger{}(least, x(i)); });
    return block_reduce(least, least, Larger{});
  }
  template <class Get>
  __device__ double block_exp_sum(const Get& x, double largest) const {
    Sums<1> sum{};
    for_each([&](int64_t i) { sum.value[0] += exp((x(i) - largest) * inverse_temperature); });
    return block_sum(sum).value[0];
  }
  __device__ void set_teacher_log_sum(const float* given, int64_t n) {
    if (given) {
      teacher_log_sum = load(given + n);
      return;
    }
    const auto logit = [&](int64_t i) { return double(load(teacher + i)); };
    const double largest = block_max(logit, -INFINITY);
    teacher_log_sum = largest * inverse_temperature + log(block_exp_sum(logit, largest));
  }

  __device__ double student(int64_t i) const { return to_float(load(z + load(ids + i))); }
  __device__ double log_p(int64_t i) const { return load(teacher + i) * inverse_temperature - teacher_log_sum; }
  __device__ double log_q(int64_t i) const { return (student(i) - max) * inverse_temperature - log_sum; }
};

// x log(x / y), where 0 log 0 = 0.
__device__ __forceinline__ double kl_term(double log_x, double log_y) {
  const double x = exp(log_x);
  return x > 0 ? x * (log_x - log_y) : 0.0;
}

// Statistics of the student's row outside the top k: what remains is not 1 - sum, which would cancel. A bit in shared
// memory tells that a column is among the top k; columns are counted from the 16-byte boundary before the row.
template <class T>
__device__ RowStats block_rest_of_row(const TopK<T>& t, int64_t columns, float inverse_temperature) {
  ALIGNER_SHARED(unsigned, is_top, PART / 32);
  const int64_t offset = int64_t(reinterpret_cast<uintptr_t>(t.z) % 16 / sizeof(T));
  OnlineSoftmax mine(inverse_temperature * LOG2E);
  for (int64_t part = 0; part < offset + columns; part += PART) {
    __syncthreads();  // bits of the part before may still be read
    for (int i = threadIdx.x; i < PART / 32; i += blockDim.x) is_top[i] = 0;
    __syncthreads();
    t.for_each([&](int64_t i) {
      const int64_t bit = load(t.ids + i) + offset - part;
      if (bit >= 0 && bit < PART) atomicOr(is_top + bit / 32, 1u << bit % 32);
    });
    __syncthreads();
    for (int bit = threadIdx.x * VECTOR<T>; bit < PART; bit += blockDim.x * VECTOR<T>) {
      const int64_t first = part + bit - offset;
      if (first >= columns) break;
      const unsigned top = is_top[bit / 32] >> bit % 32;
      float x[VECTOR<T>];
      if (first >= 0 && first + VECTOR<T> <= columns) {
        load_vector(t.z + first, x);
      } else {
        for (int v = 0; v < VECTOR<T>; ++v) {
          const int64_t j = first + v;
          x[v] = j >= 0 && j < columns ? to_float(load(t.z + j)) : -INFINITY;
        }
      }
#pragma unroll
      for (int v = 0; v < VECTOR<T>; ++v) x[v] = top >> v & 1 ? -INFINITY : x[v];
      mine.add(x);
    }
  }
  return block_merge(mine);
}

template <class T>
__global__ void __launch_bounds__(ROW_BLOCK) topk_distillation_row(TopkDistillationLossParams p) {
  const int64_t n = blockIdx.x;
  if (p.mask && !load(p.mask + n)) {
    if (threadIdx.x > 0) return;
    store(p.kl + n, 0.f);
    store(p.max + n, 0.f);
    store(p.log_sum + n, 0.f);
    store(p.rest + n, 0.f);
    return;
  }
  TopK<T> t(p, n);
  RowStats rest{-INFINITY, 0, 0};
  if (p.teacher_log_sum) rest = block_rest_of_row(t, p.columns, p.inverse_temperature);
  t.max = t.block_max([&](int64_t i) { return t.student(i); }, rest.max);
  const double rest_sum = rest.sum > 0 ? rest.sum * exp((rest.max - t.max) * t.inverse_temperature) : 0.0;
  const double sum = rest_sum + t.block_exp_sum([&](int64_t i) { return t.student(i); }, t.max);
  t.log_sum = log(sum);
  t.set_teacher_log_sum(p.teacher_log_sum, n);
  Sums<2> mine{};  // KL and p of the top k
  t.for_each([&](int64_t i) {
    const double log_p = t.log_p(i), log_q = t.log_q(i);
    mine.value[0] += p.backward_kl ? kl_term(log_q, log_p) : kl_term(log_p, log_q);
    mine.value[1] += exp(log_p);
  });
  const Sums<2> sums = block_sum(mine);
  if (threadIdx.x > 0) return;
  double kl = sums.value[0];
  const double rest_p = 1 - sums.value[1], rest_q = rest_sum / sum;
  if (p.teacher_log_sum) {
    const double log_p = log(rest_p > REST_FLOOR ? rest_p : REST_FLOOR);
    const double log_q = log(rest_q > REST_FLOOR ? rest_q : REST_FLOOR);
    kl += p.backward_kl ? kl_term(log_q, log_p) : kl_term(log_p, log_q);
  }
  store(p.kl + n, float(kl));
  store(p.max + n, float(t.max));
  store(p.log_sum + n, float(t.log_sum));
  store(p.rest + n, float(rest_q));
}

// d KL / d z_j = q_j (g_e - sum_e q_e g_e) / T with g_e = d KL / d q_e: -p_e / q_e, or log(q_e / p_e) + 1.
template <class T>
__global__ void __launch_bounds__(ROW_BLOCK) topk_distillation_gradient(TopkDistillationLossBackwardParams p) {
  const int64_t n = blockIdx.x;
  T* dz = static_cast<T*>(p.d_logits) + n * p.columns;
  const float d_kl = load(p.d_kl + n);
  if (d_kl == 0.f || (p.mask && !load(p.mask + n))) {
    block_row_zero(dz, p.columns, 0, 1);
    return;
  }
  TopK<T> t(p, n);
  t.max = load(p.max + n);
  t.log_sum = load(p.log_sum + n);
  t.set_teacher_log_sum(p.teacher_log_sum, n);
  const auto own = [&](double log_p, double log_q) {  // q_e g_e
    const double q = exp(log_q);
    return !p.backward_kl ? -exp(log_p) : q > 0 ? q * (log_q - log_p + 1) : 0.0;
  };
  Sums<2> mine{};  // q g and p of the top k
  t.for_each([&](int64_t i) {
    const double log_p = t.log_p(i);
    mine.value[0] += own(log_p, t.log_q(i));
    mine.value[1] += exp(log_p);
  });
  const Sums<2> sums = block_sum(mine);
  double mean = sums.value[0], rest_p = 1 - sums.value[1], rest_slope = 0;  // mean = sum_e q_e g_e
  const double rest_q = load(p.rest + n);
  if (p.teacher_log_sum && rest_q > REST_FLOOR) {
    if (rest_p < REST_FLOOR) rest_p = REST_FLOOR;
    rest_slope = p.backward_kl ? log(rest_q / rest_p) + 1 : -rest_p / rest_q;
    mean += rest_q * rest_slope;
  }
  if (p.teacher_log_sum) {
    const RowGradient gradient{float(t.max), float(t.log_sum),      0.f, float(d_kl * (mean - rest_slope)),
                               0.f,          p.inverse_temperature, -1};
    block_row_gradient(t.z, dz, p.columns, gradient, 0, 1);
  } else {
    block_row_zero(dz, p.columns, 0, 1);
  }
  __syncthreads();  // the top k are written over
  const double scale = double(d_kl) * p.inverse_temperature;
  t.for_each([&](int64_t i) {
    const double log_p = t.log_p(i), log_q = t.log_q(i);
    store(dz + load(t.ids + i), from_float<T>(float(scale * (own(log_p, log_q) - exp(log_q) * mean))));
  });
}

template <class T>
void launch_forward(const TopkDistillationLossParams& p, cudaStream_t stream) {
  const int64_t columns = p.teacher_log_sum ? p.columns : p.k * VECTOR<T>;  // a thread for each vector or event
  ALIGNER_LAUNCH(topk_distillation_row<T>, p.rows, row_threads(columns, p.dtype, ROW_BLOCK), stream, p);
}

template <class T>
void launch_backward(const TopkDistillationLossBackwardParams& p, cudaStream_t stream) {
  ALIGNER_LAUNCH(topk_distillation_gradient<T>, p.rows, row_threads(p.columns, p.dtype, ROW_BLOCK), stream, p);
}

}  // namespace

static void topk_distillation_loss(const TopkDistillationLossParams& p, double*, cudaStream_t stream) {
  if (p.rows == 0) return;
  with_dtype(p.dtype, [&](auto zero) { launch_forward<decltype(zero)>(p, stream); });
}

static void topk_distillation_loss_backward(const TopkDistillationLossBackwardParams& p, double*, cudaStream_t stream) {
  if (p.rows == 0) return;
  with_dtype(p.dtype, [&](auto zero) { launch_backward<decltype(zero)>(p, stream); });
}

}  // namespace aligner

ALIGNER_CUDA_KERNEL(topk_distillation_loss, TopkDistillationLossParams)
ALIGNER_CUDA_KERNEL(topk_distillation_loss_backward, TopkDistillationLossBackwardParams)
