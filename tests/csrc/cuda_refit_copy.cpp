#include <vector>

#include "cuda_check.h"
#include "refit_copy.h"

CUDA_ENTRY(refit_copy)

namespace {

using namespace check;
using aligner::Dtype;
using aligner::RefitItem;

constexpr Dtype DTYPES[] = {Dtype::float32, Dtype::bfloat16, Dtype::float16};

// The memory of many items, and a table of copies between them.
struct Copies {
  void add(Random& random, int64_t rows, int64_t columns, int64_t pad, Dtype from, Dtype to, bool add_one,
           int64_t offset) {
    const int64_t source_pitch = columns + pad, destination_pitch = columns + 2 * pad;
    const Array<float> x = normal_array(random, rows * source_pitch + offset, 2);
    for (int64_t i = 0; i < x.size; i += 97) x[i] = i % 2 ? -0.f : 70000.f;  // beyond float16
    sources.emplace_back(x.size * aligner::dtype_bytes(from));
    set_values(sources.back().data(), from, 0, x);
    for (auto* side : {&got, &want}) {
      side->emplace_back((rows * destination_pitch + offset) * aligner::dtype_bytes(to), uint8_t(0xab));
    }
    items.push_back({sources.back().data() + offset * aligner::dtype_bytes(from), nullptr, rows, columns, source_pitch,
                     destination_pitch, from, to, add_one});
    destination_offset.push_back(offset * aligner::dtype_bytes(to));
    first_tile.push_back(first_tile.back() + aligner::refit_tiles(rows, columns).count);
  }
  template <class Run>
  void copy(std::vector<Array<uint8_t>>& side, const Array<uint64_t>& sums, bool summed, const Run& run_kernel) {
    for (size_t i = 0; i < items.size(); ++i) items[i].destination = side[i].data() + destination_offset[i];
    run_kernel(aligner::RefitCopyParams{items.data(), first_tile.data(), summed ? sums.data() : nullptr,
                                        int64_t(items.size()), first_tile.back()});
  }

  std::vector<Array<uint8_t>> sources, got, want;
  std::vector<RefitItem> items;
  std::vector<int64_t> destination_offset, first_tile{0};
};

void compare(Random& random) {
  Copies copies;
  for (const Dtype from : DTYPES) {
    for (const Dtype to : DTYPES) {
      copies.add(random, 3, 40, 0, from, to, false, 0);
      copies.add(random, 5, 33, 3, from, to, random.chance(0.5), random.below(3));
    }
  }
  copies.add(random, 0, 7, 0, Dtype::float32, Dtype::float32, false, 0);
  copies.add(random, 1, 1, 0, Dtype::float32, Dtype::bfloat16, true, 0);
  copies.add(random, 700, 64, 8, Dtype::float32, Dtype::bfloat16, false, 0);
  copies.add(random, 2, aligner::REFIT_TILE + 24, 0, Dtype::bfloat16, Dtype::bfloat16, false, 0);
  copies.add(random, 4, 0, 0, Dtype::float32, Dtype::float32, false, 0);
  const Array<uint64_t> sums(copies.items.size(), 0), want_sums(copies.items.size(), 0);
  const bool summed = random.chance(0.8);
  copies.copy(copies.got, sums, summed, [](const auto& p) { run(aligner_refit_copy_cuda, p); });
  copies.copy(copies.want, want_sums, summed, [](const auto& p) { aligner::portable::refit_copy_cpu(p); });
  for (size_t i = 0; i < copies.items.size(); ++i) {
    expect_close("bytes copied", copies.got[i], copies.want[i], 0, 0);
    expect("checksum", sums[i] == want_sums[i]);
  }
}

void large() {
  Random random(0);
  Copies copies;
  const int64_t rows = 256, columns = 1024;
  copies.add(random, rows, columns, 0, Dtype::float32, Dtype::bfloat16, false, 0);
  copies.add(random, rows, columns, 0, Dtype::bfloat16, Dtype::bfloat16, false, 0);
  const Array<uint64_t> sums(2, 0);
  minimum("refit_copy_tiles", rows * columns * 6, rows * columns * 4);
  copies.copy(copies.got, sums, true, [](const auto& p) { run(aligner_refit_copy_cuda, p); });
}

const Cases cases("refit_copy", compare, large);

}  // namespace
