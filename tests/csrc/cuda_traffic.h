// Counts what the kernels under cuda_on_cpu.cpp move: distinct 32-byte sectors of each warp instruction, which is what
// a GPU fetches. Lanes that execute one line for the k-th time after the same meeting are taken to execute one
// instruction.
#pragma once
#include <algorithm>
#include <cstdint>
#include <map>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace cuda_on_cpu {

// Tells lanes' executions apart: how often a lane has met others, and how often it was at a site since.
class LaneCounter {
 public:
  void clear() {
    meetings_ = 0;
    executions_.clear();
  }
  void meet() {
    ++meetings_;
    executions_.clear();
  }
  uint64_t next_execution(unsigned site) {
    auto found = std::find_if(executions_.begin(), executions_.end(), [&](auto& e) { return e.first == site; });
    if (found == executions_.end()) found = executions_.insert(found, {site, 0u});
    return meetings_ << 32 | found->second++;
  }

 private:
  uint64_t meetings_ = 0;
  std::vector<std::pair<unsigned, unsigned>> executions_;  // (site, how often)
};

struct Traffic {
  uint64_t launches = 0, load_sectors = 0, store_sectors = 0;
};

class WarpTraffic {
 public:
  void add(LaneCounter& lane, const void* address, size_t bytes, bool is_store, int line) {
    const unsigned site = unsigned(line) * 2 + is_store;
    const uint64_t execution = lane.next_execution(site);
    if (bytes == 0) return;
    const auto first = reinterpret_cast<uintptr_t>(address), last = first + bytes - 1;
    for (uint64_t sector = first / 32; sector <= last / 32; ++sector) accesses_.push_back({site, execution, sector});
  }
  void add_to(Traffic& traffic) {
    std::sort(accesses_.begin(), accesses_.end());
    accesses_.erase(std::unique(accesses_.begin(), accesses_.end()), accesses_.end());
    for (const Access& access : accesses_) ++(std::get<0>(access) % 2 ? traffic.store_sectors : traffic.load_sectors);
  }

 private:
  using Access = std::tuple<unsigned, uint64_t, uint64_t>;  // site, execution, sector
  std::vector<Access> accesses_;
};

}  // namespace cuda_on_cpu
