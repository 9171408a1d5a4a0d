"""The compiled decoder behind NativeSampler: exactness, memory budget, sharing, refit, cancellation."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from aligner.data.movie_reviews import labelled_reviews
from aligner.refit.plan import compile_plan
from aligner.rollout.native import NativeSampler
from aligner.rollout.sampling import Sampling
from tests.conftest import save_llama
from tests.models.test_policy import make_policy

VOCAB = 311


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return save_llama(tmp_path_factory.mktemp("engine") / "m", None, vocab_size=VOCAB)


def responses(sampler: NativeSampler, prompts, sampling: Sampling, n: int = 1) -> dict:
    return {(r.prompt, r.sample): r for r in sampler.stream(prompts, sampling, n)}


def random_prompts(count: int, longest: int) -> list[list[int]]:
    g = torch.Generator().manual_seed(count)
    lengths = torch.randint(1, longest + 1, (count,), generator=g).tolist()
    return [torch.randint(3, VOCAB, (n,), generator=g).tolist() for n in lengths]


@torch.no_grad()
def assert_greedy(model, prompts: list[list[int]], found: dict) -> int:
    """Every token is the model's most likely one after what came before. Returns the ties within 1e-4 nats."""
    ties = 0
    for i, prompt in enumerate(prompts):
        tokens = found[i, 0].tokens
        logits = model(torch.tensor([prompt + tokens]), logits_to_keep=len(tokens) + 1).logits[0, :-1].float()
        short = logits.max(-1).values - logits[torch.arange(len(tokens)), tokens]
        assert short.max() < 1e-4, (i, short)
        ties += int((short > 0).sum())
    return ties


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_greedy_equals_transformers(tmp_path, tied: bool, kv_heads: int):
    folder = save_llama(tmp_path / "m", None, vocab_size=VOCAB, tie_word_embeddings=tied, num_key_value_heads=kv_heads)
    prompts = random_prompts(12, 60)
    found = responses(NativeSampler.from_pretrained(folder), prompts, Sampling(temperature=0, max_tokens=30))
    assert assert_greedy(AutoModelForCausalLM.from_pretrained(folder).eval(), prompts, found) == 0


@pytest.mark.parametrize("head_dim", [8, 24, 80])
def test_head_dimensions_that_fill_no_vector(tmp_path, head_dim: int):
    folder = save_llama(tmp_path / "m", None, vocab_size=VOCAB, head_dim=head_dim, hidden_size=72, intermediate_size=50)
    prompts = random_prompts(6, 40)
    found = responses(NativeSampler.from_pretrained(folder), prompts, Sampling(temperature=0, max_tokens=20))
    assert assert_greedy(AutoModelForCausalLM.from_pretrained(folder).eval(), prompts, found) == 0


@pytest.mark.slow
@pytest.mark.parametrize("count", [60, pytest.param(200, marks=pytest.mark.full)])
def test_greedy_equals_transformers_on_real_prompts(smollm2: Path, count: int):
    """Openings of film reviews, 4 to 100 tokens. Given what came before, every token is transformers' first choice,
    so by induction transformers generates the same."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    texts = [review.text for review in labelled_reviews()[::125]][:count]
    prompts = [tokenizer(text)["input_ids"][: 4 + 37 * i % 97] for i, text in enumerate(texts)]
    assert len(prompts) == count and len({len(p) for p in prompts}) > 40
    sampling = Sampling(temperature=0, max_tokens=16, stop=(tokenizer.eos_token_id,))
    found = responses(NativeSampler.from_pretrained(smollm2), prompts, sampling)
    ties = assert_greedy(AutoModelForCausalLM.from_pretrained(smollm2).eval(), prompts, found)
    print(f"{sum(len(r.tokens) for r in found.values())} tokens, {ties} ties within 1e-4 nats")
    assert ties <= count // 50


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-4), ("bfloat16", 2e-2)])
def test_logprobs_equal_the_trainers(tmp_path, tiny: Path, dtype: str, limit: float):
    """The trainer holds the weights that the sampler holds: those that its dtype can tell apart."""
    model = AutoModelForCausalLM.from_pretrained(tiny).to(getattr(torch, dtype)).float()
    model.save_pretrained(tmp_path / "rounded")
    sampler, policy = NativeSampler.from_pretrained(tiny, dtype=dtype), make_policy(tmp_path / "rounded")
    rollout = sampler.generate(random_prompts(8, 40), Sampling(max_tokens=40, seed=4), n=2)
    assert (policy.infer(rollout)[0] - rollout.sampler_logprobs_N).abs().max() < limit


def test_sixty_four_sequences_in_a_budget_for_eight(tiny: Path):
    shape, prompts = NativeSampler.from_pretrained(tiny).shape, random_prompts(64, 60)
    sampling = Sampling(max_tokens=60, seed=8, stop=(9,))
    per_token = 2 * shape.num_layers * shape.kv_heads * shape.head_dim * 4
    wide, narrow = NativeSampler.from_pretrained(tiny), NativeSampler(shape, cache_bytes=8 * 120 * per_token)
    for name, tensor in wide.weights.items():
        narrow.weights[name].copy_(tensor)
    a, b = responses(wide, prompts, sampling), responses(narrow, prompts, sampling)
    assert wide.engine.counters.preemptions == 0 < narrow.engine.counters.preemptions
    assert len(a) == 64 and a == b  # tokens and log-probabilities, bit for bit


def test_samples_of_a_prompt_read_it_once(tiny: Path):
    prompt, sampling = random_prompts(1, 1)[0] * 90, Sampling(max_tokens=4, seed=1)
    shared, apart = NativeSampler.from_pretrained(tiny), NativeSampler.from_pretrained(tiny)
    together = responses(shared, [prompt], sampling, n=8)
    first = responses(apart, [prompt], sampling)
    assert shared.engine.counters.rows == 90 + 8 * 3 and apart.engine.counters.rows == 90 + 3
    assert together[0, 0] == first[0, 0]


def test_refit_then_generate_equals_a_fresh_engine(tiny: Path):
    policy, loaded = make_policy(tiny), NativeSampler.from_pretrained(tiny)
    sampler = NativeSampler(policy.shape)
    plan = compile_plan(policy.manifest(), sampler.manifest())
    sampling, prompts = Sampling(seed=3), random_prompts(5, 20)
    number = sampler.engine.add([5], [1], Sampling())[0]
    with pytest.raises(RuntimeError, match="1 responses are unfinished"):
        sampler.refit(plan, policy, version=1)
    sampler.engine.cancel(number)
    responses(sampler, prompts, sampling)
    sampler.refit(plan, policy, version=1)
    assert responses(sampler, prompts, sampling) == responses(loaded, prompts, sampling)


def test_closing_a_stream_cancels_and_leaves_others_alone(tiny: Path):
    sampler, prompts, sampling = NativeSampler.from_pretrained(tiny), random_prompts(6, 20), Sampling(max_tokens=30)
    alone = responses(sampler, prompts, sampling)
    one, two = sampler.stream(prompts, sampling), sampler.stream(prompts[:3], Sampling(max_tokens=40, seed=9), n=2)
    first, _ = next(one), next(two)
    two.close()
    found = {(r.prompt, r.sample): r for r in [first, *one]}
    assert found == alone and sampler.engine.num_live == 0


def test_a_request_over_the_cache_is_refused(tiny: Path):
    sampler = NativeSampler(NativeSampler.from_pretrained(tiny).shape, cache_bytes=1 << 15)
    with pytest.raises(ValueError, match="does not fit the cache of .* raise cache_bytes"):
        sampler.generate([[5] * 60], Sampling(max_tokens=60))
    with pytest.raises(ValueError, match=r"not in \[0, 311\)"):
        NativeSampler.from_pretrained(tiny).generate([[311]], Sampling())


def test_weights_that_are_not_finite_are_reported(tiny: Path):
    sampler = NativeSampler.from_pretrained(tiny)
    sampler.weights["layers.1.down"][3, 5] = torch.nan
    with pytest.raises(RuntimeError, match="not finite"):
        sampler.generate([[5, 6]], Sampling())
    assert sampler.engine.num_live == 0
