// Scratch memory aligned to a cache line. Included only by *_cpu.cpp.
#pragma once
#include <stdint.h>
#include <stdlib.h>

#include <new>

namespace aligner::ALIGNER_ISA {

struct Buffer {
  float* data;
  explicit Buffer(int64_t floats) : data(nullptr) {
    if (floats > 0) data = static_cast<float*>(aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64));
    if (floats > 0 && !data) throw std::bad_alloc();
  }
  ~Buffer() { free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
};

}  // namespace aligner::ALIGNER_ISA
