// The key-value cache: a fixed number of blocks of 16 tokens, shared by count of references.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

namespace aligner {

class BlockCache {
 public:
  BlockCache(int64_t budget_bytes, int64_t block_elements);

  float* data() { return memory_.get(); }
  int64_t num_blocks() const { return references_.size(); }
  int64_t num_free() const { return free_.size(); }

  int32_t take();               // a free block, which must exist
  void share(int32_t block);    // one more reference
  void release(int32_t block);  // one fewer; the last one frees the block
  // A block that the holder of `block` may write: itself when nobody shares it, else a copy. Needs a free block then.
  int32_t writable(int32_t block);
  bool shared(int32_t block) const { return references_[block] > 1; }
  void give_memory_back();  // to the operating system, when every block is free

 private:
  struct Free {
    void operator()(float* p) const;
  };

  int64_t block_elements_;
  std::unique_ptr<float, Free> memory_;
  std::vector<int32_t> references_, free_;
};

}  // namespace aligner
