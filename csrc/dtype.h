#pragma once

namespace aligner {

enum class Dtype { float32, bfloat16, float16 };

}  // namespace aligner
