// The embedded sampler: random streams, draws, and random admissions and cancels against an unhurried run.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <random>
#include <set>

#include "engine/engine.h"

using namespace aligner;

namespace {

int failures = 0;

void check(bool good, const char* what) {
  if (good) return;
  std::printf("%s: %s\n", cpu_isa_name(), what);
  ++failures;
}

// A random decoder: head_dim 6 and width 12 divide by no vector, 5 query heads share a key head.
struct Model {
  static constexpr int64_t VOCAB = 37, HIDDEN = 12, FFN = 20, LAYERS = 2;
  DecoderShape shape{LAYERS, HIDDEN, FFN, VOCAB, {5, 1, 6}, 1e-5f, Dtype::float32, {1.f, .2f, .04f}};
  std::vector<std::vector<float>> storage;
  DecoderWeights weights{};

  Model() {
    std::mt19937 random(1);
    const auto tensor = [&](int64_t count) {
      std::vector<float> v(count);
      for (float& x : v) x = std::normal_distribution<float>(0.f, .5f)(random);
      storage.push_back(v);
      return storage.back().data();
    };
    storage.reserve(64);
    weights.embedding = weights.head = tensor(VOCAB * HIDDEN);
    weights.norm = tensor(HIDDEN);
    for (int64_t i = 0; i < LAYERS; ++i) {
      weights.layers.push_back({tensor(HIDDEN), tensor(7 * 6 * HIDDEN), tensor(HIDDEN * 30), tensor(HIDDEN),
                                tensor(2 * FFN * HIDDEN), tensor(HIDDEN * FFN), tensor(7 * 6), tensor(6), tensor(6)});
    }
  }
  int64_t bytes(int64_t blocks) const { return blocks * LAYERS * shape.attention.block_elements() * 4; }
};

void test_uniform() {
  double sum = 0, squares = 0;
  for (int i = 0; i < 20000; ++i) {
    const double u = uniform(uint64_t(i / 50) * 0x123456789abcdefu, i % 50);
    check(u >= 0 && u < 1, "a uniform number is not in [0, 1)");
    sum += u;
    squares += u * u;
  }
  check(std::abs(sum / 20000 - .5) < .01 && std::abs(squares / 20000 - 1 / 3.) < .01, "uniform numbers are not");
}

void test_draw_inverts_the_cumulative_distribution() {
  std::mt19937 random(2);
  Drawer drawer;
  for (int64_t vocab : {1, 7, 256, 257, 1000}) {
    std::vector<float> logits(vocab);
    for (int64_t i = 0; i < vocab; ++i) {
      logits[i] = i > vocab / 2 && i % 3 == 0 ? -INFINITY : std::normal_distribution<float>()(random);
    }
    double total = 0;
    for (float x : logits) total += std::exp(double(x));
    for (double u : {0., .1, .5, .77, 1 - 0x1p-53}) {
      const Drawn d = drawer.draw(logits.data(), vocab, Sampling{}, {}, 0, u);
      double before = 0;
      for (int32_t i = 0; i < d.token; ++i) before += std::exp(double(logits[i])) / total;
      const double p = std::exp(double(logits[d.token])) / total;
      check(p > 0 && before <= u + 1e-6 && before + p >= u - 1e-6, "a draw is off the cumulative distribution");
      check(std::abs(d.logprob - std::log(p)) < 1e-5, "the log-probability of a draw is wrong");
      check(std::abs(d.sampling_logprob - d.logprob) < 1e-5, "nothing was cut, and the log-probabilities differ");
    }
  }
}

void test_penalty_and_min_tokens() {
  Drawer drawer;
  const float logits[] = {2, 1.5f, -1, -1.2f};
  Sampling s;
  s.temperature = 0;
  check(drawer.draw(logits, 4, s, {}, 0, 0).token == 0, "greedy is not the largest");
  s.repetition_penalty = 2;
  check(drawer.draw(logits, 4, s, {0, 0}, 0, 0).token == 1, "the repetition penalty does not hold");
  s.stop = {1};
  s.min_tokens = 3;
  check(drawer.draw(logits, 4, s, {0}, 2, 0).token == 0, "a stop token came before min_tokens");
  check(drawer.draw(logits, 4, s, {0}, 3, 0).token == 1, "min_tokens bans a stop token for too long");
}

// Random prompts, sample counts, limits, cancels, in a cache of `blocks`; tokens of what was not cancelled, by key.
std::map<uint64_t, std::vector<int32_t>> fuzz(const Model& model, int64_t blocks, bool cancels, Counters* counters) {
  Engine engine(model.shape, model.weights, model.bytes(blocks));
  std::mt19937 random(3), chance(4);
  std::map<int64_t, uint64_t> keys;
  std::map<uint64_t, std::vector<int32_t>> found;
  int groups = 40;
  while (groups > 0 || engine.num_live() > 0) {
    if (groups > 0 && chance() % 3 == 0) {
      --groups;
      std::vector<int32_t> prompt(1 + random() % 40);
      for (int32_t& token : prompt) token = random() % Model::VOCAB;
      std::vector<uint64_t> sample_keys(1 + random() % 6);
      for (uint64_t& key : sample_keys) key = random();
      Sampling s;
      s.max_tokens = 1 + random() % 40;
      s.stop = {int32_t(random() % Model::VOCAB)};
      s.top_k = random() % 3 ? 0 : 5;
      s.top_p = random() % 3 ? 1.f : .8f;
      s.min_p = random() % 3 ? 0.f : .05f;
      const std::vector<int64_t> ids = engine.add(prompt, sample_keys, s);
      for (size_t i = 0; i < ids.size(); ++i) keys[ids[i]] = sample_keys[i];
    }
    if (cancels && chance() % 4 == 0 && !keys.empty()) engine.cancel(std::prev(keys.end())->first - chance() % 8);
    for (const Finished& f : engine.step(12)) {
      check(f.tokens.size() == f.logprobs.size() && !f.tokens.empty(), "a response without its log-probabilities");
      found[keys.at(f.id)] = f.tokens;
    }
  }
  *counters = engine.counters();
  return found;
}

}  // namespace

int main() {
  test_uniform();
  const Model model;
  for (const char* isa : {"portable", "avx2", "avx512"}) {
    if (!force_cpu_isa(isa)) continue;
    test_draw_inverts_the_cumulative_distribution();
    test_penalty_and_min_tokens();
    Counters wide{}, narrow{};
    const auto all = fuzz(model, 400, false, &wide), tight = fuzz(model, 6, false, &narrow);
    check(wide.preemptions == 0 && narrow.preemptions > 0, "the small cache preempted nobody");
    check(narrow.peak_blocks <= 6, "more blocks than the budget");
    check(all == tight, "a preempted run gives other tokens");
    const auto kept = fuzz(model, 6, true, &narrow);
    check(kept.size() < all.size(), "nothing was cancelled");
    for (const auto& [key, tokens] : kept) check(tokens == all.at(key), "a cancel changed another response");
  }
  return failures != 0;
}
