// aligner._engine: the embedded sampler for Python. Weights stay where torch allocated them, so that a refit which
// writes to those tensors writes to the engine.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "dispatch.h"
#include "engine/engine.h"
#include "engine/matmul.h"
#include "parallel.h"

namespace py = pybind11;
using namespace aligner;

namespace {

// The address of a weight, once it is what the decoder will read.
const void* address(const py::dict& weights, const std::string& name, const std::vector<int64_t>& shape,
                    const std::string& dtype) {
  if (!weights.contains(name)) throw py::value_error("sampler: weight " + name + " is missing");
  const py::object tensor = weights[name.c_str()];
  const auto got = tensor.attr("shape").cast<std::vector<int64_t>>();
  const auto got_dtype = py::str(tensor.attr("dtype")).cast<std::string>();
  const bool placed = tensor.attr("is_contiguous")().cast<bool>() && tensor.attr("is_cpu").cast<bool>();
  if (got != shape || got_dtype != "torch." + dtype || !placed) {
    throw py::value_error("sampler: weight " + name + " is " + got_dtype + py::str(py::cast(got)).cast<std::string>() +
                          ", expected a contiguous torch." + dtype + py::str(py::cast(shape)).cast<std::string>() +
                          " on the CPU");
  }
  return reinterpret_cast<const void*>(tensor.attr("data_ptr")().cast<uintptr_t>());
}

Matrix matrix(const py::dict& weights, const std::string& name, const std::vector<int64_t>& shape,
              const std::string& dtype) {
  const void* rows = address(weights, name, shape, dtype);
  if (dtype != "int8") return {rows, nullptr};
  return {rows, static_cast<const float*>(address(weights, name + ".scale", {shape[0]}, "float32"))};
}

DecoderShape decoder_shape(const py::object& shape, const std::vector<float>& frequencies, const std::string& dtype) {
  const auto size = [&](const char* name) { return shape.attr(name).cast<int64_t>(); };
  DecoderShape s{};
  s.num_layers = size("num_layers");
  s.hidden = size("hidden");
  s.ffn = size("ffn");
  s.vocab = size("vocab");
  s.attention = {size("heads"), size("kv_heads"), size("head_dim")};
  s.norm_eps = shape.attr("norm_eps").cast<float>();
  s.dtype = dtype == "bfloat16" ? Dtype::bfloat16 : Dtype::float32;
  s.rotary_frequencies = frequencies;
  if (2 * int64_t(frequencies.size()) != s.attention.head_dim || s.attention.heads % s.attention.kv_heads != 0) {
    throw py::value_error("sampler: heads must be a multiple of kv_heads, head_dim twice the rotary frequencies");
  }
  return s;
}

DecoderWeights decoder_weights(const DecoderShape& s, const py::dict& weights, const py::object& shape,
                               const std::string& dtype) {
  const int64_t queries = s.attention.heads * s.attention.head_dim, keys = s.attention.kv_heads * s.attention.head_dim;
  const std::string other = dtype == "int8" ? "float32" : dtype;  // of what is no layer's matrix
  const auto vector = [&](const std::string& name, int64_t size) { return address(weights, name, {size}, other); };
  const auto has = [&](const char* part) { return shape.attr(part).cast<bool>(); };
  DecoderWeights w{};
  w.embedding = address(weights, "embedding", {s.vocab, s.hidden}, other);
  w.norm = vector("norm", s.hidden);
  w.head = has("tied") ? w.embedding : address(weights, "head", {s.vocab, s.hidden}, other);
  for (int64_t i = 0; i < s.num_layers; ++i) {
    const std::string at = "layers." + std::to_string(i) + ".";
    w.layers.push_back(
        {vector(at + "attention_norm", s.hidden), matrix(weights, at + "qkv", {queries + 2 * keys, s.hidden}, dtype),
         matrix(weights, at + "attention_out", {s.hidden, queries}, dtype), vector(at + "ffn_norm", s.hidden),
         matrix(weights, at + "gate_up", {2 * s.ffn, s.hidden}, dtype),
         matrix(weights, at + "down", {s.hidden, s.ffn}, dtype),
         has("qkv_bias") ? vector(at + "qkv_bias", queries + 2 * keys) : nullptr,
         has("qk_norm") ? vector(at + "query_norm", s.attention.head_dim) : nullptr,
         has("qk_norm") ? vector(at + "key_norm", s.attention.head_dim) : nullptr});
  }
  return w;
}

std::unique_ptr<Engine> make_engine(const py::object& shape, const std::vector<float>& frequencies,
                                    const py::dict& weights, const std::string& dtype, int64_t cache_bytes) {
  const DecoderShape s = decoder_shape(shape, frequencies, dtype);
  return std::make_unique<Engine>(s, decoder_weights(s, weights, shape, dtype), cache_bytes);
}

std::vector<int64_t> add(Engine& engine, const std::vector<int32_t>& prompt, const std::vector<uint64_t>& keys,
                         const py::object& sampling) {
  Sampling s;
  s.temperature = sampling.attr("temperature").cast<float>();
  s.top_k = sampling.attr("top_k").cast<int64_t>();
  s.top_p = sampling.attr("top_p").cast<float>();
  s.min_p = sampling.attr("min_p").cast<float>();
  s.repetition_penalty = sampling.attr("repetition_penalty").cast<float>();
  s.min_tokens = sampling.attr("min_tokens").cast<int64_t>();
  s.max_tokens = sampling.attr("max_tokens").cast<int64_t>();
  s.stop = sampling.attr("stop").cast<std::vector<int32_t>>();
  s.stop_strings = sampling.attr("stop_strings").cast<std::vector<std::string>>();
  return engine.add(prompt, keys, s);
}

// y = x weight^T, as the decoder's layers compute it: to be measured against other libraries.
void matmul(const py::object& x, const py::object& weight, const py::object& y) {
  const auto size = [](const py::object& t, int axis) { return t.attr("shape")[py::int_(axis)].cast<int64_t>(); };
  const int64_t rows = size(x, 0), depth = size(x, 1), outputs = size(weight, 0);
  const auto dtype = py::str(weight.attr("dtype")).cast<std::string>().substr(6);  // behind "torch."
  py::dict tensors;
  tensors["x"] = x, tensors["weight"] = weight, tensors["y"] = y;
  const void* from = address(tensors, "x", {rows, depth}, "float32");
  const void* by = address(tensors, "weight", {outputs, depth}, dtype == "bfloat16" ? dtype : "float32");
  const void* to = address(tensors, "y", {rows, outputs}, "float32");
  matmul_cpu({static_cast<const float*>(from), by, static_cast<float*>(const_cast<void*>(to)), rows, outputs, depth,
              dtype == "bfloat16" ? Dtype::bfloat16 : Dtype::float32, false, nullptr});
}

}  // namespace

PYBIND11_MODULE(_engine, m) {
  m.def("matmul", &matmul);
  m.def("max_threads", &max_threads);
  py::class_<Finished>(m, "Finished")
      .def_readonly("id", &Finished::id)
      .def_readonly("tokens", &Finished::tokens)
      .def_readonly("logprobs", &Finished::logprobs)
      .def_readonly("sampling_logprobs", &Finished::sampling_logprobs)
      .def_property_readonly("stopped", [](const Finished& f) { return f.reason == FinishReason::stop; });
  py::class_<Counters>(m, "Counters")
      .def_readonly("steps", &Counters::steps)
      .def_readonly("rows", &Counters::rows)
      .def_readonly("preemptions", &Counters::preemptions)
      .def_readonly("peak_blocks", &Counters::peak_blocks);
  py::class_<Engine>(m, "Engine")
      .def(py::init(&make_engine), py::kw_only(), py::arg("shape"), py::arg("frequencies"), py::arg("weights"),
           py::arg("dtype"), py::arg("cache_bytes"), py::keep_alive<1, 4>())
      .def("set_token_texts", &Engine::set_token_texts)
      .def_property_readonly("has_token_texts", &Engine::has_token_texts)
      .def("add", &add)
      .def("cancel", &Engine::cancel)
      .def("step", &Engine::step, py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("num_live", &Engine::num_live)
      .def_property_readonly("token_capacity", &Engine::token_capacity)
      .def_property_readonly("counters", &Engine::counters);
}
