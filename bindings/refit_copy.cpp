#include "refit_copy.h"

#include <cstring>

#include "checks.h"

namespace aligner {
namespace {

const char* const OP = "refit_copy";

// A matrix of rows with unit column stride; a vector is one row.
struct Matrix {
  int64_t rows, columns, pitch;
  char* data;
  Dtype dtype;

  char* at(int64_t row, int64_t column) const { return data + (row * pitch + column) * dtype_bytes(dtype); }
};
Matrix checked_matrix(const Call& call, const char* argument, int64_t index, const Tensor& t) {
  const int64_t dims = t.dim();
  STD_TORCH_CHECK(call.has(t) && (dims == 1 || dims == 2), call.op, ": ", argument, "[", index,
                  "] must be a vector or a matrix on ", call.device(), "got ", call.got(t));
  const int64_t columns = t.size(dims - 1);
  STD_TORCH_CHECK(t.stride(dims - 1) == 1 || columns <= 1, call.op, ": ", argument, "[", index,
                  "] must have unit stride along its rows, got ", t.stride(dims - 1));
  // Read only, where it is a source.
  char* data = const_cast<char*>(static_cast<const char*>(t.const_data_ptr()));
  return {dims == 2 ? t.size(0) : 1, columns, dims == 2 ? t.stride(0) : columns, data,
          checked_dtype(call, argument, t)};
}
std::vector<Matrix> checked_matrices(const Call& call, const char* argument, const std::vector<Tensor>& tensors) {
  std::vector<Matrix> found;
  for (size_t i = 0; i < tensors.size(); ++i) found.push_back(checked_matrix(call, argument, int64_t(i), tensors[i]));
  return found;
}

struct Box {
  int64_t source, destination, source_row, source_column, destination_row, destination_column, rows, columns;
};

// Each source whole into its destination.
std::vector<Box> whole_boxes(const Call& call, const std::vector<Tensor>& sources,
                             const std::vector<Tensor>& destinations, const std::vector<Matrix>& matrices) {
  STD_TORCH_CHECK(sources.size() == destinations.size(), call.op, ": got ", sources.size(), " sources and ",
                  destinations.size(), " destinations, expected as many, or boxes");
  std::vector<Box> boxes;
  for (size_t i = 0; i < sources.size(); ++i) {
    STD_TORCH_CHECK(shape_of(sources[i]) == shape_of(destinations[i]), call.op, ": sources[", i, "] is ",
                    call.got(sources[i]), ", destinations[", i, "] is ", call.got(destinations[i]),
                    ", expected one shape");
    boxes.push_back({int64_t(i), int64_t(i), 0, 0, 0, 0, matrices[i].rows, matrices[i].columns});
  }
  return boxes;
}

std::vector<Box> checked_boxes(const Call& call, const Tensor& t, const std::vector<Matrix>& sources,
                               const std::vector<Matrix>& destinations) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Long && t.dim() == 2 && t.size(1) == 8, call.op,
                  ": boxes must be CPU Long of shape [boxes, 8], got ", call.got(t));
  const Tensor table = torch::stable::contiguous(t);
  const Box* box = static_cast<const Box*>(table.const_data_ptr());
  const auto inside = [](const std::vector<Matrix>& matrices, int64_t i, int64_t row, int64_t column, const Box& b) {
    return i >= 0 && i < int64_t(matrices.size()) && row >= 0 && column >= 0 && b.rows >= 0 && b.columns >= 0 &&
           b.rows <= matrices[i].rows - row && b.columns <= matrices[i].columns - column;
  };
  for (int64_t i = 0; i < t.size(0); ++i) {
    const Box& b = box[i];
    STD_TORCH_CHECK(inside(sources, b.source, b.source_row, b.source_column, b) &&
                        inside(destinations, b.destination, b.destination_row, b.destination_column, b),
                    call.op, ": boxes[", i, "] lies outside of sources[", b.source, "] or of destinations[",
                    b.destination, "]");
  }
  return {box, box + t.size(0)};
}

RefitItem item_of(const Matrix& s, const Matrix& d, const Box& b, bool add_one) {
  RefitItem item{s.at(b.source_row, b.source_column),
                 d.at(b.destination_row, b.destination_column),
                 b.rows,
                 b.columns,
                 s.pitch,
                 d.pitch,
                 s.dtype,
                 d.dtype,
                 add_one};
  if (b.rows > 1 && b.columns == s.pitch && b.columns == d.pitch) {  // one long row
    item.columns = item.source_pitch = item.destination_pitch = b.rows * b.columns;
    item.rows = 1;
  }
  return item;
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
                  bool checksum, const std::optional<Tensor>& boxes_) {
  STD_TORCH_CHECK(!sources.empty(), OP, ": got no sources, expected at least 1");
  const Call call(OP, sources[0]);
  const std::vector<Matrix> from = checked_matrices(call, "sources", sources),
                            to = checked_matrices(call, "destinations", destinations);
  const std::vector<Box> boxes =
      boxes_ ? checked_boxes(call, *boxes_, from, to) : whole_boxes(call, sources, destinations, from);
  STD_TORCH_CHECK(add_one.empty() || add_one.size() == boxes.size(), OP, ": add_one has ", add_one.size(),
                  " entries, expected one for each of ", boxes.size(), " copies");
  std::vector<RefitItem> items;
  std::vector<int64_t> first_tile{0};
  for (size_t i = 0; i < boxes.size(); ++i) {
    items.push_back(item_of(from[boxes[i].source], to[boxes[i].destination], boxes[i], !add_one.empty() && add_one[i]));
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
  m.def(
      "refit_copy(Tensor[] sources, Tensor(a!)[] destinations, bool[] add_one, bool checksum, "
      "Tensor? boxes=None) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(aligner, CompositeExplicitAutograd, m) {
  m.impl("refit_copy", TORCH_BOX(&aligner::refit_copy));
}
