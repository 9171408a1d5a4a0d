#include "refit_copy.h"

#include <cstring>

#include "checks.h"

namespace aligner {
namespace {

const char* const OP = "refit_copy";

// A matrix of rows with unit column stride; a vector is one row.
struct Matrix {
  int64_t rows, columns, pitch;
};
Matrix checked_matrix(const Call& call, const char* argument, int64_t index, const Tensor& t) {
  const int64_t dims = t.dim();
  STD_TORCH_CHECK(call.has(t) && (dims == 1 || dims == 2), call.op, ": ", argument, "[", index,
                  "] must be a vector or a matrix on ", call.device(), "got ", call.got(t));
  const Matrix m{dims == 2 ? t.size(0) : 1, t.size(dims - 1), dims == 2 ? t.stride(0) : t.size(0)};
  STD_TORCH_CHECK(t.stride(dims - 1) == 1 || m.columns <= 1, call.op, ": ", argument, "[", index,
                  "] must have unit stride along its rows, got ", t.stride(dims - 1));
  if (m.rows > 1 && m.pitch == m.columns) return {1, m.rows * m.columns, m.rows * m.columns};
  return m;
}

// Both sides as the same matrix; a side that is contiguous follows the other's rows.
RefitItem checked_item(const Call& call, int64_t index, const Tensor& source, const Tensor& destination, bool add_one) {
  STD_TORCH_CHECK(shape_of(source) == shape_of(destination), call.op, ": sources[", index, "] is ", call.got(source),
                  ", destinations[", index, "] is ", call.got(destination), ", expected one shape");
  Matrix s = checked_matrix(call, "sources", index, source),
         d = checked_matrix(call, "destinations", index, destination);
  if (s.rows != d.rows) {
    const int64_t rows = source.size(0), columns = source.size(1);
    if (s.rows == 1) s = {rows, columns, columns};
    if (d.rows == 1) d = {rows, columns, columns};
  }
  return {source.const_data_ptr(),
          destination.mutable_data_ptr(),
          s.rows,
          s.columns,
          s.pitch,
          d.pitch,
          checked_dtype(call, "sources", source),
          checked_dtype(call, "destinations", destination),
          add_one};
}

// The tables, on the device of the tensors.
template <class T>
Tensor to_device(const Call& call, const std::vector<T>& table) {
  const int64_t bytes = int64_t(table.size() * sizeof(T));
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  Tensor host = torch::stable::empty({bytes}, ScalarType::Byte, std::nullopt, cpu);
  std::memcpy(host.mutable_data_ptr(), table.data(), bytes);
  return call.is_cpu ? host : torch::stable::to(host, call.like.device());
}

Tensor refit_copy(std::vector<Tensor> sources, std::vector<Tensor> destinations, std::vector<bool> add_one,
                  bool checksum) {
  STD_TORCH_CHECK(!sources.empty() && sources.size() == destinations.size() && sources.size() == add_one.size(), OP,
                  ": sources, destinations and add_one must have one length, at least 1, got ", sources.size(), ", ",
                  destinations.size(), " and ", add_one.size());
  const Call call(OP, sources[0]);
  std::vector<RefitItem> items;
  std::vector<int64_t> first_tile{0};
  for (size_t i = 0; i < sources.size(); ++i) {
    items.push_back(checked_item(call, int64_t(i), sources[i], destinations[i], add_one[i]));
    first_tile.push_back(first_tile.back() + refit_tiles(items.back().rows, items.back().columns).count);
  }
  const Tensor item_table = to_device(call, items), tile_table = to_device(call, first_tile);
  Tensor checksums = torch::stable::new_zeros(sources[0], {checksum ? int64_t(items.size()) : 0}, ScalarType::Long);
  run<RefitCopyParams>(call, refit_copy_cpu, "refit_copy",
                       {static_cast<const RefitItem*>(item_table.const_data_ptr()), data<int64_t>(tile_table),
                        checksum ? static_cast<uint64_t*>(checksums.mutable_data_ptr()) : nullptr,
                        int64_t(items.size()), first_tile.back()});
  return checksums;
}

}  // namespace
}  // namespace aligner

STABLE_TORCH_LIBRARY_FRAGMENT(aligner, m) {
  m.def("refit_copy(Tensor[] sources, Tensor(a!)[] destinations, bool[] add_one, bool checksum) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(aligner, CompositeExplicitAutograd, m) {
  m.impl("refit_copy", TORCH_BOX(&aligner::refit_copy));
}
