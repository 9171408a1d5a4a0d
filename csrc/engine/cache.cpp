#include "engine/cache.h"

#include <algorithm>
#include <cstdlib>
#include <new>

namespace aligner {

BlockCache::BlockCache(int64_t budget_bytes, int64_t block_elements)
    : block_elements_(block_elements), references_(budget_bytes / (block_elements * int64_t(sizeof(float)))) {
  for (int64_t i = num_blocks() - 1; i >= 0; --i) free_.push_back(i);  // low numbers go first
}

void BlockCache::Free::operator()(float* p) const { std::free(p); }

int32_t BlockCache::take() {
  if (!memory_) {  // pages that no block has touched are not resident
    const int64_t bytes = (num_blocks() * block_elements_ * int64_t(sizeof(float)) + 63) / 64 * 64;
    memory_.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
    if (!memory_) throw std::bad_alloc();
  }
  const int32_t block = free_.back();
  free_.pop_back();
  references_[block] = 1;
  return block;
}

void BlockCache::share(int32_t block) { ++references_[block]; }

void BlockCache::release(int32_t block) {
  if (--references_[block] == 0) free_.push_back(block);
}

int32_t BlockCache::writable(int32_t block) {
  if (!shared(block)) return block;
  const int32_t copy = take();
  std::copy_n(data() + block * block_elements_, block_elements_, data() + copy * block_elements_);
  release(block);
  return copy;
}

void BlockCache::give_memory_back() { memory_.reset(); }

}  // namespace aligner
