#pragma once
#include <cstdint>

namespace aligner {

enum class Dtype { float32, bfloat16, float16 };

constexpr int64_t dtype_bytes(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

}  // namespace aligner
