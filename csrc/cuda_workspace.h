// Device memory that every CUDA kernel gets for the partial sums of its reductions. Plain C++, read by bindings too.
#pragma once
#include <cstdint>

namespace aligner {

constexpr int64_t CUDA_WORKSPACE_BYTES = 1 << 17;

}  // namespace aligner
