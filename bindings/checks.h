// What every binding needs: the stable-ABI headers, argument checks whose test and message come from one expression,
// and the choice between the CPU kernel and the CUDA one.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include "dtype.h"

namespace aligner {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string describe(ScalarType dtype, const std::vector<int64_t>& shape) {
  std::ostringstream text;
  text << torch::headeronly::toString(dtype) << " of shape [";
  for (size_t i = 0; i < shape.size(); ++i) text << (i ? ", " : "") << shape[i];
  text << "]";
  return text.str();
}

inline std::vector<int64_t> shape_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return {sizes.begin(), sizes.end()};
}

// One call of an operator: its name, and the device that all its tensors must be on.
struct Call {
  Call(const char* name, const Tensor& first) : op(name), like(first), is_cpu(first.is_cpu()) {
    STD_TORCH_CHECK(is_cpu || first.is_cuda(), op, ": tensors must be on cpu or cuda, got neither");
  }
  bool has(const Tensor& t) const {
    return is_cpu ? t.is_cpu() : t.is_cuda() && t.get_device_index() == like.get_device_index();
  }
  const char* device() const { return is_cpu ? "CPU " : "CUDA "; }
  std::string got(const Tensor& t) const {
    const char* where = has(t) ? device() : is_cpu ? "non-CPU " : "another device's ";
    return where + describe(t.scalar_type(), shape_of(t));
  }

  const char* op;
  const Tensor like;
  const bool is_cpu;
};

// The CUDA kernel of this name from the library that load_cuda_kernels opened (bindings/cuda.cpp).
void run_cuda(const Call& call, const char* kernel, const void* params);
bool cuda_is_emulated();  // CPU tensors go to the CUDA kernels, which a test compiled for the CPU

template <class P>
void run(const Call& call, void (*cpu_kernel)(const P&), const char* cuda_kernel, const P& params) {
  if (call.is_cpu && !cuda_is_emulated()) return cpu_kernel(params);
  run_cuda(call, cuda_kernel, &params);
}

// A contiguous tensor equal to `t`, which must have the dtype and the shape given.
inline Tensor checked(const Call& call, const char* argument, const Tensor& t, ScalarType dtype,
                      const std::vector<int64_t>& shape) {
  STD_TORCH_CHECK(call.has(t) && t.scalar_type() == dtype && shape_of(t) == shape, call.op, ": ", argument, " must be ",
                  call.device(), describe(dtype, shape), ", got ", call.got(t));
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline Dtype checked_dtype(const Call& call, const char* argument, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    case ScalarType::Half:
      return Dtype::float16;
    default:
      STD_TORCH_CHECK(false, call.op, ": ", argument, " must be Float, BFloat16 or Half, got ",
                      torch::headeronly::toString(t.scalar_type()));
  }
}

// Row-major data with any distance between rows.
inline Tensor checked_rows(const Call& call, const char* argument, const Tensor& t, int64_t rows, int64_t columns) {
  const std::vector<int64_t> shape{rows, columns};
  STD_TORCH_CHECK(call.has(t) && t.dim() == 2 && shape_of(t) == shape, call.op, ": ", argument, " must be ",
                  call.device(), describe(t.scalar_type(), shape), ", got ", call.got(t));
  return t.stride(1) == 1 || columns <= 1 ? t : torch::stable::contiguous(t);
}

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* out(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

inline Tensor new_float(const Tensor& like, std::initializer_list<int64_t> shape) {
  return torch::stable::new_empty(like, shape, ScalarType::Float);
}

// A matrix for a gradient of logits or weights. Its memory is new to the process, and where it is large the kernel's
// page faults cost several times the arithmetic: huge pages need a 512th of them.
inline Tensor new_large(const Tensor& like, int64_t rows, int64_t columns) {
  Tensor t = torch::stable::new_empty(like, {rows, columns});
#if defined(__linux__)
  constexpr uintptr_t huge = 1 << 21;
  const auto begin = (reinterpret_cast<uintptr_t>(t.mutable_data_ptr()) + huge - 1) / huge * huge;
  const auto end =
      (reinterpret_cast<uintptr_t>(t.mutable_data_ptr()) + rows * columns * t.element_size()) / huge * huge;
  if (t.is_cpu() && end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return t;
}

// A token mask is bool, or float32 weights; exactly one pointer of a Params struct is set.
struct TokenWeights {
  Tensor tensor;
  const bool* mask;
  const float* weights;
};
inline TokenWeights checked_weights(const Call& call, const Tensor& mask, int64_t count) {
  const bool is_bool = mask.scalar_type() == ScalarType::Bool;
  Tensor t = checked(call, "mask", mask, is_bool ? ScalarType::Bool : ScalarType::Float, {count});
  return {t, is_bool ? data<bool>(t) : nullptr, is_bool ? nullptr : data<float>(t)};
}

// Token ids: they may lie in another rank's vocabulary shard, but not outside the vocabulary. A row that mask leaves
// out may hold any. On a GPU, where looking would wait for it, the kernels answer NaN instead.
inline Tensor checked_targets(const Call& call, const Tensor& targets_, const bool* mask, int64_t count,
                              int64_t vocab_size) {
  const Tensor targets = checked(call, "targets", targets_, ScalarType::Long, {count});
  for (int64_t n = 0; call.is_cpu && n < count; ++n) {
    const int64_t target = data<int64_t>(targets)[n];
    STD_TORCH_CHECK((mask && !mask[n]) || (target >= 0 && target < vocab_size), call.op, ": targets must be in [0, ",
                    vocab_size, "), got ", target, " at index ", n);
  }
  return targets;
}

// Prefix sums of sequence lengths. A GPU's are brought here to be looked at: B + 1 numbers, against a crash.
inline Tensor checked_cu_seqlens(const Call& call, const Tensor& cu_seqlens_, int64_t tokens) {
  const int64_t B = cu_seqlens_.numel() - 1;
  const Tensor cu_seqlens = checked(call, "cu_seqlens", cu_seqlens_, ScalarType::Int, {B + 1});
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  const Tensor host = call.is_cpu ? cu_seqlens : torch::stable::to(cu_seqlens, cpu);
  const int32_t* cu = data<int32_t>(host);
  STD_TORCH_CHECK(B >= 0 && cu[0] == 0 && cu[B] == tokens, call.op, ": cu_seqlens must start with 0 and end with ",
                  tokens, " (the number of tokens), got ", B >= 0 ? cu[0] : -1, " and ", B >= 0 ? cu[B] : -1);
  for (int64_t b = 0; b < B; ++b) {
    STD_TORCH_CHECK(cu[b] <= cu[b + 1], call.op, ": cu_seqlens must never decrease, got ", cu[b], " then ", cu[b + 1],
                    " at index ", b);
  }
  return cu_seqlens;
}

inline std::optional<Tensor> checked_optional(const Call& call, const char* argument, const std::optional<Tensor>& t,
                                              ScalarType dtype, const std::vector<int64_t>& shape) {
  if (!t) return std::nullopt;
  return checked(call, argument, *t, dtype, shape);
}
inline const float* data_or_null(const std::optional<Tensor>& t) { return t ? data<float>(*t) : nullptr; }

}  // namespace aligner
