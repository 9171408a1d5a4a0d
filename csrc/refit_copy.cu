// Source: see refit_copy.h. One block takes one tile.
#include "cuda_kernel.cuh"
#include "refit_copy.h"

namespace aligner {
namespace {

constexpr int TILE_BLOCK = 256;  // threads

struct Tile {
  int64_t item, row, rows, column, columns;
};

// Which item a tile belongs to: the last whose first tile is not beyond it.
__device__ __forceinline__ Tile find_tile(const RefitCopyParams& p, int64_t tile, RefitItem& item) {
  int64_t low = 0, high = p.num_items;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (load(p.first_tile + middle) <= tile ? low : high) = middle;
  }
  item = load(p.items + low);
  const RefitTiles tiles = refit_tiles(item.rows, item.columns);
  const int64_t local = tile - load(p.first_tile + low);
  const int64_t row = local / tiles.pieces * tiles.bundle, column = local % tiles.pieces * REFIT_TILE;
  const int64_t rows = item.rows - row, columns = item.columns - column;
  return {low, row, rows < tiles.bundle ? rows : tiles.bundle, column, columns < REFIT_TILE ? columns : REFIT_TILE};
}

template <class S, class D>
__device__ __forceinline__ D cast(S x, bool add_one) {
  if constexpr (std::is_same_v<S, D>) {
    if (!add_one) return x;  // every bit, a NaN's too
  }
  return from_float<D>(add_one ? to_float(x) + 1.f : to_float(x));
}

template <class T>
__device__ __forceinline__ uint32_t bits_of(T x) {
  if constexpr (sizeof(T) == 4) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
  } else {
    uint16_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
  }
}

// Elements that a thread copies at once: 16 bytes of the wider type, so that a warp moves whole sectors on both sides.
template <class S, class D>
constexpr int RUN = sizeof(S) > sizeof(D) ? VECTOR<S> : VECTOR<D>;

template <int BYTES>
using Word = std::conditional_t<BYTES == 16, uint4, uint2>;

template <class T, int COUNT>
__device__ __forceinline__ void load_run(const T* p, T (&x)[COUNT]) {
  const auto bits = load(reinterpret_cast<const Word<sizeof x>*>(p));
  memcpy(static_cast<void*>(x), &bits, sizeof x);
}
template <class T, int COUNT>
__device__ __forceinline__ void store_run(T* p, const T (&x)[COUNT]) {
  Word<sizeof x> bits;
  memcpy(&bits, x, sizeof x);
  store(reinterpret_cast<Word<sizeof x>*>(p), bits);
}

// Returns this thread's part of the checksum.
template <class S, class D>
__device__ __forceinline__ uint64_t copy_tile(const RefitItem& item, const Tile& tile) {
  const S* from = static_cast<const S*>(item.source) + tile.row * item.source_pitch + tile.column;
  D* to = static_cast<D*>(item.destination) + tile.row * item.destination_pitch + tile.column;
  const int64_t first = tile.row * item.columns + tile.column;
  uint64_t sum = 0;
  constexpr int COUNT = RUN<S, D>;
  const auto add = [&](D x, int64_t element) { sum += uint64_t(bits_of(x)) * uint32_t(2 * element + 1); };
  const bool aligned = reinterpret_cast<uintptr_t>(from) % 16 == 0 && reinterpret_cast<uintptr_t>(to) % 16 == 0 &&
                       (tile.rows == 1 || (item.source_pitch % COUNT == 0 && item.destination_pitch % COUNT == 0));
  // A tile has at most REFIT_TILE elements: 32 bits spare the division of 64.
  const unsigned runs = aligned ? unsigned(tile.columns / COUNT) : 0, rest = unsigned(tile.columns) - runs * COUNT;
  for (unsigned i = threadIdx.x; i < unsigned(tile.rows) * runs; i += blockDim.x) {
    const int64_t r = i / runs, c = i % runs * COUNT;
    S x[COUNT];
    D y[COUNT];
    load_run(from + r * item.source_pitch + c, x);
#pragma unroll
    for (int k = 0; k < COUNT; ++k) {
      y[k] = cast<S, D>(x[k], item.add_one);
      add(y[k], first + r * item.columns + c + k);
    }
    store_run(to + r * item.destination_pitch + c, y);
  }
  for (unsigned i = threadIdx.x; i < unsigned(tile.rows) * rest; i += blockDim.x) {
    const int64_t r = i / rest, c = runs * COUNT + i % rest;
    const D y = cast<S, D>(load(from + r * item.source_pitch + c), item.add_one);
    add(y, first + r * item.columns + c);
    store(to + r * item.destination_pitch + c, y);
  }
  return sum;
}

template <class S>
__device__ __forceinline__ uint64_t copy_tile_from(const RefitItem& item, const Tile& tile) {
  switch (item.destination_dtype) {
    case Dtype::float32:
      return copy_tile<S, float>(item, tile);
    case Dtype::bfloat16:
      return copy_tile<S, __nv_bfloat16>(item, tile);
    default:
      return copy_tile<S, __half>(item, tile);
  }
}

__global__ void __launch_bounds__(TILE_BLOCK) refit_copy_tiles(RefitCopyParams p) {
  RefitItem item;
  const Tile tile = find_tile(p, blockIdx.x, item);
  uint64_t sum;
  switch (item.source_dtype) {
    case Dtype::float32:
      sum = copy_tile_from<float>(item, tile);
      break;
    case Dtype::bfloat16:
      sum = copy_tile_from<__nv_bfloat16>(item, tile);
      break;
    default:
      sum = copy_tile_from<__half>(item, tile);
  }
  if (!p.checksums) return;
  sum = block_reduce(sum, uint64_t(0), [](uint64_t a, uint64_t b) { return a + b; });
  // Integers: the order in which blocks add does not matter.
  if (threadIdx.x == 0)
    atomicAdd(reinterpret_cast<unsigned long long*>(p.checksums + tile.item), static_cast<unsigned long long>(sum));
}

}  // namespace

static void refit_copy(const RefitCopyParams& p, double*, cudaStream_t stream) {
  if (p.num_tiles == 0) return;
  ALIGNER_LAUNCH(refit_copy_tiles, p.num_tiles, TILE_BLOCK, stream, p);
}

}  // namespace aligner

ALIGNER_CUDA_KERNEL(refit_copy, RefitCopyParams)
