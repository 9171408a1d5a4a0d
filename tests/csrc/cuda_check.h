// What the comparisons of CUDA kernels (emulated, cuda_on_cpu.h) with their CPU twins share.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <new>
#include <random>

#include "cuda_workspace.h"
#include "dtype.h"

namespace check {

// Exactly `count` elements, so that the address sanitizer sees the first one beyond, on the boundary that cudaMalloc
// gives; NaN bits until written.
template <class T>
struct Array {
  explicit Array(int64_t count) : size(count), memory(new (BOUNDARY) T[count]) {
    if (count > 0) memset(static_cast<void*>(memory.get()), 0xff, count * sizeof(T));
  }
  Array(int64_t count, T value) : Array(count) {
    for (int64_t i = 0; i < count; ++i) memory[i] = value;
  }
  T* data() const { return memory.get(); }
  T& operator[](int64_t i) const { return memory[i]; }

  static constexpr std::align_val_t BOUNDARY{256};
  struct Delete {
    void operator()(T* p) const { operator delete[](p, BOUNDARY); }
  };
  int64_t size;
  std::unique_ptr<T[], Delete> memory;
};

struct Random {
  explicit Random(uint64_t seed) : engine(seed) {}
  float normal() { return std::normal_distribution<float>()(engine); }
  int64_t below(int64_t limit) { return std::uniform_int_distribution<int64_t>(0, limit - 1)(engine); }
  bool chance(double probability) { return std::bernoulli_distribution(probability)(engine); }

  std::mt19937_64 engine;
};

inline Array<float> normal_array(Random& random, int64_t count, float scale = 1, float shift = 0) {
  Array<float> x(count);
  for (int64_t i = 0; i < count; ++i) x[i] = shift + scale * random.normal();
  return x;
}
// True with the probability given; what `x` holds elsewhere becomes NaN.
inline Array<bool> random_mask(Random& random, double probability, std::initializer_list<const Array<float>*> x) {
  const int64_t count = (*x.begin())->size;
  Array<bool> mask(count);
  for (int64_t i = 0; i < count; ++i) {
    mask[i] = random.chance(probability);
    for (const Array<float>* array : x) {
      if (!mask[i]) (*array)[i] = NAN;
    }
  }
  return mask;
}

// 0 where the mask is false, elsewhere between 0.25 and 2.
inline Array<float> random_weights(Random& random, const Array<bool>& mask) {
  Array<float> weights(mask.size);
  for (int64_t i = 0; i < mask.size; ++i) weights[i] = mask[i] ? 0.25f * float(1 + random.below(8)) : 0.f;
  return weights;
}
// Prefix sums of lengths below `limit`, one in four of them 0.
inline Array<int32_t> random_cu_seqlens(Random& random, int64_t sequences, int64_t limit) {
  Array<int32_t> cu_seqlens(sequences + 1);
  cu_seqlens[0] = 0;
  for (int64_t b = 0; b < sequences; ++b) {
    cu_seqlens[b + 1] = cu_seqlens[b] + (random.chance(0.25) ? 0 : int32_t(random.below(limit)));
  }
  return cu_seqlens;
}

// Elements [first, first + count) of memory of any dtype.
inline Array<float> values(const void* memory, aligner::Dtype dtype, int64_t first, int64_t count) {
  Array<float> x(count);
  for (int64_t i = 0; i < count; ++i) {
    if (dtype == aligner::Dtype::float32) x[i] = static_cast<const float*>(memory)[first + i];
    if (dtype == aligner::Dtype::bfloat16) x[i] = float(static_cast<const __nv_bfloat16*>(memory)[first + i]);
    if (dtype == aligner::Dtype::float16) x[i] = float(static_cast<const __half*>(memory)[first + i]);
  }
  return x;
}
inline void set_values(void* memory, aligner::Dtype dtype, int64_t first, const Array<float>& x) {
  for (int64_t i = 0; i < x.size; ++i) {
    if (dtype == aligner::Dtype::float32) static_cast<float*>(memory)[first + i] = x[i];
    if (dtype == aligner::Dtype::bfloat16) static_cast<__nv_bfloat16*>(memory)[first + i] = __float2bfloat16_rn(x[i]);
    if (dtype == aligner::Dtype::float16) static_cast<__half*>(memory)[first + i] = __float2half_rn(x[i]);
  }
}

inline int failures = 0;

template <class T>
void expect_close(const char* what, const Array<T>& got, const Array<T>& want, double relative, double absolute) {
  int64_t wrong = 0, first = -1;
  for (int64_t i = 0; i < want.size; ++i) {
    const double g = double(got[i]), w = double(want[i]);
    if (g == w || (std::isnan(g) && std::isnan(w)) || std::fabs(g - w) <= absolute + relative * std::fabs(w)) continue;
    if (wrong++ == 0) first = i;
  }
  if (wrong == 0) return;
  ++failures;
  printf("%s: %ld of %ld differ, first at %ld: CUDA %.9g, CPU %.9g\n", what, long(wrong), long(want.size), long(first),
         double(got[first]), double(want[first]));
}

// The logarithm of a softmax's denominator: which logit its two parts are relative to is a kernel's own choice.
inline Array<double> log_denominator(const Array<float>& max, const Array<float>& log_sum, double temperature) {
  Array<double> x(max.size);
  for (int64_t i = 0; i < max.size; ++i) x[i] = max[i] / temperature + log_sum[i];
  return x;
}

inline void expect(const char* what, bool holds) {
  if (holds) return;
  ++failures;
  printf("%s\n", what);
}

// Calls the C entry of a CUDA kernel with a workspace of NaN.
template <class Params>
void run(int (*kernel)(const void*, void*, void*), const Params& params) {
  const Array<double> workspace(aligner::CUDA_WORKSPACE_BYTES / sizeof(double));
  expect("a launch failed", kernel(&params, workspace.data(), nullptr) == 0);
}

// What a kernel cannot do without: each input read once, each output written once.
inline void minimum(const char* kernel, int64_t bytes_read, int64_t bytes_written) {
  printf("minimum %s %ld %ld\n", kernel, long(bytes_read), long(bytes_written));
}

// A named list of comparisons, each run for several seeds, which draw the data and the schedule of the threads; and one
// run at a size where memory traffic is what counts.
struct Cases {
  Cases(const char* name, void (*compare)(Random&), void (*large)() = nullptr)
      : name(name), compare(compare), large(large), next(first) {
    first = this;
  }

  const char* name;
  void (*compare)(Random&);
  void (*large)();
  Cases* next;
  inline static Cases* first = nullptr;
};

}  // namespace check

#define CUDA_ENTRY(kernel) extern "C" int aligner_##kernel##_cuda(const void* params, void* workspace, void* stream);
