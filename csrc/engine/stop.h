// Texts that end a response, found in the bytes of its tokens.
#pragma once
#include <string>
#include <vector>

namespace aligner {

// The end of one response: as many bytes as may still begin a stop string.
class StopText {
 public:
  // Appends a token's bytes; whether one of `stops` now ends in them, wherever it began.
  bool ends(const std::string& token, const std::vector<std::string>& stops);

 private:
  std::string tail_;
};

}  // namespace aligner
