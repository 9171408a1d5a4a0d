// The embedded sampler: continuous batching over a decoder with a fixed cache budget.
// Sequences join and leave at every step. One that finds no free block is preempted: it gives its blocks back and is
// computed again later, to the same bits, since rows of a step are independent. The samples of one prompt wait for the
// first of them to read it, then share its blocks until they write to them.
#pragma once
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "engine/cache.h"
#include "engine/decoder.h"
#include "engine/draw.h"

namespace aligner {

enum class FinishReason { stop, length };

struct Finished {
  int64_t id;
  std::vector<int32_t> tokens;                     // of the response, those that stopped it included
  std::vector<float> logprobs, sampling_logprobs;  // nats, see Drawn
  FinishReason reason;
};

struct Counters {
  int64_t steps = 0, rows = 0, preemptions = 0, peak_blocks = 0;
};

class Engine {
 public:
  Engine(DecoderShape shape, DecoderWeights weights, int64_t cache_bytes);
  ~Engine();

  // The bytes of each token in a text, for stop strings. Throws std::invalid_argument unless there is one a token.
  void set_token_texts(std::vector<std::string> texts);
  bool has_token_texts() const { return !token_texts_.empty(); }

  // One sequence for each key, all from the same prompt; their ids. Throws std::invalid_argument.
  std::vector<int64_t> add(const std::vector<int32_t>& prompt, const std::vector<uint64_t>& keys,
                           const Sampling& sampling);
  void cancel(int64_t id);  // no effect on an id that has finished
  void weights_changed();   // between two steps: what the cache holds of live sequences will be computed again
  // One forward pass, of at most max_sequences sequences; the responses that it ended.
  std::vector<Finished> step(int64_t max_sequences);

  int64_t generated(int64_t id) const;  // tokens of a live sequence's response
  int64_t num_live() const { return sequences_.size(); }
  int64_t token_capacity() const { return cache_.num_blocks() * BLOCK_TOKENS; }
  const Counters& counters() const { return counters_; }

 private:
  struct Sequence;
  struct Group;
  struct Draw {
    Sequence* sequence;
    int64_t logit_row;
    Drawn drawn;
  };

  void schedule_running();
  void admit(int64_t max_sequences);
  bool reserve(Sequence& s, int64_t tokens);
  void place(Sequence& s, int64_t count);
  void share_prompt(Sequence& s);
  void give_blocks_back(Sequence& s);
  void preempt_last();
  std::vector<Draw> draws() const;
  void draw_all(std::vector<Draw>& draws, const float* logits);
  bool stops(Sequence& s) const;
  void fork(Sequence& s, const std::vector<int32_t>& blocks, int64_t computed);
  void remove(Sequence& s);

  Decoder decoder_;
  BlockCache cache_;
  std::vector<std::string> token_texts_;
  std::unordered_map<int64_t, std::unique_ptr<Sequence>> sequences_;
  std::vector<Sequence*> running_;  // in order of admission
  std::deque<Sequence*> waiting_;
  std::vector<Sequence*> placed_;  // in the current step
  StepRows rows_;
  int64_t prefill_rows_ = 0;  // left in the current step
  std::vector<Drawer> drawers_;
  Counters counters_;
  int64_t next_id_ = 0;
};

}  // namespace aligner
