#include "buffer.h"
#include "engine/attention.h"
#include "engine/norm_row.h"
#include "parallel.h"
#include "simd.h"

namespace aligner::ALIGNER_ISA {

constexpr int64_t SCORE_VECTORS = BLOCK_TOKENS / LANES;
constexpr int SCORE_HEADS = 4;        // heads whose scores with one block are summed at once
constexpr int VALUE_VECTORS = 4;      // of one head's values that are summed at once
constexpr int64_t ROTATE_GRAIN = 16;  // rows worth a second thread

ALIGNER_INLINE void rotate(const float* x, const float* cos, const float* sin, int64_t half, float* y, int64_t stride) {
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    y[i * stride] = a * cos[i] - b * sin[i];
    y[(i + half) * stride] = b * cos[i] + a * sin[i];
  }
}

template <class D>
static void bias_and_norm(const RotateParams& p, float* q) {
  using T = typename D::T;
  const AttentionShape& s = p.shape;
  const int64_t width = (s.heads + 2 * s.kv_heads) * s.head_dim;
  if (p.bias) {
    const T* bias = static_cast<const T*>(p.bias);
    for (int64_t k = 0; k < width; k += LANES) {
      const int64_t n = width - k;
      store_some<Float32>(q + k, load_some<Float32>(q + k, n, 0.f) + load_some<D>(bias + k, n, 0.f), n);
    }
  }
  if (p.query_norm) {
    for (int64_t h = 0; h < s.heads + s.kv_heads; ++h) {
      const T* weight = static_cast<const T*>(h < s.heads ? p.query_norm : p.key_norm);
      norm_row<D>(q + h * s.head_dim, weight, q + h * s.head_dim, s.head_dim, p.epsilon);
    }
  }
}

void rotate_cpu(const RotateParams& p) {
  const AttentionShape& s = p.shape;
  const int64_t half = s.head_dim / 2, width = (s.heads + 2 * s.kv_heads) * s.head_dim;
  parallel_parts(p.at.rows, ROTATE_GRAIN, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const float *cos = p.cos + i * half, *sin = p.sin + i * half;
      const int64_t token = p.at.position[i] % BLOCK_TOKENS;
      float* block = p.at.cache + p.at.blocks[i][p.at.position[i] / BLOCK_TOKENS] * p.at.block_pitch;
      float* q = p.qkv + i * width;
      with_dtype(p.dtype, [&](auto d) { bias_and_norm<decltype(d)>(p, q); });
      for (int64_t h = 0; h < s.heads; ++h) rotate(q + h * s.head_dim, cos, sin, half, q + h * s.head_dim, 1);
      const float *k = q + s.heads * s.head_dim, *v = k + s.kv_heads * s.head_dim;
      for (int64_t h = 0; h < s.kv_heads; ++h) {
        rotate(k + h * s.head_dim, cos, sin, half, block + h * s.head_dim * BLOCK_TOKENS + token, BLOCK_TOKENS);
        float* value = block + s.block_keys() + (h * BLOCK_TOKENS + token) * s.value_stride();
        memcpy(value, v + h * s.head_dim, s.head_dim * sizeof *value);
        memset(value + s.head_dim, 0, (s.value_stride() - s.head_dim) * sizeof *value);
      }
    }
  });
}

// scores[h][0..16) = q_h . k_t for H heads that share the keys of one block.
template <int H>
static inline void block_scores(const float* q, int64_t head_dim, const float* keys, float* scores, int64_t stride) {
  vfloat sum[H][SCORE_VECTORS];
#pragma GCC unroll 4
  for (int h = 0; h < H; ++h) {
#pragma GCC unroll 2
    for (int v = 0; v < SCORE_VECTORS; ++v) sum[h][v] = vfloat{};
  }
  for (int64_t d = 0; d < head_dim; ++d) {
#pragma GCC unroll 2
    for (int v = 0; v < SCORE_VECTORS; ++v) {
      const vfloat k = Float32::load(keys + d * BLOCK_TOKENS + v * LANES);
#pragma GCC unroll 4
      for (int h = 0; h < H; ++h) sum[h][v] += splat(q[h * head_dim + d]) * k;
    }
  }
#pragma GCC unroll 4
  for (int h = 0; h < H; ++h) {
#pragma GCC unroll 2
    for (int v = 0; v < SCORE_VECTORS; ++v) Float32::store(scores + h * stride + v * LANES, sum[h][v]);
  }
}

template <int H>
static inline void head_scores(int64_t heads, const float* q, int64_t dim, const float* keys, float* out, int64_t n) {
  if (heads == H) return block_scores<H>(q, dim, keys, out, n);
  if constexpr (H > 1) head_scores<H - 1>(heads, q, dim, keys, out, n);
}

// scores -> e^((score - max) * scale), 0 beyond `count`. Returns their sum.
ALIGNER_INLINE double exponentiate(float* scores, int64_t count, int64_t padded, float scale) {
  for (int64_t t = count; t < padded; ++t) scores[t] = -INFINITY;  // what an unwritten slot holds may be anything
  vfloat largest = splat(-INFINITY), sum{};
  for (int64_t t = 0; t < padded; t += LANES) largest = vmax(Float32::load(scores + t), largest);
  const vfloat max = splat(hmax(largest)), k = splat(scale * LOG2E);
  for (int64_t t = 0; t < padded; t += LANES) {
    vfloat y = (Float32::load(scores + t) - max) * k;
    const vfloat e = exp2_or_zero(y);
    Float32::store(scores + t, e);
    sum += e;
  }
  return hsum(sum);
}

// y[0 .. N LANES) = sum_t weight_t value_t / total, of which `columns` are stored.
template <int N>
static inline void weigh_values(const AttentionParams& p, int64_t row, int64_t offset, const float* weights,
                                float inverse_total, float* y, int64_t columns) {
  const int64_t stride = p.shape.value_stride(), count = p.at.position[row] + 1;
  vfloat sum[N];
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) sum[i] = vfloat{};
  for (int64_t t = 0; t < count; t += BLOCK_TOKENS) {
    const float* value = p.at.cache + p.at.blocks[row][t / BLOCK_TOKENS] * p.at.block_pitch + offset;
    const int64_t n = smaller(BLOCK_TOKENS, count - t);
    for (int64_t j = 0; j < n; ++j) {
      const vfloat w = splat(weights[t + j]);
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) sum[i] += w * Float32::load(value + j * stride + i * LANES);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) {
    if (i * LANES < columns) store_some<Float32>(y + i * LANES, sum[i] * inverse_total, columns - i * LANES);
  }
}

// The heads of row `row` that share key-value head `kv`.
static void attend(const AttentionParams& p, int64_t row, int64_t kv, float* scores) {
  const AttentionShape& s = p.shape;
  const int64_t group = s.heads / s.kv_heads, count = p.at.position[row] + 1, dim = s.head_dim;
  const int64_t padded = (count + BLOCK_TOKENS - 1) / BLOCK_TOKENS * BLOCK_TOKENS;
  const float* q = p.qkv + (row * (s.heads + 2 * s.kv_heads) + kv * group) * dim;
  float* y = p.y + (row * s.heads + kv * group) * dim;
  for (int64_t t = 0; t < count; t += BLOCK_TOKENS) {
    const float* block = p.at.cache + p.at.blocks[row][t / BLOCK_TOKENS] * p.at.block_pitch;
    for (int64_t h = 0; h < group; h += SCORE_HEADS) {
      head_scores<SCORE_HEADS>(smaller(SCORE_HEADS, group - h), q + h * dim, dim, block + kv * dim * BLOCK_TOKENS,
                               scores + h * padded + t, padded);
    }
  }
  for (int64_t h = 0; h < group; ++h) {
    const float* weights = scores + h * padded;
    const float inverse = float(1.0 / exponentiate(scores + h * padded, count, padded, 1.f / sqrtf(float(dim))));
    for (int64_t c = 0; c < dim; c += VALUE_VECTORS * LANES) {
      const int64_t offset = s.block_keys() + kv * BLOCK_TOKENS * s.value_stride() + c, columns = dim - c;
      float* out = y + h * dim + c;
      if (s.value_stride() - c >= VALUE_VECTORS * LANES) {
        weigh_values<VALUE_VECTORS>(p, row, offset, weights, inverse, out, columns);
      } else {  // the vectors that are left
        for (int64_t v = 0; v < columns; v += LANES) {
          weigh_values<1>(p, row, offset + v, weights, inverse, out + v, columns - v);
        }
      }
    }
  }
}

void attention_cpu(const AttentionParams& p) {
  const int64_t group = p.shape.heads / p.shape.kv_heads, tasks = p.at.rows * p.shape.kv_heads;
  int64_t longest = 0;
  for (int64_t i = 0; i < p.at.rows; ++i) longest = larger(longest, p.at.position[i] + 1);
  // Rows differ in length: threads take them in turns. A row's sums do not depend on who takes it.
  const int64_t threads = smaller(tasks, max_threads());
  parallel_parts(threads, 1, [&](int64_t begin, int64_t end, int) {
    Buffer scores(group * (longest + BLOCK_TOKENS));
    for (int64_t thread = begin; thread < end; ++thread) {
      for (int64_t i = thread; i < tasks; i += threads) {
        attend(p, i / p.shape.kv_heads, i % p.shape.kv_heads, scores.data);
      }
    }
  });
}

}  // namespace aligner::ALIGNER_ISA
