#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define ALIGNER_HOST_DEVICE __host__ __device__
#else
#define ALIGNER_HOST_DEVICE
#endif

namespace aligner {

enum class Dtype { float32, bfloat16, float16 };

constexpr int64_t dtype_bytes(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

}  // namespace aligner
