// Float32 matrix product on packed panels: C (+)= A B. Included only by *_cpu.cpp.
// A is read in place through two strides, so that it may be transposed; B is packed in panels of PANEL columns.
#pragma once
#include "buffer.h"
#include "simd.h"

namespace aligner::ALIGNER_ISA {

constexpr int64_t PANEL = 2 * LANES;            // columns
constexpr int64_t ROWS = LANES == 16 ? 12 : 6;  // twelve of sixteen AVX registers, or 24 of 32, hold accumulators
constexpr int64_t ROW_BLOCK = 96;               // rows of A that stay in L2 while the panels go by
constexpr int64_t DEPTH = 9216 / PANEL;         // of B kept at once, 36 KB; slicing shallower was measured slower

ALIGNER_INLINE int64_t panels(int64_t columns) { return (columns + PANEL - 1) / PANEL; }

// Panel i of B = X^T (columns of B are rows of X), depth = columns of X. dst: [depth][PANEL], zero beyond the last row.
template <class D>
static void pack_transposed_panel(const typename D::T* x, int64_t row_stride, int64_t rows, int64_t depth, int64_t i,
                                  float* dst) {
  const int64_t n = smaller(PANEL, rows - i * PANEL);
  const typename D::T* p = x + i * PANEL * row_stride;
  for (int64_t k = 0; k < depth; ++k, dst += PANEL) {
    if (n == PANEL) {
#pragma GCC unroll 32
      for (int64_t j = 0; j < PANEL; ++j) dst[j] = D::get(p + j * row_stride + k);
    } else {
      for (int64_t j = 0; j < PANEL; ++j) dst[j] = j < n ? D::get(p + j * row_stride + k) : 0.f;
    }
  }
}

// Panel i of B = X, depth = rows of X. dst: [depth][PANEL], zero beyond the last column.
template <class D>
static void pack_panel(const typename D::T* x, int64_t row_stride, int64_t depth, int64_t columns, int64_t i,
                       float* dst) {
  const int64_t n = smaller(PANEL, columns - i * PANEL);
  for (int64_t k = 0; k < depth; ++k) {
    const typename D::T* p = x + k * row_stride + i * PANEL;
    Float32::store(dst + k * PANEL, load_some<D>(p, n, 0.f));
    Float32::store(dst + k * PANEL + LANES, n > LANES ? load_some<D>(p + LANES, n - LANES, 0.f) : vfloat{});
  }
}

template <class D>
static void pack_transposed(const typename D::T* x, int64_t row_stride, int64_t rows, int64_t depth, float* dst) {
  for (int64_t i = 0; i < panels(rows); ++i) {
    pack_transposed_panel<D>(x, row_stride, rows, depth, i, dst + i * depth * PANEL);
  }
}
template <class D>
static void pack(const typename D::T* x, int64_t row_stride, int64_t depth, int64_t columns, float* dst) {
  for (int64_t i = 0; i < panels(columns); ++i)
    pack_panel<D>(x, row_stride, depth, columns, i, dst + i * depth * PANEL);
}

template <int M>
static inline void tile(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t depth, float* c,
                        int64_t c_row, int64_t columns, bool add) {
  for (int i = 0; i < M; ++i) __builtin_prefetch(c + i * c_row, 1);  // C is beyond L2, and wanted only at the end
  vfloat acc[M][2];
// GCC 12 keeps the accumulators on the stack unless these loops are unrolled: a third of the speed.
#pragma GCC unroll 12
  for (int i = 0; i < M; ++i) acc[i][0] = acc[i][1] = vfloat{};
  for (int64_t k = 0; k < depth; ++k) {
    const vfloat b0 = Float32::load(b + k * PANEL), b1 = Float32::load(b + k * PANEL + LANES);
#pragma GCC unroll 12
    for (int i = 0; i < M; ++i) {
      const vfloat x = splat(a[i * a_row + k * a_column]);
      acc[i][0] += x * b0;
      acc[i][1] += x * b1;
    }
  }
  if (columns < PANEL) {
    float last[M * PANEL];
#pragma GCC unroll 12
    for (int i = 0; i < M; ++i) {
      Float32::store(last + i * PANEL, acc[i][0]);
      Float32::store(last + i * PANEL + LANES, acc[i][1]);
    }
    for (int i = 0; i < M; ++i) {
      for (int64_t j = 0; j < columns; ++j) c[i * c_row + j] = last[i * PANEL + j] + (add ? c[i * c_row + j] : 0.f);
    }
    return;
  }
#pragma GCC unroll 12
  for (int i = 0; i < M; ++i) {
    float* out = c + i * c_row;
    Float32::store(out, add ? acc[i][0] + Float32::load(out) : acc[i][0]);
    Float32::store(out + LANES, add ? acc[i][1] + Float32::load(out + LANES) : acc[i][1]);
  }
}

template <int M>
static inline void tiles(int64_t rows, const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t depth,
                         float* c, int64_t c_row, int64_t columns, bool add) {
  if (rows == M) return tile<M>(a, a_row, a_column, b, depth, c, c_row, columns, add);
  if constexpr (M > 1) tiles<M - 1>(rows, a, a_row, a_column, b, depth, c, c_row, columns, add);
}

// C (+)= A B. A: [rows, depth] through strides; packed: panels(columns) panels, each [depth][PANEL]; C: [rows,
// columns].
static void gemm(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_row, int64_t a_column,
                 const float* packed, float* c, int64_t c_row, bool add) {
  const int64_t slices = larger(1, (depth + DEPTH - 1) / DEPTH);
  for (int64_t r = 0; r < rows; r += ROW_BLOCK) {
    const int64_t r_end = smaller(r + ROW_BLOCK, rows);
    for (int64_t s = 0; s < slices; ++s) {
      const int64_t k = depth * s / slices, k_count = depth * (s + 1) / slices - k;
      for (int64_t j = 0; j < columns; j += PANEL) {
        const float* b = packed + j * depth + k * PANEL;
        for (int64_t i = r; i < r_end; i += ROWS) {
          tiles<ROWS>(smaller(ROWS, r_end - i), a + i * a_row + k * a_column, a_row, a_column, b, k_count,
                      c + i * c_row + j, c_row, columns - j, add || s > 0);
        }
      }
    }
  }
}

}  // namespace aligner::ALIGNER_ISA
