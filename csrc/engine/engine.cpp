#include "engine/engine.h"

#include <algorithm>
#include <exception>
#include <stdexcept>
#include <string>
#include <utility>

#include "engine/stop.h"
#include "parallel.h"

namespace aligner {
namespace {

constexpr int64_t STEP_ROWS =
    192;  // of a step that prefills: keeps the products busy, and decoding ones waiting little

int64_t blocks_for(int64_t tokens) { return (tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS; }

template <class T>
void erase(T& from, const typename T::value_type& value) {
  from.erase(std::remove(from.begin(), from.end(), value), from.end());
}

}  // namespace

struct Engine::Group {
  int64_t prompt_tokens;
  Sampling sampling;
  std::vector<Sequence*> members;
  Sequence* reader = nullptr;  // the member that computes the prompt for all
};

struct Engine::Sequence {
  int64_t id;
  std::shared_ptr<Group> group;
  uint64_t key;
  std::vector<int32_t> tokens;  // prompt and response
  std::vector<float> logprobs, sampling_logprobs;
  std::vector<int32_t> blocks;
  StopText text;
  int64_t computed = 0;  // tokens that stand in the cache
  int64_t placed = 0;    // tokens in the current step
  bool running = false;

  int64_t generated() const { return logprobs.size(); }
  int64_t remaining() const { return int64_t(tokens.size()) - computed; }
  bool wants_token() const { return placed == remaining(); }
};

Engine::Engine(DecoderShape shape, DecoderWeights weights, int64_t cache_bytes)
    : decoder_(std::move(shape), std::move(weights)), cache_(cache_bytes, decoder_.block_elements()) {}

Engine::~Engine() = default;

void Engine::set_token_texts(std::vector<std::string> texts) {
  if (int64_t(texts.size()) != decoder_.shape().vocab) {
    throw std::invalid_argument("texts of " + std::to_string(texts.size()) + " tokens, expected " +
                                std::to_string(decoder_.shape().vocab) + "; was another tokenizer used?");
  }
  token_texts_ = std::move(texts);
}

std::vector<int64_t> Engine::add(const std::vector<int32_t>& prompt, const std::vector<uint64_t>& keys,
                                 const Sampling& sampling) {
  const int64_t vocab = decoder_.shape().vocab, longest = prompt.size() + sampling.max_tokens;
  const auto in_vocabulary = [&](int32_t id) { return id >= 0 && id < vocab; };
  if (prompt.empty() || !std::all_of(prompt.begin(), prompt.end(), in_vocabulary) ||
      !std::all_of(sampling.stop.begin(), sampling.stop.end(), in_vocabulary)) {
    throw std::invalid_argument("a prompt is empty, or a prompt or stop token is not in [0, " + std::to_string(vocab) +
                                "); was another tokenizer used?");
  }
  for (const std::string& text : sampling.stop_strings) {
    if (text.empty() || !has_token_texts()) {
      throw std::invalid_argument("a stop string is empty, or the texts of the tokens are not known");
    }
  }
  if (longest > token_capacity()) {
    throw std::invalid_argument("a prompt of " + std::to_string(prompt.size()) + " tokens with max_tokens " +
                                std::to_string(sampling.max_tokens) + " does not fit the cache of " +
                                std::to_string(token_capacity()) + " tokens; raise cache_bytes");
  }
  auto group = std::make_shared<Group>();
  group->prompt_tokens = prompt.size();
  group->sampling = sampling;
  std::vector<int64_t> ids;
  for (uint64_t key : keys) {
    auto s = std::make_unique<Sequence>();
    s->id = next_id_++;
    s->group = group;
    s->key = key;
    s->tokens = prompt;
    group->members.push_back(s.get());
    waiting_.push_back(s.get());
    ids.push_back(s->id);
    sequences_[s->id] = std::move(s);
  }
  return ids;
}

void Engine::cancel(int64_t id) {
  const auto found = sequences_.find(id);
  if (found == sequences_.end()) return;
  Sequence& s = *found->second;
  if (!s.running) erase(waiting_, &s);
  remove(s);
  if (sequences_.empty()) cache_.give_memory_back();
}

void Engine::weights_changed() {
  while (!running_.empty()) preempt_last();
}

int64_t Engine::generated(int64_t id) const { return sequences_.at(id)->generated(); }

// Forgets a sequence that no longer waits.
void Engine::remove(Sequence& s) {
  give_blocks_back(s);
  if (s.running) erase(running_, &s);
  if (s.group->reader == &s) s.group->reader = nullptr;
  erase(s.group->members, &s);
  sequences_.erase(s.id);
}

void Engine::give_blocks_back(Sequence& s) {
  for (int32_t block : s.blocks) cache_.release(block);
  s.blocks.clear();
  s.computed = 0;
}

void Engine::preempt_last() {
  Sequence& s = *running_.back();
  running_.pop_back();
  give_blocks_back(s);
  s.running = false;
  if (s.group->reader == &s) s.group->reader = nullptr;
  waiting_.push_front(&s);
  ++counters_.preemptions;
}

// Blocks for the first `tokens` tokens, those to be written its own. False, and nothing done, when too few are free.
bool Engine::reserve(Sequence& s, int64_t tokens) {
  const int64_t held = s.blocks.size(), partial = s.computed / BLOCK_TOKENS;
  const bool copies = partial < held && cache_.shared(s.blocks[partial]);
  const int64_t more = std::max<int64_t>(0, blocks_for(tokens) - held);
  if (more + copies > cache_.num_free()) return false;
  if (copies) s.blocks[partial] = cache_.writable(s.blocks[partial]);
  for (int64_t i = 0; i < more; ++i) s.blocks.push_back(cache_.take());
  counters_.peak_blocks = std::max(counters_.peak_blocks, cache_.num_blocks() - cache_.num_free());
  return true;
}

void Engine::place(Sequence& s, int64_t count) {
  for (int64_t i = s.computed; i < s.computed + count; ++i) {
    rows_.tokens.push_back(s.tokens[i]);
    rows_.positions.push_back(i);
    rows_.blocks.push_back(s.blocks.data());
  }
  s.placed = count;
  placed_.push_back(&s);
  if (s.wants_token()) rows_.logit_rows.push_back(rows_.tokens.size() - 1);
}

// Those who decode get their row; those who read get what is left of the step. The last admitted make room.
void Engine::schedule_running() {
  const auto decodes = [](const Sequence* s) { return s->remaining() == 1; };
  const int64_t decoding = std::count_if(running_.begin(), running_.end(), decodes);
  prefill_rows_ = std::max(BLOCK_TOKENS, STEP_ROWS - decoding);
  for (size_t i = 0; i < running_.size(); ++i) {
    Sequence& s = *running_[i];
    const int64_t count = s.remaining() == 1 ? 1 : std::min(s.remaining(), prefill_rows_);
    if (count == 0) continue;
    while (s.running && !reserve(s, s.computed + count)) preempt_last();
    if (!s.running) return;
    if (s.remaining() > 1) prefill_rows_ -= count;
    place(s, count);
  }
}

// Blocks of the prompt that another sample has already read. At least one token stays to be computed.
void Engine::share_prompt(Sequence& s) {
  const int64_t wanted = std::min<int64_t>(s.group->prompt_tokens, s.tokens.size() - 1) / BLOCK_TOKENS;
  for (Sequence* other : s.group->members) {
    if (other->computed < wanted * BLOCK_TOKENS || other == &s) continue;
    s.blocks.assign(other->blocks.begin(), other->blocks.begin() + wanted);
    for (int32_t block : s.blocks) cache_.share(block);
    s.computed = wanted * BLOCK_TOKENS;
    return;
  }
}

void Engine::admit(int64_t max_sequences) {
  for (size_t i = 0; i < waiting_.size() && prefill_rows_ > 0 && int64_t(running_.size()) < max_sequences;) {
    Sequence& s = *waiting_[i];
    if (s.generated() == 0 && s.group->reader) {  // the first token will come with the reader's
      ++i;
      continue;
    }
    share_prompt(s);
    // Each running sequence may soon want a block: admitting into the last ones would only preempt somebody.
    const int64_t more = blocks_for(s.tokens.size()) - int64_t(s.blocks.size());
    if (cache_.num_free() < more + int64_t(running_.size())) {
      give_blocks_back(s);
      return;
    }
    reserve(s, s.tokens.size());
    s.running = true;
    if (s.generated() == 0) s.group->reader = &s;
    running_.push_back(&s);
    waiting_.erase(waiting_.begin() + i);
    const int64_t count = std::min(s.remaining(), prefill_rows_);
    prefill_rows_ -= count;
    place(s, count);
  }
}

// Every sequence whose next token this step gives: with a prompt's reader all samples that have no token yet.
std::vector<Engine::Draw> Engine::draws() const {
  std::vector<Draw> draws;
  int64_t row = 0;
  for (Sequence* s : placed_) {
    if (!s->wants_token()) continue;
    draws.push_back({s, row, {}});
    if (s->group->reader == s) {
      for (Sequence* other : s->group->members) {
        if (other != s && other->generated() == 0) draws.push_back({other, row, {}});
      }
    }
    ++row;
  }
  return draws;
}

void Engine::draw_all(std::vector<Draw>& draws, const float* logits) {
  const int64_t vocab = decoder_.shape().vocab, count = draws.size();
  const int64_t threads = std::min<int64_t>({count, max_threads(), MAX_PARTS});
  drawers_.resize(std::max<int64_t>(drawers_.size(), threads));
  std::vector<std::exception_ptr> failures(threads);
  parallel_parts(threads, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t thread = begin; thread < end; ++thread) {
      try {
        for (int64_t i = thread; i < count; i += threads) {
          Draw& d = draws[i];
          const Sequence& s = *d.sequence;
          d.drawn = drawers_[thread].draw(logits + d.logit_row * vocab, vocab, s.group->sampling, s.tokens,
                                          s.generated(), uniform(s.key, s.generated()));
        }
      } catch (...) {
        failures[thread] = std::current_exception();
      }
    }
  });
  for (const std::exception_ptr& failure : failures) {
    if (failure) std::rethrow_exception(failure);
  }
}

// Whether the token that `s` has just got ends it.
bool Engine::stops(Sequence& s) const {
  const Sampling& sampling = s.group->sampling;
  const int32_t token = s.tokens.back();
  const bool by_token = std::count(sampling.stop.begin(), sampling.stop.end(), token) > 0;
  if (sampling.stop_strings.empty()) return by_token;
  const bool by_text = s.text.ends(token_texts_[token], sampling.stop_strings);
  return by_token || (by_text && s.generated() > sampling.min_tokens);
}

// Starts a sample from the blocks of the one that read their prompt.
void Engine::fork(Sequence& s, const std::vector<int32_t>& blocks, int64_t computed) {
  s.blocks = blocks;
  for (int32_t block : blocks) cache_.share(block);
  s.computed = computed;
  s.running = true;
  running_.push_back(&s);
}

std::vector<Finished> Engine::step(int64_t max_sequences) {
  if (sequences_.empty()) return {};
  rows_.clear();
  placed_.clear();
  const int64_t preempted = counters_.preemptions;
  schedule_running();
  if (counters_.preemptions == preempted) admit(max_sequences);
  std::vector<Draw> all = draws();
  draw_all(all, decoder_.forward(rows_, cache_.data()));
  ++counters_.steps;
  counters_.rows += rows_.tokens.size();
  for (Sequence* s : placed_) s->computed += s->placed;

  std::vector<Finished> finished;
  Sequence* reader = nullptr;
  for (const Draw& d : all) {
    Sequence& s = *d.sequence;
    if (s.group->reader == &s) {
      reader = &s;
      s.group->reader = nullptr;
    }
    s.tokens.push_back(d.drawn.token);
    s.logprobs.push_back(d.drawn.logprob);
    s.sampling_logprobs.push_back(d.drawn.sampling_logprob);
    const bool stopped = stops(s);
    if (stopped || s.generated() == s.group->sampling.max_tokens) {
      finished.push_back({s.id,
                          {s.tokens.begin() + s.group->prompt_tokens, s.tokens.end()},
                          s.logprobs,
                          s.sampling_logprobs,
                          stopped ? FinishReason::stop : FinishReason::length});
    } else if (!s.running && reader && reader->group == s.group && int64_t(running_.size()) < max_sequences &&
               cache_.num_free() > int64_t(running_.size())) {
      fork(s, reader->blocks, reader->computed);
    }
  }
  waiting_.erase(std::remove_if(waiting_.begin(), waiting_.end(), [](Sequence* s) { return s->running; }),
                 waiting_.end());
  for (const Finished& f : finished) {  // after the forks: a reader may end at its first token
    Sequence& s = *sequences_.at(f.id);
    if (!s.running) erase(waiting_, &s);
    remove(s);
  }
  if (sequences_.empty()) cache_.give_memory_back();
  return finished;
}

}  // namespace aligner
