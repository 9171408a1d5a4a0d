// The embedded sampler: random streams, draws, int8 products; random admissions, cancels and refits against an
// unhurried run and against each response by itself.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <random>
#include <set>
#include <string>
#include <utility>

#include "engine/engine.h"
#include "engine/matmul.h"

using namespace aligner;

namespace {

int failures = 0;

void check(bool good, const char* what) {
  if (good) return;
  std::printf("%s: %s\n", cpu_isa_name(), what);
  ++failures;
}

// A random decoder: head_dim 10 and width 44 divide by no vector, 5 query heads share a key head; the second layer has
// biases, norms of queries and keys, and int8 matrices. Wide enough that steps which prefill use several threads.
struct Model {
  static constexpr int64_t VOCAB = 37, HIDDEN = 44, FFN = 60, LAYERS = 2, QUERIES = 50, QKV = 70, HEAD = 10;
  DecoderShape shape{LAYERS, HIDDEN, FFN, VOCAB, {5, 1, HEAD}, 1e-5f, Dtype::float32, {1.f, .3f, .1f, .03f, .01f}};
  std::vector<std::vector<float>> floats;
  std::vector<std::vector<int8_t>> integers;
  DecoderWeights weights{};

  explicit Model(int version) {
    weights.embedding = weights.head = tensor(VOCAB * HIDDEN);
    weights.norm = tensor(HIDDEN);
    const auto matrix = [&](int64_t outputs, int64_t depth, bool quantised) {
      if (!quantised) return Matrix{tensor(outputs * depth), nullptr};
      integers.emplace_back(outputs * depth);
      return Matrix{integers.back().data(), tensor(outputs)};
    };
    for (const bool second : {false, true}) {
      weights.layers.push_back({tensor(HIDDEN), matrix(QKV, HIDDEN, second), matrix(HIDDEN, QUERIES, second),
                                tensor(HIDDEN), matrix(2 * FFN, HIDDEN, second), matrix(HIDDEN, FFN, second),
                                second ? tensor(QKV) : nullptr, second ? tensor(HEAD) : nullptr,
                                second ? tensor(HEAD) : nullptr});
    }
    refit(version);
  }
  const float* tensor(int64_t count) {
    floats.emplace_back(count);
    return floats.back().data();
  }
  // Other weights in the same storage.
  void refit(int version) {
    std::mt19937 random(version);
    for (std::vector<int8_t>& v : integers) {
      for (int8_t& x : v) x = int8_t(random() % 255) - 127;
    }
    for (std::vector<float>& v : floats) {
      const bool scales = v.data() == weights.layers[1].qkv.scales || v.data() == weights.layers[1].down.scales ||
                          v.data() == weights.layers[1].gate_up.scales ||
                          v.data() == weights.layers[1].attention_out.scales;
      for (float& x : v) x = std::normal_distribution<float>(0.f, scales ? .004f : .3f)(random);
    }
  }
  int64_t bytes(int64_t blocks) const { return blocks * LAYERS * shape.attention.block_elements() * 4; }
};

std::vector<std::string> token_texts() {
  std::vector<std::string> texts;
  for (int i = 0; i < Model::VOCAB; ++i) texts.push_back(std::string(i % 4, char('a' + i % 3)) + char('a' + i % 5));
  return texts;
}

void test_int8_product() {
  std::mt19937 random(5);
  for (int64_t depth : {1, 15, 16, 33, 100}) {
    for (int64_t rows : {1, 7, 20}) {
      const int64_t outputs = 9;
      std::vector<float> x(rows * depth), scales(outputs), y(rows * outputs, 1.f);
      std::vector<int8_t> weight(outputs * depth);
      for (float& v : x) v = std::normal_distribution<float>()(random);
      for (float& v : scales) v = std::uniform_real_distribution<float>()(random);
      for (int8_t& v : weight) v = int8_t(random() % 255) - 127;
      matmul_cpu({x.data(), weight.data(), y.data(), rows, outputs, depth, Dtype::float32, true, scales.data()});
      for (int64_t i = 0; i < rows * outputs; ++i) {
        double sum = 0;
        for (int64_t k = 0; k < depth; ++k) {
          sum += double(x[i / outputs * depth + k]) * weight[i % outputs * depth + k];
        }
        check(std::abs(y[i] - (1 + sum * scales[i % outputs])) < 2e-3, "an int8 product is wrong");
      }
    }
  }
}

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

// What a sequence was asked for, and which weights came when its response had how many tokens.
struct Request {
  std::vector<int32_t> prompt;
  uint64_t key;
  Sampling sampling;
  std::vector<std::pair<int64_t, int>> refits;
};

struct Fuzz {
  std::vector<Request> requests;                   // by id
  std::map<int64_t, std::vector<int32_t>> tokens;  // of what was not cancelled, by id
  std::map<int64_t, std::vector<float>> logprobs;
  Counters counters;
};

Sampling random_sampling(std::mt19937& random) {
  Sampling s;
  s.max_tokens = 1 + random() % 40;
  s.min_tokens = random() % 3 ? 0 : random() % (s.max_tokens + 1);
  s.temperature = random() % 5 ? 1.f : 0.f;
  s.repetition_penalty = random() % 3 ? 1.f : 1.2f;
  s.stop = {int32_t(random() % Model::VOCAB)};
  if (random() % 3 == 0) s.stop_strings = {"abca", "bcc" + std::string(1, char('a' + random() % 5))};
  s.top_k = random() % 3 ? 0 : 5;
  s.top_p = random() % 3 ? 1.f : .8f;
  s.min_p = random() % 3 ? 0.f : .05f;
  return s;
}

// Random prompts, sample counts, limits, and then cancels and refits, in a cache of `blocks`.
Fuzz fuzz(int64_t blocks, bool cancels, bool refits) {
  Model model(0);
  Engine engine(model.shape, model.weights, model.bytes(blocks));
  engine.set_token_texts(token_texts());
  std::mt19937 random(3), chance(4);
  std::set<int64_t> live;
  Fuzz run;
  int version = 0;
  for (int groups = 16; groups > 0 || engine.num_live() > 0;) {
    if (groups > 0 && chance() % 3 == 0) {
      --groups;
      std::vector<int32_t> prompt(1 + random() % 40);
      for (int32_t& token : prompt) token = random() % Model::VOCAB;
      std::vector<uint64_t> keys(1 + random() % 6);
      for (uint64_t& key : keys) key = random();
      const Sampling sampling = random_sampling(random);
      const std::vector<int64_t> ids = engine.add(prompt, keys, sampling);
      for (size_t i = 0; i < ids.size(); ++i) {
        check(ids[i] == int64_t(run.requests.size()), "ids are not in order");
        run.requests.push_back({prompt, keys[i], sampling, {{0, version}}});
        live.insert(ids[i]);
      }
    }
    if (cancels && chance() % 4 == 0 && !live.empty()) {
      const int64_t id = *std::next(live.begin(), chance() % live.size());
      engine.cancel(id);
      live.erase(id);
    }
    if (refits && chance() % 9 == 0) {
      model.refit(++version);
      engine.weights_changed();
      for (int64_t id : live) run.requests[id].refits.push_back({engine.generated(id), version});
    }
    for (const Finished& f : engine.step(12)) {
      check(f.tokens.size() == f.logprobs.size() && !f.tokens.empty(), "a response without its log-probabilities");
      run.tokens[f.id] = f.tokens;
      run.logprobs[f.id] = f.logprobs;
      live.erase(f.id);
    }
  }
  check(live.empty(), "a response was lost");
  run.counters = engine.counters();
  return run;
}

// The same response by itself, one token a step, with the refits where they were.
Finished replay(const Request& request) {
  Model model(request.refits.front().second);
  Engine engine(model.shape, model.weights, model.bytes(40));
  engine.set_token_texts(token_texts());
  engine.add(request.prompt, {request.key}, request.sampling);
  size_t next = 1;
  for (int64_t generated = 0;; ++generated) {
    for (; next < request.refits.size() && request.refits[next].first == generated; ++next) {
      model.refit(request.refits[next].second);
      engine.weights_changed();
    }
    const std::vector<Finished> finished = engine.step(1);
    if (!finished.empty()) return finished.front();
    check(generated < 40, "a response does not end");
  }
}

void test_fuzz() {
  const Fuzz wide = fuzz(400, false, false), tight = fuzz(7, false, false);
  check(wide.counters.preemptions == 0 && tight.counters.preemptions > 0, "the small cache preempted nobody");
  check(tight.counters.peak_blocks <= 7, "more blocks than the budget");
  check(wide.tokens == tight.tokens && wide.logprobs == tight.logprobs, "a preempted run gives other responses");
  const Fuzz kept = fuzz(7, true, false);
  check(kept.tokens.size() < wide.tokens.size(), "nothing was cancelled");
  for (const auto& [id, tokens] : kept.tokens) check(tokens == wide.tokens.at(id), "a cancel changed another response");

  size_t refitted = 0;
  for (int64_t blocks : {7, 400}) {
    const Fuzz run = fuzz(blocks, true, true);
    for (const auto& [id, tokens] : run.tokens) {
      const Finished alone = replay(run.requests[id]);
      check(alone.tokens == tokens && alone.logprobs == run.logprobs.at(id), "a response depends on its batch");
      refitted += run.requests[id].refits.size() > 1 && run.requests[id].refits.back().first > 0;
    }
  }
  check(refitted > 20, "hardly a response met a refit");
}

}  // namespace

// With an argument: of that instruction set alone.
int main(int argc, char** argv) {
  test_uniform();
  for (const char* isa : {"portable", "avx2", "avx512"}) {
    if ((argc > 1 && std::strcmp(argv[1], isa) != 0) || !force_cpu_isa(isa)) continue;
    test_draw_inverts_the_cumulative_distribution();
    test_penalty_and_min_tokens();
    test_int8_product();
    test_fuzz();
  }
  return failures != 0;
}
