#include "engine/matmul.h"
#include "parallel.h"
#include "simd.h"

namespace aligner::ALIGNER_ISA {

constexpr int64_t TILE_OUTPUTS = 4;                 // rows of W that are read side by side
constexpr int64_t TILE_ROWS = LANES == 16 ? 6 : 3;  // with 4 outputs: 24 of 32, or 12 of 16, registers accumulate
constexpr int64_t BLOCK_ROWS = 96;                  // rows of X that stay in L2 while W goes by
constexpr int FEW_ROWS = 4;                         // of X
constexpr int64_t STREAM_AHEAD = 4096;              // bytes
constexpr int64_t PARALLEL_WORK = 1 << 15;          // multiply-adds worth a second thread

typedef float vquad __attribute__((vector_size(16)));

struct Int8 {
  using T = int8_t;
  ALIGNER_INLINE vfloat load(const int8_t* p) {
#if defined(__AVX512F__)
    return (vfloat)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
    return (vfloat)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
    typedef int8_t vchar __attribute__((vector_size(LANES)));
    vchar v;
    memcpy(&v, p, sizeof v);
    return __builtin_convertvector(v, vfloat);
#endif
  }
};

// Lanes folded down to four. GCC 12 goes through the stack where halves are taken by memcpy.
ALIGNER_INLINE vquad fold(vfloat v) {
#if defined(__AVX512F__)
  const __m512 x = (__m512)v;
  const __m256 y = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  return (vquad)_mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
#elif defined(__AVX2__)
  return (vquad)_mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
#else
  vquad low, high;
  memcpy(&low, &v, sizeof low);
  memcpy(&high, (const char*)&v + sizeof low, sizeof high);
  return low + high;
#endif
}

// The sums over the lanes of each of four vectors: the same tree for every output.
ALIGNER_INLINE vquad lane_sums(vfloat v0, vfloat v1, vfloat v2, vfloat v3) {
  const vquad a = fold(v0), b = fold(v1), c = fold(v2), d = fold(v3);
#if defined(__AVX2__)
  return (vquad)_mm_hadd_ps(_mm_hadd_ps((__m128)a, (__m128)b), _mm_hadd_ps((__m128)c, (__m128)d));
#else
  return vquad{(a[0] + a[1]) + (a[2] + a[3]), (b[0] + b[1]) + (b[2] + b[3]), (c[0] + c[1]) + (c[2] + c[3]),
               (d[0] + d[1]) + (d[2] + d[3])};
#endif
}

// y (+)= the sums over the lanes, times the scales.
template <int M, int O>
ALIGNER_INLINE void finish(const MatmulParams& p, int64_t row, int64_t output, const vfloat (&sum)[M][O]) {
#pragma GCC unroll 6
  for (int i = 0; i < M; ++i) {
    float* y = p.y + (row + i) * p.outputs + output;
    vquad sums;
    if constexpr (O == TILE_OUTPUTS) {
      sums = lane_sums(sum[i][0], sum[i][1], sum[i][2], sum[i][3]);
    } else {
      sums = lane_sums(sum[i][0], vfloat{}, vfloat{}, vfloat{});
    }
    if (p.scales) {
      vquad scale{};
      memcpy(&scale, p.scales + output, O * sizeof *y);
      sums *= scale;
    }
    vquad old{};
    if (p.add) memcpy(&old, y, O * sizeof *y);
    sums += old;
    memcpy(y, &sums, O * sizeof *y);
  }
}

// Where the next rows of W lie: the hardware does not see the next tile.
struct Ahead {
  const char* first;
  int64_t rows, row_bytes;
};

template <class D, int M, int O>
static inline void tile(const MatmulParams& p, int64_t row, int64_t output, const Ahead& ahead) {
  const int64_t depth = p.depth;
  const float* x = p.x + row * depth;
  const typename D::T* w = static_cast<const typename D::T*>(p.weight) + output * depth;
  vfloat sum[M][O];
#pragma GCC unroll 6
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < O; ++j) sum[i][j] = vfloat{};
  }
  int64_t k = 0;
  for (; k + LANES <= depth; k += LANES) {
    for (int64_t r = 0; r < ahead.rows; ++r)
      __builtin_prefetch(ahead.first + r * ahead.row_bytes + k * int64_t(sizeof(typename D::T)));
    vfloat a[M];
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i) a[i] = Float32::load(x + i * depth + k);
#pragma GCC unroll 4
    for (int j = 0; j < O; ++j) {
      const vfloat b = D::load(w + j * depth + k);
#pragma GCC unroll 6
      for (int i = 0; i < M; ++i) sum[i][j] += a[i] * b;
    }
  }
  if (k < depth) {
#pragma GCC unroll 4
    for (int j = 0; j < O; ++j) {
      const vfloat b = load_part<D>(w + j * depth + k, depth - k, 0.f);
#pragma GCC unroll 6
      for (int i = 0; i < M; ++i) sum[i][j] += load_part<Float32>(x + i * depth + k, depth - k, 0.f) * b;
    }
  }
  finish<M, O>(p, row, output, sum);
}

// A product of few rows waits for W, which is read as one stream: a row after the other, fetched far ahead.
template <class D, int M>
static inline void few_rows(int64_t rows, const MatmulParams& p, int64_t row, int64_t output) {
  if constexpr (M > 1) {
    if (rows < M) return few_rows<D, M - 1>(rows, p, row, output);
  }
  const int64_t depth = p.depth, whole = depth / LANES * LANES;
  const float* x = p.x + row * depth;
  const typename D::T* w = static_cast<const typename D::T*>(p.weight) + output * depth;
  vfloat sum[M][TILE_OUTPUTS] = {};
  for (int j = 0; j < TILE_OUTPUTS; ++j, w += depth) {
    vfloat of_row[M] = {};
    for (int64_t k = 0; k < whole; k += LANES) {
      __builtin_prefetch(reinterpret_cast<const char*>(w + k) + STREAM_AHEAD);
      const vfloat b = D::load(w + k);
#pragma GCC unroll 4
      for (int i = 0; i < M; ++i) of_row[i] += Float32::load(x + i * depth + k) * b;
    }
    if (whole < depth) {
      const vfloat b = load_part<D>(w + whole, depth - whole, 0.f);
#pragma GCC unroll 4
      for (int i = 0; i < M; ++i) of_row[i] += load_part<Float32>(x + i * depth + whole, depth - whole, 0.f) * b;
    }
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) sum[i][j] = of_row[i];
  }
  finish<M, TILE_OUTPUTS>(p, row, output, sum);
}

template <class D, int M, int O>
static inline void tile_rows(int64_t rows, const MatmulParams& p, int64_t row, int64_t output, const Ahead& ahead) {
  if (rows == M) return tile<D, M, O>(p, row, output, ahead);
  if constexpr (M > 1) tile_rows<D, M - 1, O>(rows, p, row, output, ahead);
}

// Outputs [begin, end) of rows [row, row + rows).
template <class D>
static void block(const MatmulParams& p, int64_t row, int64_t rows, int64_t begin, int64_t end) {
  const int64_t row_bytes = p.depth * int64_t(sizeof(typename D::T));
  const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
  for (int64_t o = begin; o < end; o += TILE_OUTPUTS) {
    const char* next = static_cast<const char*>(p.weight) + (o + TILE_OUTPUTS) * row_bytes;
    if (rows <= FEW_ROWS && o + TILE_OUTPUTS <= end) {
      few_rows<D, FEW_ROWS>(rows, p, row, o);
      continue;
    }
    const int64_t count = smaller(TILE_OUTPUTS, end - o), next_rows = smaller(TILE_OUTPUTS, end - o - count);
    for (int64_t t = 0; t < tiles; ++t) {  // tiles of equal height, give or take one, each fetching its share of `next`
      const int64_t first = rows * t / tiles, height = rows * (t + 1) / tiles - first;
      const int64_t fetch = next_rows * t / tiles, fetch_end = next_rows * (t + 1) / tiles;
      const Ahead ahead{next + fetch * row_bytes, fetch_end - fetch, row_bytes};
      if (count == TILE_OUTPUTS) {
        tile_rows<D, TILE_ROWS, TILE_OUTPUTS>(height, p, row + first, o, ahead);
      } else {
        for (int64_t j = 0; j < count; ++j) tile_rows<D, TILE_ROWS, 1>(height, p, row + first, o + j, Ahead{});
      }
    }
  }
}

template <class D>
static void multiply(const MatmulParams& p) {
  const int64_t tiles = (p.outputs + TILE_OUTPUTS - 1) / TILE_OUTPUTS;
  const int64_t grain = 1 + PARALLEL_WORK / larger(1, p.rows * p.depth * TILE_OUTPUTS);
  parallel_parts(tiles, grain, [&](int64_t begin, int64_t end, int) {
    for (int64_t row = 0; row < p.rows; row += BLOCK_ROWS) {
      block<D>(p, row, smaller(BLOCK_ROWS, p.rows - row), begin * TILE_OUTPUTS, smaller(p.outputs, end * TILE_OUTPUTS));
    }
  });
}

void matmul_cpu(const MatmulParams& p) {
  if (p.scales) return multiply<Int8>(p);
  with_dtype(p.dtype, [&](auto d) { multiply<decltype(d)>(p); });
}

}  // namespace aligner::ALIGNER_ISA
