#include "parallel.h"
#include "refit_copy.h"
#include "simd.h"

namespace aligner::ALIGNER_ISA {

template <class S, class D>
static void cast_run(const RefitItem& item, const void* from, void* to, int64_t count) {
  const auto* s = static_cast<const typename S::T*>(from);
  auto* d = static_cast<typename D::T*>(to);
  const vfloat one = splat(item.add_one ? 1.f : 0.f);
  for (int64_t i = 0; i < count; i += LANES) {
    vfloat v = load_some<S>(s + i, count - i, 0.f);
    if (item.add_one) v += one;  // -0 + 0 would lose its sign
    store_some<D>(d + i, v, count - i);
  }
}

// One stretch of a row.
static void copy_run(const RefitItem& item, const void* from, void* to, int64_t count) {
  if (item.source_dtype == item.destination_dtype && !item.add_one) {
    memcpy(to, from, count * dtype_bytes(item.source_dtype));
    return;
  }
  with_dtype(item.source_dtype, [&](auto s) {
    with_dtype(item.destination_dtype, [&](auto d) { cast_run<decltype(s), decltype(d)>(item, from, to, count); });
  });
}

template <class T>
static uint64_t checksum_by_one(const T* x, int64_t count, int64_t first) {
  uint64_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += uint64_t(x[i]) * uint32_t(2 * (first + i) + 1);
  return sum;
}

#if defined(__AVX512F__)
typedef __m512i vbits;
ALIGNER_INLINE vbits load_bits(const uint32_t* p) { return _mm512_loadu_si512(p); }
ALIGNER_INLINE void stream_bits(uint32_t* p, vbits v) { _mm512_stream_si512((__m512i*)p, v); }
ALIGNER_INLINE vbits odd_to_even(vbits v) { return _mm512_srli_epi64(v, 32); }
ALIGNER_INLINE vbits multiply_even(vbits a, vbits b) { return _mm512_mul_epu32(a, b); }
#elif defined(__AVX2__)
typedef __m256i vbits;
ALIGNER_INLINE vbits load_bits(const uint32_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
ALIGNER_INLINE void stream_bits(uint32_t* p, vbits v) { _mm256_stream_si256((__m256i*)p, v); }
ALIGNER_INLINE vbits odd_to_even(vbits v) { return _mm256_srli_epi64(v, 32); }
ALIGNER_INLINE vbits multiply_even(vbits a, vbits b) { return _mm256_mul_epu32(a, b); }
#endif

#if defined(__AVX2__)
typedef uint64_t vlong __attribute__((vector_size(LANES * 4)));

// The checksum of `count` elements from `first` on, a multiple of LANES; with `to`, they also go there, past the
// caches.
template <bool stream>
static uint64_t checksum_vectors(const uint32_t* x, uint32_t* to, int64_t count, int64_t first) {
  vlong even, odd, sum{};
  for (int64_t i = 0; i < LANES / 2; ++i) {
    even[i] = uint64_t(2 * (first + 2 * i) + 1);
    odd[i] = even[i] + 2;
  }
  for (int64_t i = 0; i < count; i += LANES) {
    const vbits v = load_bits(x + i);
    if constexpr (stream) stream_bits(to + i, v);
    sum += (vlong)multiply_even(v, (vbits)even) + (vlong)multiply_even(odd_to_even(v), (vbits)odd);
    even += 2 * LANES, odd += 2 * LANES;
  }
  uint64_t total = 0;
  for (int64_t i = 0; i < LANES / 2; ++i) total += sum[i];
  return total;
}

static uint64_t checksum(const uint32_t* x, int64_t count, int64_t first) {
  const int64_t whole = count / LANES * LANES;
  return checksum_vectors<false>(x, nullptr, whole, first) + checksum_by_one(x + whole, count - whole, first + whole);
}

// Copies 32-bit elements past the caches and sums them up: the destination's lines need not be fetched first.
static uint64_t stream_copy(const uint32_t* x, uint32_t* to, int64_t count, int64_t first) {
  const int64_t misplaced = -(intptr_t(to) / 4) & (LANES - 1), head = smaller(count, misplaced);
  const int64_t whole = (count - head) / LANES * LANES, tail = count - head - whole;
  memcpy(to, x, head * 4);
  const uint64_t total = checksum_by_one(x, head, first) +
                         checksum_vectors<true>(x + head, to + head, whole, first + head) +
                         checksum_by_one(x + head + whole, tail, first + head + whole);
  memcpy(to + head + whole, x + head + whole, tail * 4);
  return total;
}
#else
static uint64_t checksum(const uint32_t* x, int64_t count, int64_t first) { return checksum_by_one(x, count, first); }
static uint64_t stream_copy(const uint32_t* x, uint32_t* to, int64_t count, int64_t first) {
  memcpy(to, x, count * 4);
  return checksum_by_one(to, count, first);
}
#endif

// Sixteen bits are bound by arithmetic, so no products: a sum, and a sum of its running values, of up to 255 vectors,
// as many as 31 bits hold. Vector k of n is in the running sum n - k times. next(i) gives the vector at element i.
// Returns how many elements were summed up: fewer where weights wrap around.
constexpr int64_t SUM_VECTORS = 255;
constexpr int64_t WEIGHTS_WRAP = (INT64_C(1) << 31) - SUM_VECTORS * LANES;  // element
template <class Next>
ALIGNER_INLINE int64_t checksum_blocks(int64_t count, int64_t first, uint64_t* total, const Next& next) {
  int64_t i = 0;
  while (count - i >= LANES && first + i < WEIGHTS_WRAP) {
    const int64_t n = smaller(SUM_VECTORS, (count - i) / LANES);
    vint sum{}, running{};
    for (int64_t k = 0; k < n; ++k) {
      sum += next(i + k * LANES);
      running += sum;
    }
    for (int64_t lane = 0; lane < LANES; ++lane) {
      const uint64_t s = uint32_t(sum[lane]), r = uint32_t(running[lane]);
      *total += s * uint64_t(2 * (first + i) + 1) + 2 * (LANES * (n * s - r) + lane * s);
    }
    i += n * LANES;
  }
  return i;
}

static uint64_t checksum(const uint16_t* x, int64_t count, int64_t first) {
  uint64_t total = 0;
  const int64_t done = checksum_blocks(count, first, &total, [&](int64_t i) { return load_ushort(x + i); });
  return total + checksum_by_one(x + done, count - done, first + done);
}

ALIGNER_INLINE void stream_ushort(uint16_t* p, vint v) {
#if defined(__AVX512F__)
  _mm256_stream_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)v));
#elif defined(__AVX2__)
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)v, (__m256i)v), 0x08);
  _mm_stream_si128((__m128i*)p, _mm256_castsi256_si128(packed));
#else
  store_ushort(p, v);
#endif
}

// The same from float32 to bfloat16.
static uint64_t stream_copy(const float* x, uint16_t* to, int64_t count, int64_t first) {
  const auto one = [&](int64_t i, int64_t n) {
    for (const int64_t end = i + n; i < end; ++i) store_part<Bfloat16>(to + i, splat(x[i]), 1);
  };
  const int64_t head = smaller(count, -(intptr_t(to) / 2) & (LANES - 1));
  one(0, head);
  uint64_t total = checksum_by_one(to, head, first);
  int64_t done = head + checksum_blocks(count - head, first + head, &total, [&](int64_t i) {
                   const vint bits = (Bfloat16::round(Float32::load(x + head + i)) >> 16) & 0xffff;
                   stream_ushort(to + head + i, bits);
                   return bits;
                 });
  one(done, count - done);
  return total + checksum_by_one(to + done, count - done, first + done);
}

// More tiles than the caches hold: nothing that is written now is read again soon.
constexpr int64_t STREAM_TILES = 256;

// Rows [row, row + rows), columns [column, column + count) of an item, right after they were written.
static uint64_t copy_tile(const RefitItem& item, int64_t row, int64_t rows, int64_t column, int64_t count, bool sum,
                          bool stream) {
  stream = stream && item.source_dtype == Dtype::float32 && item.destination_dtype != Dtype::float16 && !item.add_one;
  const int64_t source_bytes = dtype_bytes(item.source_dtype), bytes = dtype_bytes(item.destination_dtype);
  uint64_t total = 0;
  for (int64_t r = row; r < row + rows; ++r) {
    const char* from = static_cast<const char*>(item.source) + (r * item.source_pitch + column) * source_bytes;
    char* to = static_cast<char*>(item.destination) + (r * item.destination_pitch + column) * bytes;
    const int64_t first = r * item.columns + column;
    if (stream && from != to) {
      total += bytes == 4 ? stream_copy((const uint32_t*)from, (uint32_t*)to, count, first)
                          : stream_copy((const float*)from, (uint16_t*)to, count, first);
      continue;
    }
    if (from != to) copy_run(item, from, to, count);  // an item that is its own source is only summed up
    if (!sum) continue;
    total += bytes == 4 ? checksum(reinterpret_cast<const uint32_t*>(to), count, first)
                        : checksum(reinterpret_cast<const uint16_t*>(to), count, first);
  }
  return total;
}

void refit_copy_cpu(const RefitCopyParams& p) {
  parallel_parts(p.num_tiles, 1, [&](int64_t begin, int64_t end, int) {
    int64_t i = 0;
    for (int64_t tile = begin; tile < end; ++tile) {
      while (p.first_tile[i + 1] <= tile) ++i;
      const RefitItem& item = p.items[i];
      const RefitTiles tiles = refit_tiles(item.rows, item.columns);
      const int64_t local = tile - p.first_tile[i], piece = local % tiles.pieces;
      const int64_t row = local / tiles.pieces * tiles.bundle, rows = smaller(tiles.bundle, item.rows - row);
      const int64_t column = piece * REFIT_TILE, count = smaller(REFIT_TILE, item.columns - column);
      const uint64_t sum =
          copy_tile(item, row, rows, column, count, p.checksums != nullptr, p.num_tiles > STREAM_TILES);
      if (p.checksums) __atomic_fetch_add(p.checksums + i, sum, __ATOMIC_RELAXED);
    }
#if defined(__AVX2__)
    _mm_sfence();  // streamed stores are ordered by nothing else
#endif
  });
}

}  // namespace aligner::ALIGNER_ISA
