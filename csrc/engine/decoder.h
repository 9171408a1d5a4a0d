// One forward pass of a dense Llama-like decoder over rows of any sequences: decoding and prefilling ones in one batch.
#pragma once
#include <cstdint>
#include <vector>

#include "dtype.h"
#include "engine/attention.h"

namespace aligner {

struct DecoderShape {
  int64_t num_layers, hidden, ffn, vocab;
  AttentionShape attention;
  float norm_eps;                         // dimensionless
  Dtype dtype;                            // of all weights but int8 matrices: float32 or bfloat16
  std::vector<float> rotary_frequencies;  // [head_dim / 2] radians per token
};

// Views of storage that somebody else owns and may refill between two steps.
struct Matrix {
  const void* rows;     // one an output
  const float* scales;  // null, or what each row of int8 is multiplied by
};
struct LayerWeights {
  const void* attention_norm;
  Matrix qkv, attention_out;
  const void* ffn_norm;
  Matrix gate_up, down;
  const void *qkv_bias, *query_norm, *key_norm;  // null where the model has none
};
struct DecoderWeights {
  const void *embedding, *norm, *head;  // head is embedding when they are tied
  std::vector<LayerWeights> layers;
};

struct StepRows {
  std::vector<int32_t> tokens, positions;
  std::vector<const int32_t*> blocks;  // of each row's sequence
  std::vector<int32_t> logit_rows;     // rows whose next token is wanted

  void clear();
};

class Decoder {
 public:
  Decoder(DecoderShape shape, DecoderWeights weights);

  const DecoderShape& shape() const { return shape_; }
  int64_t block_elements() const { return shape_.num_layers * shape_.attention.block_elements(); }  // of the cache

  // [logit_rows, vocab] logits; valid until the next call. Extends the cache.
  const float* forward(const StepRows& rows, float* cache);

 private:
  void angles(const StepRows& rows);
  void layer(const LayerWeights& w, const AttentionRows& at);
  void norm(const float* x, const void* weight, int64_t rows);
  void product(const float* x, const Matrix& weight, float* y, int64_t rows, int64_t outputs, int64_t depth, bool add);

  DecoderShape shape_;
  DecoderWeights weights_;
  std::vector<float> x_, normed_, qkv_, attended_, gate_up_, activated_, cos_, sin_, logits_;
};

}  // namespace aligner
