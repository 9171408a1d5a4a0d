// Numbers that every dtype holds, from anywhere to anywhere, through a pitch on both sides.
#include <cstdint>
#include <cstdio>
#include <initializer_list>
#include <vector>

#include "refit_copy.h"

namespace {

using aligner::Dtype;
constexpr Dtype DTYPES[] = {Dtype::float32, Dtype::bfloat16, Dtype::float16};
constexpr uint32_t TWO[] = {0x40000000, 0x4000, 0x4000}, THREE[] = {0x40400000, 0x4040, 0x4200};

// `count` elements of one bit pattern, and nothing behind them.
std::vector<char> filled(Dtype dtype, int64_t count, uint32_t bits) {
  std::vector<char> data(count * aligner::dtype_bytes(dtype));
  for (size_t i = 0; i < data.size(); ++i) data[i] = char(bits >> 8 * (i % aligner::dtype_bytes(dtype)));
  return data;
}

int copy(int from, int to, int64_t rows, int64_t columns, bool add_one) {
  const Dtype source_dtype = DTYPES[from], dtype = DTYPES[to];
  const int64_t pitch = columns + 1, last = (rows - 1) * pitch + columns;  // the last row ends where it ends
  const auto source = filled(source_dtype, last, TWO[from]);
  auto destination = filled(dtype, last, 0);
  const aligner::RefitItem item{source.data(), destination.data(), rows,  columns, pitch,
                                pitch,         source_dtype,       dtype, add_one};
  const int64_t first_tile[] = {0, aligner::refit_tiles(rows, columns).count};
  uint64_t checksum = 0;
  aligner::refit_copy_cpu({&item, first_tile, &checksum, 1, first_tile[1]});
  const uint32_t want = add_one ? THREE[to] : TWO[to];
  uint64_t want_sum = 0;
  int failures = 0;
  const auto expected = filled(dtype, 1, want);
  for (int64_t e = 0; e < rows * columns; ++e) {
    want_sum += uint64_t(want) * uint32_t(2 * e + 1);
    const char* at = destination.data() + (e / columns * pitch + e % columns) * aligner::dtype_bytes(dtype);
    for (size_t b = 0; b < expected.size(); ++b) failures += at[b] != expected[b];
  }
  failures += checksum != want_sum;
  if (failures) std::printf("%d to %d, %ld x %ld: %d differences\n", from, to, long(rows), long(columns), failures);
  return failures;
}

}  // namespace

int main() {
  int failures = 0;
  for (const char* isa : {"portable", "avx2", "avx512"}) {
    if (!aligner::force_cpu_isa(isa)) continue;
    for (int from = 0; from < 3; ++from) {
      for (int to = 0; to < 3; ++to) {
        for (int64_t columns : {1, 7, 16, 33, 70000}) failures += copy(from, to, 3, columns, columns % 2);
      }
    }
  }
  return failures;
}
