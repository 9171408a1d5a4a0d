#include <omp.h>

#include "linear_logprobs.h"
#include "sgemm.h"
#include "softmax_row.h"

namespace aligner::ALIGNER_ISA {

constexpr int64_t CHUNK = 192;                  // rows of weight at a time: a multiple of PANEL and of ROWS
constexpr int64_t TILE_ROWS = 132;              // rows of hidden at a time: a multiple of ROWS
constexpr int64_t TILE_STRIDE = CHUNK + PANEL;  // CHUNK alone may put a column of the tile into few cache sets

// First of the `part`-th of `parts` shares of `count`, on a multiple of `unit`.
ALIGNER_INLINE int64_t share(int64_t count, int64_t unit, int64_t part, int64_t parts) {
  return smaller(count, (count + unit - 1) / unit * part / parts * unit);
}

// The active rows of hidden as float32, in place when they already are.
struct Rows {
  Buffer copy;
  const float* data;
  int64_t stride;

  template <class P>
  static bool in_place(const P& p) {
    return p.dtype == Dtype::float32 && (p.active == 0 || p.rows[p.active - 1] == p.active - 1);
  }
  template <class P>
  explicit Rows(const P& p) : copy(in_place(p) ? 0 : p.active * p.width) {
    data = in_place(p) ? static_cast<const float*>(p.hidden) : copy.data;
    stride = in_place(p) ? p.hidden_stride : p.width;
    if (in_place(p)) return;
    with_dtype(p.dtype, [&](auto d) { gather<decltype(d)>(p); });
  }
  template <class D, class P>
  void gather(const P& p) {
    const auto* hidden = static_cast<const typename D::T*>(p.hidden);
    for (int64_t a = 0; a < p.active; ++a) {
      const auto* row = hidden + p.rows[a] * p.hidden_stride;
      for (int64_t h = 0; h < p.width; h += LANES) {
        store_some<Float32>(copy.data + a * p.width + h, load_some<D>(row + h, p.width - h, 0.f), p.width - h);
      }
    }
  }
};

// Statistics of one row over one thread's share of the vocabulary.
struct Partial {
  RowStats stats;
  float target_logit;  // 0 when the target is not in the share
};

// Each thread takes a share of the vocabulary and all rows, so that nobody waits for anybody.
template <class D>
static void forward_thread(const LinearLogprobsParams& p, const Rows& hidden, Partial* partials, float* packed,
                           float* tile, int64_t part, int64_t parts) {
  for (int64_t a = 0; a < p.active; ++a) partials[a] = Partial{RowStats{}, 0.f};
  const int64_t end = share(p.vocabulary, CHUNK, part + 1, parts);
  for (int64_t v = share(p.vocabulary, CHUNK, part, parts); v < end; v += CHUNK) {
    const int64_t count = smaller(CHUNK, end - v);
    const auto* weight = static_cast<const typename D::T*>(p.weight) + v * p.weight_stride;
    pack_transposed<D>(weight, p.weight_stride, count, p.width, packed);
    for (int64_t a = 0; a < p.active; a += ROW_BLOCK) {
      const int64_t n = smaller(ROW_BLOCK, p.active - a);
      gemm(n, count, p.width, hidden.data + a * hidden.stride, hidden.stride, 1, packed, tile, TILE_STRIDE, false);
      for (int64_t i = 0; i < n; ++i) {
        update_row<Float32>(partials[a + i].stats, tile + i * TILE_STRIDE, count, p.inverse_temperature);
        const int64_t t = p.targets[p.rows[a + i]] - v;
        if (t >= 0 && t < count) partials[a + i].target_logit = tile[i * TILE_STRIDE + t];
      }
    }
  }
}

static void merge(const LinearLogprobsParams& p, Partial* partials, int64_t parts) {
  for (int64_t i = 0; i < parts * p.active; ++i) finish_row(partials[i].stats, p.inverse_temperature);
  for (int64_t a = 0; a < p.active; ++a) {
    RowStats s = partials[a].stats;
    float target_logit = partials[a].target_logit;
    for (int64_t i = 1; i < parts; ++i) {
      const Partial& other = partials[i * p.active + a];
      s = merge_rows(s, other.stats, p.inverse_temperature);
      target_logit += other.target_logit;
    }
    const int64_t n = p.rows[a], t = p.targets[n];
    const double log_sum = ::log(s.sum);
    const bool here = t >= 0 && t < p.vocabulary;
    p.logprobs[n] = here ? float((double(target_logit) - s.max) * p.inverse_temperature - log_sum) : 0.f;
    p.entropy[n] = float(row_entropy(s));
    p.max[n] = s.max;
    p.log_sum[n] = float(log_sum);
  }
}

void linear_logprobs_cpu(const LinearLogprobsParams& p) {
  const int64_t threads = omp_in_parallel() ? 1 : omp_get_max_threads();
  const int64_t pack_size = CHUNK * p.width, tile_size = ROW_BLOCK * TILE_STRIDE;
  const Rows hidden(p);
  const Buffer workspace(threads * (pack_size + tile_size));
  const Buffer memory(threads * p.active * int64_t(sizeof(Partial) / sizeof(float)));
  Partial* partials = reinterpret_cast<Partial*>(memory.data);
  int64_t used = 1;
#pragma omp parallel num_threads(int(threads))
  {
    const int64_t part = omp_get_thread_num(), parts = omp_get_num_threads();
    if (part == 0) used = parts;
    float* packed = workspace.data + part * (pack_size + tile_size);
    with_dtype(p.dtype, [&](auto d) {
      forward_thread<decltype(d)>(p, hidden, partials + part * p.active, packed, packed + pack_size, part, parts);
    });
  }
  merge(p, partials, used);
}

// Floats of one thread's workspace in backward.
struct BackwardSizes {
  int64_t logits_side;  // packed chunk of weight for hidden weight^T
  int64_t hidden_side;  // the same chunk packed for d_logits weight; 0 when d_hidden is not wanted
  int64_t weight_side;  // packed tile of hidden for d_logits^T hidden; 0 when d_weight is not wanted
  int64_t tile;         // logits, then d_logits
  int64_t total() const { return logits_side + hidden_side + weight_side + tile; }
};

static BackwardSizes backward_sizes(const LinearLogprobsBackwardParams& p) {
  const int64_t width = panels(p.width) * PANEL;
  return {CHUNK * width, p.d_hidden ? CHUNK * width : 0, p.d_weight ? TILE_ROWS * width : 0, TILE_ROWS * TILE_STRIDE};
}

// tile = d loss / d logits of active rows [a, a + n) for the chunk of weight that starts at row v.
static void logits_gradient(const LinearLogprobsBackwardParams& p, const Rows& hidden, const float* logits_side,
                            int64_t a, int64_t n, int64_t v, int64_t count, float* tile) {
  gemm(n, count, p.width, hidden.data + a * hidden.stride, hidden.stride, 1, logits_side, tile, TILE_STRIDE, false);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t row = p.rows[a + i];
    const RowGradient g{p.max[row],
                        p.log_sum[row],
                        p.entropy[row],
                        p.d_logprobs ? p.d_logprobs[row] : 0.f,
                        p.d_entropy ? p.d_entropy[row] : 0.f,
                        p.inverse_temperature,
                        p.targets[row] - v};
    gradient_row<Float32>(g, tile + i * TILE_STRIDE, tile + i * TILE_STRIDE, count);
  }
}

// Gradients of the active rows and of weight, in float32; null when not wanted.
struct Gradients {
  float* hidden;  // [A, H]
  float* weight;  // [V, H]
};

// Active rows [begin, end) against one chunk of the vocabulary. first: nothing is in the chunk's d_weight yet.
template <class D>
static void backward_chunk(const LinearLogprobsBackwardParams& p, const Rows& hidden, Gradients d, int64_t begin,
                           int64_t end, int64_t v, int64_t count, bool first, float* workspace) {
  const BackwardSizes size = backward_sizes(p);
  float *logits_side = workspace, *hidden_side = logits_side + size.logits_side;
  float *weight_side = hidden_side + size.hidden_side, *tile = weight_side + size.weight_side;
  const auto* weight = static_cast<const typename D::T*>(p.weight) + v * p.weight_stride;
  pack_transposed<D>(weight, p.weight_stride, count, p.width, logits_side);
  if (d.hidden) pack<D>(weight, p.weight_stride, count, p.width, hidden_side);
  for (int64_t a = begin; a < end; a += TILE_ROWS) {
    const int64_t n = smaller(TILE_ROWS, end - a);
    logits_gradient(p, hidden, logits_side, a, n, v, count, tile);
    if (d.hidden) gemm(n, p.width, count, tile, TILE_STRIDE, 1, hidden_side, d.hidden + a * p.width, p.width, true);
    if (d.weight) {
      pack<Float32>(hidden.data + a * hidden.stride, hidden.stride, n, p.width, weight_side);
      gemm(count, p.width, n, tile, 1, TILE_STRIDE, weight_side, d.weight + v * p.width, p.width, !first || a > begin);
    }
  }
}

// A thread owns a share of the vocabulary, hence of d_weight; the shares of the rows, hence of d_hidden, go round: in
// step s thread i has rows share i + s. Nobody ever writes where another does, and there is one barrier per thread.
template <class D>
static void backward_thread(const LinearLogprobsBackwardParams& p, const Rows& hidden, Gradients d, float* workspace,
                            int64_t part, int64_t parts) {
  const int64_t v_begin = share(p.vocabulary, CHUNK, part, parts), v_end = share(p.vocabulary, CHUNK, part + 1, parts);
  bool first = true;
  for (int64_t step = 0; step < parts; ++step) {
    const int64_t group = (part + step) % parts;
    const int64_t begin = share(p.active, ROWS, group, parts), end = share(p.active, ROWS, group + 1, parts);
    for (int64_t v = v_begin; v < v_end && begin < end; v += CHUNK) {
      backward_chunk<D>(p, hidden, d, begin, end, v, smaller(CHUNK, v_end - v), first, workspace);
    }
    first = first && begin == end;
#pragma omp barrier
  }
}

template <class D>
static void store_all(const float* from, typename D::T* to, int64_t count) {
  for (int64_t i = 0; i < count; i += LANES) {
    store_some<D>(to + i, load_some<Float32>(from + i, count - i, 0.f), count - i);
  }
}

// Puts the gradients where they belong, unless they were made there.
template <class D>
static void store_gradients(const LinearLogprobsBackwardParams& p, Gradients d) {
  using T = typename D::T;
  T *d_hidden = static_cast<T*>(p.d_hidden), *d_weight = static_cast<T*>(p.d_weight);
  if (d.weight && (void*)d.weight != p.d_weight) store_all<D>(d.weight, d_weight, p.vocabulary * p.width);
  if (!d.hidden || (void*)d.hidden == p.d_hidden) return;
  for (int64_t a = 0; a < p.active; ++a) store_all<D>(d.hidden + a * p.width, d_hidden + p.rows[a] * p.width, p.width);
}

void linear_logprobs_backward_cpu(const LinearLogprobsBackwardParams& p) {
  const bool is_float = p.dtype == Dtype::float32;
  if (p.active == 0) {
    if (p.d_weight) memset(p.d_weight, 0, p.vocabulary * p.width * (is_float ? sizeof(float) : sizeof(uint16_t)));
    return;
  }
  const int64_t threads = omp_in_parallel() ? 1 : omp_get_max_threads(), size = backward_sizes(p).total();
  const Rows hidden(p);
  const bool hidden_in_place = Rows::in_place(p);
  // Sixteen-bit gradients are summed in float32 and rounded once.
  const Buffer d_weight(p.d_weight && !is_float ? p.vocabulary * p.width : 0), workspace(threads * size);
  const Buffer d_hidden(p.d_hidden && !hidden_in_place ? p.active * p.width : 0);
  const Gradients d{hidden_in_place ? static_cast<float*>(p.d_hidden) : d_hidden.data,
                    is_float ? static_cast<float*>(p.d_weight) : d_weight.data};
  if (d.hidden) memset(d.hidden, 0, p.active * p.width * sizeof(float));
#pragma omp parallel num_threads(int(threads))
  {
    const int64_t part = omp_get_thread_num(), parts = omp_get_num_threads();
    with_dtype(p.dtype, [&](auto type) {
      backward_thread<decltype(type)>(p, hidden, d, workspace.data + part * size, part, parts);
    });
  }
  with_dtype(p.dtype, [&](auto type) { store_gradients<decltype(type)>(p, d); });
}

}  // namespace aligner::ALIGNER_ISA
