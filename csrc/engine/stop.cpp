#include "engine/stop.h"

#include <algorithm>

namespace aligner {

bool StopText::ends(const std::string& token, const std::vector<std::string>& stops) {
  const size_t before = tail_.size();
  tail_ += token;
  bool found = false;
  size_t keep = 0;
  for (const std::string& stop : stops) {
    // An occurrence that ended in an earlier token was judged then.
    const size_t from = before + 1 > stop.size() ? before + 1 - stop.size() : 0;
    found = found || tail_.find(stop, from) != std::string::npos;
    keep = std::max(keep, stop.size() - 1);
  }
  if (tail_.size() > keep) tail_.erase(0, tail_.size() - keep);
  return found;
}

}  // namespace aligner
