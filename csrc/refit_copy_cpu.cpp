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

static uint64_t checksum(const uint32_t* x, int64_t count, int64_t first) { return checksum_by_one(x, count, first); }

// Sixteen bits are bound by arithmetic, so no products: a sum, and a sum of its running values, of up to 255 vectors,
// as many as 31 bits hold. Vector k of n is in the running sum n - k times.
static uint64_t checksum(const uint16_t* x, int64_t count, int64_t first) {
  constexpr int64_t BLOCK = 255;
  uint64_t total = 0;
  while (count >= LANES) {
    const int64_t n = smaller(BLOCK, count / LANES);
    const uint32_t weight = uint32_t(2 * first + 1);
    if (weight > UINT32_MAX - 2 * BLOCK * LANES) break;  // weights wrap around
    vint sum{}, running{};
    for (int64_t k = 0; k < n; ++k) {
      sum += load_ushort(x + k * LANES);
      running += sum;
    }
    for (int64_t lane = 0; lane < LANES; ++lane) {
      const uint64_t s = uint32_t(sum[lane]), r = uint32_t(running[lane]);
      total += s * weight + 2 * (LANES * (n * s - r) + lane * s);
    }
    x += n * LANES, first += n * LANES, count -= n * LANES;
  }
  return total + checksum_by_one(x, count, first);
}

// Rows [row, row + rows), columns [column, column + count) of an item, right after they were written.
static uint64_t copy_tile(const RefitItem& item, int64_t row, int64_t rows, int64_t column, int64_t count, bool sum) {
  const int64_t source_bytes = dtype_bytes(item.source_dtype), bytes = dtype_bytes(item.destination_dtype);
  uint64_t total = 0;
  for (int64_t r = row; r < row + rows; ++r) {
    const char* from = static_cast<const char*>(item.source) + (r * item.source_pitch + column) * source_bytes;
    char* to = static_cast<char*>(item.destination) + (r * item.destination_pitch + column) * bytes;
    if (from != to) copy_run(item, from, to, count);  // an item that is its own source is only summed up
    if (!sum) continue;
    const int64_t first = r * item.columns + column;
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
      const uint64_t sum = copy_tile(item, row, rows, column, count, p.checksums != nullptr);
      if (p.checksums) __atomic_fetch_add(p.checksums + i, sum, __ATOMIC_RELAXED);
    }
  });
}

}  // namespace aligner::ALIGNER_ISA
