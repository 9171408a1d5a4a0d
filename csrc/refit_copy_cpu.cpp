#include "parallel.h"
#include "refit_copy.h"
#include "simd.h"

namespace aligner::ALIGNER_ISA {

typedef uint64_t vlong __attribute__((vector_size(LANES * 4)));

ALIGNER_INLINE vlong multiply_lower(vlong a, vlong b) {  // the lower halves
#if defined(__AVX512F__)
  return (vlong)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (vlong)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#else
  return (a & 0xffffffff) * (b & 0xffffffff);
#endif
}

// The checksum of elements that come in order, row after row: rows may be short, so none starts or ends a sum.
struct Checksum {
  vlong total;   // each of an even lane and the odd one after it
  vlong weight;  // of the next vector's even lanes, in the lower halves
};
ALIGNER_INLINE Checksum checksum_from(int64_t first) {
  Checksum c{};
  for (int64_t i = 0; i < LANES / 2; ++i) c.weight[i] = uint64_t(2 * (first + 2 * i) + 1);
  return c;
}
ALIGNER_INLINE void add_vector(Checksum& c, vint bits, int64_t count) {  // the next `count`; other lanes are zero
  c.total += multiply_lower((vlong)bits, c.weight) + multiply_lower((vlong)bits >> 32, c.weight + 2);
  c.weight += uint64_t(2 * count);
}

// next(k) gives the bits of vector k.
template <class Next>
ALIGNER_INLINE void add_vectors(Float32, Checksum& c, int64_t count, const Next& next) {
  for (int64_t k = 0; k < count; ++k) add_vector(c, next(k), LANES);
}
// Sixteen bits are bound by arithmetic, so no products for each vector: a sum, and a sum of its running values, of up
// to 255, as many as 32 bits hold. Vector k of n is in the running sum n - k times.
template <class D, class Next>
ALIGNER_INLINE void add_vectors(D, Checksum& c, int64_t count, const Next& next) {
  constexpr int64_t MOST = 255;
  for (int64_t k = 0; k < count;) {
    const bool wraps = uint32_t(c.weight[0]) > UINT32_MAX - 2 * LANES * (MOST + 1);  // then each by itself
    const int64_t n = wraps ? 1 : smaller(MOST, count - k);
    vint sum{}, running{};
    for (const int64_t end = k + n; k < end; ++k) {
      sum += next(k);
      running += sum;
    }
    const vlong later = (vlong)(sum * int32_t(n) - running);  // k times vector k
    c.total += 2 * LANES * ((later & 0xffffffff) + (later >> 32));
    add_vector(c, sum, n * LANES);
  }
}

// Bits as stored; those of sixteen-bit numbers are the lower halves of lanes.
ALIGNER_INLINE vint load_bits(const float* p) { return (vint)Float32::load(p); }
ALIGNER_INLINE vint load_bits(const uint16_t* p) { return load_ushort(p); }
ALIGNER_INLINE void store_bits(float* p, vint v) { Float32::store(p, (vfloat)v); }
ALIGNER_INLINE void store_bits(uint16_t* p, vint v) { store_ushort(p, v); }

// Past the caches: the destination's lines need not be fetched first.
ALIGNER_INLINE void stream_bits(float* p, vint v) {
#if defined(__AVX512F__)
  _mm512_stream_si512((__m512i*)p, (__m512i)v);
#elif defined(__AVX2__)
  _mm256_stream_si256((__m256i*)p, (__m256i)v);
#else
  store_bits(p, v);
#endif
}
ALIGNER_INLINE void stream_bits(uint16_t* p, vint v) {
#if defined(__AVX512F__)
  _mm256_stream_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)v));
#elif defined(__AVX2__)
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)v, (__m256i)v), 0x08);
  _mm_stream_si128((__m128i*)p, _mm256_castsi256_si128(packed));
#else
  store_bits(p, v);
#endif
}

ALIGNER_INLINE vint rounded(Float32, vfloat v) { return (vint)v; }
ALIGNER_INLINE vint rounded(Bfloat16, vfloat v) { return (Bfloat16::round(v) >> 16) & 0xffff; }
ALIGNER_INLINE vint rounded(Float16, vfloat v) {
  uint16_t t[LANES];
  Float16::store(t, v);
  return load_ushort(t);
}
template <class S, class D>
ALIGNER_INLINE vint cast(const typename S::T* p, bool add_one) {
  if constexpr (__is_same(S, D)) {
    if (!add_one) return load_bits(p);  // every bit, a NaN's too
  }
  return rounded(D{}, add_one ? S::load(p) + 1.f : S::load(p));  // -0 + 0 would lose its sign
}

enum class Store { none, cached, streamed };

// Less than a vector.
template <class S, class D, Store store>
ALIGNER_INLINE void copy_part(const typename S::T* from, typename D::T* to, int64_t count, bool add_one, Checksum& c) {
  typename S::T source[LANES] = {};
  typename D::T result[LANES], summed[LANES] = {};
  memcpy(source, from, count * sizeof *from);
  store_bits(result, cast<S, D>(source, add_one));
  memcpy(summed, result, count * sizeof *to);
  if constexpr (store != Store::none) memcpy(to, summed, count * sizeof *to);
  add_vector(c, load_bits(summed), count);
}

// `ahead`: elements from here to what is asked for early.
template <class S, class D, Store store>
ALIGNER_INLINE void copy_row(const typename S::T* from, typename D::T* to, int64_t count, bool add_one, int64_t ahead,
                             Checksum& c) {
  if constexpr (store == Store::streamed) {  // to a whole vector
    const int64_t head = smaller(count, -(intptr_t(to) / int64_t(sizeof *to)) & (LANES - 1));
    if (head > 0) copy_part<S, D, store>(from, to, head, add_one, c);
    from += head, to += head, count -= head;
  }
  add_vectors(D{}, c, count / LANES, [&](int64_t k) {
    __builtin_prefetch(from + k * LANES + ahead);
    const vint bits = cast<S, D>(from + k * LANES, add_one);
    if constexpr (store == Store::cached) store_bits(to + k * LANES, bits);
    if constexpr (store == Store::streamed) stream_bits(to + k * LANES, bits);
    return bits;
  });
  const int64_t tail = count % LANES, whole = count - tail;
  if (tail > 0) copy_part<S, D, store>(from + whole, to + whole, tail, add_one, c);
}

// The hardware foresees the lines of a long row, but not the next row of a box: its lines are asked for this early.
constexpr int64_t PREFETCH = 16 << 10;  // bytes of the box

// Rows [row, row + rows), columns [column, column + count) of an item: copied, and their checksum.
template <class S, class D, Store store>
static uint64_t copy_rows(const RefitItem& item, int64_t row, int64_t rows, int64_t column, int64_t count) {
  const auto* from = static_cast<const typename S::T*>(item.source) + column;
  auto* to = static_cast<typename D::T*>(item.destination) + column;
  const int64_t rows_ahead = larger(1, PREFETCH / int64_t(count * sizeof *from));
  Checksum c = checksum_from(row * item.columns + column);
  for (int64_t r = row; r < row + rows; ++r) {
    const int64_t ahead = smaller(rows_ahead, item.rows - 1 - r) * item.source_pitch;
    copy_row<S, D, store>(from + r * item.source_pitch, to + r * item.destination_pitch, count, item.add_one, ahead, c);
  }
  uint64_t sum = 0;
  for (int64_t i = 0; i < LANES / 2; ++i) sum += c.total[i];
  return sum;
}

// The caches hold fewer tiles: nothing that is written now is read again soon.
constexpr int64_t STREAM_TILES = 256;
constexpr int64_t LINE = 64;  // bytes

// Streaming parts of a line is slower than storing them: many rows must be whole lines each.
static bool rows_are_lines(const RefitItem& item) {
  const int64_t bytes = dtype_bytes(item.destination_dtype);
  const int64_t all = intptr_t(item.destination) | item.destination_pitch * bytes | item.columns * bytes;
  return item.rows == 1 || all % LINE == 0;
}

static uint64_t copy_tile(const RefitItem& item, int64_t row, int64_t rows, int64_t column, int64_t count,
                          bool stream) {
  uint64_t sum = 0;
  with_dtype(item.destination_dtype, [&](auto d) {
    using D = decltype(d);
    if (item.source == item.destination) {  // only summed up
      sum = copy_rows<D, D, Store::none>(item, row, rows, column, count);
      return;
    }
    with_dtype(item.source_dtype, [&](auto s) {
      using S = decltype(s);
      sum = stream && rows_are_lines(item) ? copy_rows<S, D, Store::streamed>(item, row, rows, column, count)
                                           : copy_rows<S, D, Store::cached>(item, row, rows, column, count);
    });
  });
  return sum;
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
      const uint64_t sum = copy_tile(item, row, rows, column, count, p.num_tiles > STREAM_TILES);
      if (p.checksums) __atomic_fetch_add(p.checksums + i, sum, __ATOMIC_RELAXED);
    }
#if defined(__AVX2__)
    _mm_sfence();  // streamed stores are ordered by nothing else
#endif
  });
}

}  // namespace aligner::ALIGNER_ISA
