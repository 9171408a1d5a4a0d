// Drawing a token from a row of logits.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace aligner {

struct Sampling {
  float temperature = 1;         // dimensionless; 0 takes the most likely token
  int64_t top_k = 0;             // tokens kept; 0 keeps all
  float top_p = 1;               // in (0, 1]; the smallest set of tokens that reaches it is kept
  float min_p = 0;               // in [0, 1]; of the largest probability, what a token needs to be kept
  float repetition_penalty = 1;  // > 0; divides positive logits, multiplies negative ones, of tokens already there
  int64_t min_tokens = 0;        // tokens before a stop token, or the token that completes a stop string, may come
  int64_t max_tokens = 1;        // tokens
  std::vector<int32_t> stop;     // ids
  std::vector<std::string> stop_strings;  // bytes, none empty
};

struct Drawn {
  int32_t token;
  float logprob;           // nats; under softmax(logits / temperature), temperature 1 when greedy
  float sampling_logprob;  // nats; under the distribution that the token was drawn from
};

// A number in [0, 1): a pure function of a sequence's key and of how many tokens came before in the response.
// Source: the SplitMix64 finaliser, Steele et al. 2014, doi:10.1145/2660193.2660195, section 4.
double uniform(uint64_t key, int64_t index);

// Scratch of one thread.
class Drawer {
 public:
  // logits: [vocab]. history: prompt and response so far, of which `generated` tokens are the response.
  // Throws std::runtime_error when the logits are not finite.
  Drawn draw(const float* logits, int64_t vocab, const Sampling& sampling, const std::vector<int32_t>& history,
             int64_t generated, double uniform);

 private:
  void softmax(const float* logits, int64_t vocab, float temperature);
  void edit(const float* logits, int64_t vocab, const Sampling& sampling, const std::vector<int32_t>& history,
            int64_t generated);
  void truncate(const Sampling& sampling);
  int32_t find(double uniform) const;
  int32_t find_kept(double uniform) const;

  std::vector<float> weights_, edited_;
  std::vector<double> block_sums_;
  std::vector<int32_t> kept_;  // ids in ascending order, when the distribution is truncated
  float max_ = 0;
  double total_ = 0;  // of weights, those kept only after truncate()
};

}  // namespace aligner
