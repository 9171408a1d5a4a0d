// What every binding needs: the stable-ABI headers and argument checks whose test and message come from one expression.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

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

// A contiguous tensor equal to `t`, which must have the dtype and the shape given.
inline Tensor checked(const char* op, const char* argument, const Tensor& t, ScalarType dtype,
                      const std::vector<int64_t>& shape) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == dtype && shape_of(t) == shape, op, ": ", argument, " must be CPU ",
                  describe(dtype, shape), ", got ", t.is_cpu() ? "CPU " : "non-CPU ",
                  describe(t.scalar_type(), shape_of(t)));
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline Dtype checked_dtype(const char* op, const char* argument, const Tensor& t) {
  const auto dtype = t.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, op, ": ", argument,
                  " must be Float or BFloat16, got ", torch::headeronly::toString(dtype));
  return dtype == ScalarType::Float ? Dtype::float32 : Dtype::bfloat16;
}

// Row-major data with any distance between rows.
inline Tensor checked_rows(const char* op, const char* argument, const Tensor& t, int64_t rows, int64_t columns) {
  const std::vector<int64_t> shape{rows, columns};
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 2 && shape_of(t) == shape, op, ": ", argument, " must be CPU ",
                  describe(t.scalar_type(), shape), ", got ", t.is_cpu() ? "CPU " : "non-CPU ",
                  describe(t.scalar_type(), shape_of(t)));
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

// A token mask is bool, or float32 weights; exactly one pointer of a Params struct is set.
struct TokenWeights {
  Tensor tensor;
  const bool* mask;
  const float* weights;
};
inline TokenWeights checked_weights(const char* op, const Tensor& mask, int64_t count) {
  const bool is_bool = mask.scalar_type() == ScalarType::Bool;
  Tensor t = checked(op, "mask", mask, is_bool ? ScalarType::Bool : ScalarType::Float, {count});
  return {t, is_bool ? data<bool>(t) : nullptr, is_bool ? nullptr : data<float>(t)};
}

// Columns of this rank's vocabulary shard; targets are global and may lie in another shard, but not outside the
// vocabulary. A row that mask leaves out may hold any target.
inline std::vector<int64_t> checked_targets(const char* op, const Tensor& targets_, const bool* mask, int64_t count,
                                            int64_t vocab_start, int64_t vocab_size) {
  const Tensor targets = checked(op, "targets", targets_, ScalarType::Long, {count});
  std::vector<int64_t> columns(count);
  for (int64_t n = 0; n < count; ++n) {
    const int64_t target = data<int64_t>(targets)[n];
    STD_TORCH_CHECK((mask && !mask[n]) || (target >= 0 && target < vocab_size), op, ": targets must be in [0, ",
                    vocab_size, "), got ", target, " at index ", n);
    columns[n] = target - vocab_start;
  }
  return columns;
}

inline std::optional<Tensor> checked_optional(const char* op, const char* argument, const std::optional<Tensor>& t,
                                              ScalarType dtype, const std::vector<int64_t>& shape) {
  if (!t) return std::nullopt;
  return checked(op, argument, *t, dtype, shape);
}
inline const float* data_or_null(const std::optional<Tensor>& t) { return t ? data<float>(*t) : nullptr; }

}  // namespace aligner
