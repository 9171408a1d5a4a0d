// Causal attention over a key-value cache kept in blocks of 16 tokens, and the rotation that comes before it.
// A block of one layer: keys [kv_heads][head_dim][16], so that sixteen scores are summed side by side, then values
// [kv_heads][16][value_stride]. Rows are independent and see their sequence in order, however it was split in steps.
#pragma once
#include <cstdint>

#include "dispatch.h"
#include "dtype.h"

namespace aligner {

constexpr int64_t BLOCK_TOKENS = 16;

struct AttentionShape {
  int64_t heads, kv_heads, head_dim;

  // Inlined everywhere: the linker must not take one instruction set's copy for the other's.
  __attribute__((always_inline)) int64_t value_stride() const {
    return (head_dim + 15) / 16 * 16;
  }  // elements, 0 beyond head_dim
  __attribute__((always_inline)) int64_t block_keys() const { return kv_heads * head_dim * BLOCK_TOKENS; }
  __attribute__((always_inline)) int64_t block_elements() const {
    return block_keys() + kv_heads * value_stride() * BLOCK_TOKENS;
  }
};

// Where the rows of one step stand.
struct AttentionRows {
  const int32_t* position;       // [rows] tokens before this one in its sequence
  const int32_t* const* blocks;  // [rows] block numbers of the row's sequence
  float* cache;                  // of this layer in block 0
  int64_t block_pitch;           // elements between blocks
  int64_t rows;
};

// Adds the bias of queries, keys and values, normalises queries and keys by head (RMSNorm), both if there, and rotates
// them: queries in place; rotated keys, and values, go to the cache.
// Source: Su et al. 2021, arXiv:2104.09864, eq. 34, halves laid out as Llama does.
struct RotateParams {
  AttentionShape shape;
  AttentionRows at;
  float* qkv;                         // [rows, (heads + 2 kv_heads) head_dim]
  const float* cos;                   // [rows, head_dim / 2]
  const float* sin;                   // [rows, head_dim / 2]
  const void* bias;                   // [(heads + 2 kv_heads) head_dim], or null
  const void *query_norm, *key_norm;  // [head_dim] weights, or null
  float epsilon;                      // dimensionless, of the norms
  Dtype dtype;                        // of bias and norms
};

struct AttentionParams {
  AttentionShape shape;
  AttentionRows at;
  const float* qkv;  // [rows, (heads + 2 kv_heads) head_dim], rotated
  float* y;          // [rows, heads head_dim] out
};

ALIGNER_CPU_KERNEL(rotate_cpu, RotateParams)
ALIGNER_CPU_KERNEL(attention_cpu, AttentionParams)

}  // namespace aligner
