#include "engine/draw.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>

#include "engine/softmax.h"

namespace aligner {

double uniform(uint64_t key, int64_t index) {
  uint64_t z = key + uint64_t(index + 1) * 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  z ^= z >> 31;
  return double(z >> 11) * 0x1p-53;
}

void Drawer::softmax(const float* logits, int64_t vocab, float temperature) {
  weights_.resize(vocab);
  block_sums_.resize((vocab + SUM_BLOCK - 1) / SUM_BLOCK);
  const float inverse_temperature = temperature > 0 ? 1 / temperature : 1;
  softmax_cpu({logits, weights_.data(), block_sums_.data(), &max_, vocab, inverse_temperature});
  total_ = std::accumulate(block_sums_.begin(), block_sums_.end(), 0.0);
  if (!std::isfinite(total_) || !std::isfinite(max_)) {
    throw std::runtime_error("sampler: the logits are not finite; the weights are damaged or training diverged");
  }
}

// Repetition penalty: Keskar et al. 2019, arXiv:1909.05858, section 4.1, in the form that transformers gives it.
void Drawer::edit(const float* logits, int64_t vocab, const Sampling& sampling, const std::vector<int32_t>& history,
                  int64_t generated) {
  edited_.assign(logits, logits + vocab);
  if (sampling.repetition_penalty != 1) {
    for (int32_t id : history) {  // from the original: a token that occurs twice is penalised once
      edited_[id] =
          logits[id] > 0 ? logits[id] / sampling.repetition_penalty : logits[id] * sampling.repetition_penalty;
    }
  }
  if (generated < sampling.min_tokens) {
    for (int32_t id : sampling.stop) edited_[id] = -std::numeric_limits<float>::infinity();
  }
}

// Sources: top-k, Fan et al. 2018, arXiv:1805.04833; top-p, Holtzman et al. 2020, arXiv:1904.09751, section 3.1;
// min-p, Nguyen et al. 2024, arXiv:2407.01082, section 3.
void Drawer::truncate(const Sampling& sampling) {
  const int64_t vocab = weights_.size();
  // The largest weight is 1. Tokens under the floor have less than 1 - top_p together: they are never needed.
  const double unneeded = sampling.top_k ? 0 : (1 - double(sampling.top_p)) * total_ / vocab;
  const float floor = std::max(sampling.min_p, float(unneeded));
  kept_.clear();
  for (int64_t i = 0; i < vocab; ++i) {
    if (weights_[i] >= floor && weights_[i] > 0) kept_.push_back(i);
  }
  const auto likelier = [&](int32_t a, int32_t b) {
    return weights_[a] != weights_[b] ? weights_[a] > weights_[b] : a < b;
  };
  if (sampling.top_k && sampling.top_k < int64_t(kept_.size())) {
    std::nth_element(kept_.begin(), kept_.begin() + sampling.top_k, kept_.end(), likelier);
    kept_.resize(sampling.top_k);
    total_ = 0;
    for (int32_t id : kept_) total_ += weights_[id];
  }
  if (sampling.top_p < 1) {
    std::sort(kept_.begin(), kept_.end(), likelier);
    const double enough = double(sampling.top_p) * total_;
    double sum = 0;
    size_t count = 0;
    while (count < kept_.size() && sum < enough) sum += weights_[kept_[count++]];
    kept_.resize(count);
  }
  std::sort(kept_.begin(), kept_.end());
  total_ = 0;
  for (int32_t id : kept_) total_ += weights_[id];
}

// The token at which the cumulative weight passes uniform * total. One of weight 0 is never chosen.
int32_t Drawer::find(double uniform) const {
  double target = uniform * total_;
  size_t block = 0;
  while (block + 1 < block_sums_.size() && target >= block_sums_[block]) target -= block_sums_[block++];
  while (block > 0 && block_sums_[block] == 0) --block;  // rounding left the target beyond the last block with weight
  const int64_t begin = block * SUM_BLOCK, end = std::min<int64_t>(begin + SUM_BLOCK, weights_.size());
  int32_t last = begin;
  for (int64_t i = begin; i < end; ++i) {
    if (weights_[i] <= 0) continue;
    last = i;
    if (target < weights_[i]) break;
    target -= weights_[i];
  }
  return last;
}

int32_t Drawer::find_kept(double uniform) const {
  double target = uniform * total_;
  for (int32_t id : kept_) {
    if (target < weights_[id]) return id;
    target -= weights_[id];
  }
  return kept_.back();
}

Drawn Drawer::draw(const float* logits, int64_t vocab, const Sampling& sampling, const std::vector<int32_t>& history,
                   int64_t generated, double uniform) {
  softmax(logits, vocab, sampling.temperature);
  const float inverse_temperature = sampling.temperature > 0 ? 1 / sampling.temperature : 1;
  const double log_total = std::log(total_), max = max_;
  const bool edits = sampling.repetition_penalty != 1 || (generated < sampling.min_tokens && !sampling.stop.empty());
  if (edits) {
    edit(logits, vocab, sampling, history, generated);
    softmax(edited_.data(), vocab, sampling.temperature);
  }
  Drawn drawn{};
  if (sampling.temperature == 0) {
    const float* from = edits ? edited_.data() : logits;
    drawn.token = std::max_element(from, from + vocab) - from;
  } else {
    const bool cut = sampling.top_k || sampling.top_p < 1 || sampling.min_p > 0;
    if (cut) truncate(sampling);
    drawn.token = cut ? find_kept(uniform) : find(uniform);
    drawn.sampling_logprob = float(std::log(weights_[drawn.token] / total_));
  }
  drawn.logprob = float((logits[drawn.token] - max) * inverse_temperature - log_total);
  return drawn;
}

}  // namespace aligner
