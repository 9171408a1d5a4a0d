// Many strided copies, casting on the way, in one call: weights from a trainer's storage into a sampler's, in place.
//   destination[r, c] = cast(source[r, c] + add_one)
//   checksum of an item = sum over its elements e, in row order, of bits_e * ((2 e + 1) mod 2^32) mod 2^64, bits_e as
//   stored
// A table of tiles spreads the work: item i has tiles [first_tile[i], first_tile[i + 1]) of whole rows, or of parts of
// one.
#pragma once
#include <cstdint>

#include "dispatch.h"
#include "dtype.h"

namespace aligner {

struct RefitItem {
  const void* source;
  void* destination;
  int64_t rows, columns;      // elements
  int64_t source_pitch;       // elements between rows
  int64_t destination_pitch;  // elements between rows
  Dtype source_dtype, destination_dtype;
  bool add_one;  // in float32, before the cast: norms that are stored centred at zero
};

constexpr int64_t REFIT_TILE = 1 << 15;  // elements at most: 64 to 128 KiB

// Tiles of one item: rows are cut into pieces of at most REFIT_TILE, short rows are bundled.
struct RefitTiles {
  int64_t pieces;  // of a row
  int64_t bundle;  // rows of a tile; 1 when pieces > 1
  int64_t count;   // of tiles
};
ALIGNER_HOST_DEVICE inline RefitTiles refit_tiles(int64_t rows, int64_t columns) {
  if (rows == 0 || columns == 0) return {1, 1, 0};
  const int64_t pieces = (columns + REFIT_TILE - 1) / REFIT_TILE;
  const int64_t bundle = pieces > 1 ? 1 : REFIT_TILE / columns;
  return {pieces, bundle, pieces * ((rows + bundle - 1) / bundle)};
}

struct RefitCopyParams {
  const RefitItem* items;     // [I]
  const int64_t* first_tile;  // [I+1] prefix sum of refit_tiles(...).count
  uint64_t* checksums;        // [I] out, zero on entry; or null
  int64_t num_items;          // I
  int64_t num_tiles;          // first_tile[I]
};

ALIGNER_CPU_KERNEL(refit_copy_cpu, RefitCopyParams)

}  // namespace aligner
