#include "engine/decoder.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "engine/layers.h"
#include "engine/matmul.h"

namespace aligner {
namespace {

void at_least(std::vector<float>& v, int64_t size) {
  if (int64_t(v.size()) < size) v.resize(size);
}

}  // namespace

void StepRows::clear() {
  tokens.clear();
  positions.clear();
  blocks.clear();
  logit_rows.clear();
}

Decoder::Decoder(DecoderShape shape, DecoderWeights weights) : shape_(std::move(shape)), weights_(std::move(weights)) {}

void Decoder::norm(const float* x, const void* weight, int64_t rows) {
  rms_norm_cpu({x, weight, normed_.data(), rows, shape_.hidden, shape_.norm_eps, shape_.dtype});
}

void Decoder::product(const float* x, const Matrix& weight, float* y, int64_t rows, int64_t outputs, int64_t depth,
                      bool add) {
  matmul_cpu({x, weight.rows, y, rows, outputs, depth, shape_.dtype, add, weight.scales});
}

// Angles are float32 products as in the trainer, their cosines exact.
void Decoder::angles(const StepRows& rows) {
  const std::vector<float>& frequencies = shape_.rotary_frequencies;
  const int64_t half = frequencies.size();
  for (size_t i = 0; i < rows.positions.size(); ++i) {
    for (int64_t j = 0; j < half; ++j) {
      const float angle = float(rows.positions[i]) * frequencies[j];
      cos_[i * half + j] = std::cos(angle);
      sin_[i * half + j] = std::sin(angle);
    }
  }
}

void Decoder::layer(const LayerWeights& w, const AttentionRows& at) {
  const AttentionShape& a = shape_.attention;
  const int64_t rows = at.rows, hidden = shape_.hidden, queries = a.heads * a.head_dim;
  norm(x_.data(), w.attention_norm, rows);
  product(normed_.data(), w.qkv, qkv_.data(), rows, queries + 2 * a.kv_heads * a.head_dim, hidden, false);
  rotate_cpu({a, at, qkv_.data(), cos_.data(), sin_.data(), w.qkv_bias, w.query_norm, w.key_norm, shape_.norm_eps,
              shape_.dtype});
  attention_cpu({a, at, qkv_.data(), attended_.data()});
  product(attended_.data(), w.attention_out, x_.data(), rows, hidden, queries, true);
  norm(x_.data(), w.ffn_norm, rows);
  product(normed_.data(), w.gate_up, gate_up_.data(), rows, 2 * shape_.ffn, hidden, false);
  swiglu_cpu({gate_up_.data(), activated_.data(), rows, shape_.ffn});
  product(activated_.data(), w.down, x_.data(), rows, hidden, shape_.ffn, true);
}

const float* Decoder::forward(const StepRows& step, float* cache) {
  const AttentionShape& a = shape_.attention;
  const int64_t rows = step.tokens.size(), wanted = step.logit_rows.size(), hidden = shape_.hidden;
  at_least(x_, rows * hidden);
  at_least(normed_, rows * hidden);
  at_least(qkv_, rows * (a.heads + 2 * a.kv_heads) * a.head_dim);
  at_least(attended_, rows * a.heads * a.head_dim);
  at_least(gate_up_, rows * 2 * shape_.ffn);
  at_least(activated_, rows * shape_.ffn);
  at_least(cos_, rows * a.head_dim / 2);
  at_least(sin_, rows * a.head_dim / 2);
  at_least(logits_, wanted * shape_.vocab);
  angles(step);
  embed_cpu({weights_.embedding, step.tokens.data(), x_.data(), rows, hidden, shape_.dtype});
  for (int64_t i = 0; i < shape_.num_layers; ++i) {
    float* layer_cache = cache + i * a.block_elements();
    layer(weights_.layers[i], {step.positions.data(), step.blocks.data(), layer_cache, block_elements(), rows});
  }
  for (int64_t i = 0; i < wanted; ++i) {  // logit_rows ascend: the rows move to the top
    std::copy_n(x_.data() + step.logit_rows[i] * hidden, hidden, x_.data() + i * hidden);
  }
  norm(x_.data(), weights_.norm, wanted);
  product(normed_.data(), {weights_.head, nullptr}, logits_.data(), wanted, shape_.vocab, hidden, false);
  return logits_.data();
}

}  // namespace aligner
