"""The embedded sampler against transformers and against its own distribution."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from aligner.rollout.native import NativeSampler
from aligner.rollout.sampling import Sampling
from tests.conftest import save_llama
from tests.models.test_policy import PROMPTS, make_policy

VOCAB = 311


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return save_llama(tmp_path_factory.mktemp("sampler") / "m", None, vocab_size=VOCAB)


@pytest.fixture(scope="module")
def sampler(tiny: Path) -> NativeSampler:
    return NativeSampler.from_pretrained(tiny)


def responses(sampler: NativeSampler, prompts, sampling: Sampling, n: int = 1) -> dict:
    return {(r.prompt, r.sample): r for r in sampler.stream(prompts, sampling, n)}


@pytest.mark.slow
def test_greedy_equals_transformers_on_smollm2(smollm2: Path):
    tokenizer, model = AutoTokenizer.from_pretrained(smollm2), AutoModelForCausalLM.from_pretrained(smollm2).eval()
    prompts = [tokenizer(p)["input_ids"] for p in PROMPTS]
    sampling = Sampling(temperature=0, max_tokens=24, stop=(tokenizer.eos_token_id,))
    found = responses(NativeSampler.from_pretrained(smollm2), prompts, sampling)
    for i, ids in enumerate(prompts):
        with torch.no_grad():
            out = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0, len(ids) :]
        assert found[i, 0].tokens == out.tolist()


@pytest.mark.parametrize("kind", [{}, {"top_k": 12}, {"top_p": 0.7}, {"temperature": 1.7}, {"min_p": 0.1}])
def test_first_token_frequencies_follow_the_softmax(tiny: Path, sampler: NativeSampler, kind: dict):
    prompt, count = [5, 99, 201, 17], 6000
    sampling = Sampling(**{"max_tokens": 1, "seed": 7, **kind})
    rollout = sampler.generate([prompt], sampling, n=count)
    got = np.bincount(rollout.tokens_N.view(count, -1)[:, -1].numpy(), minlength=VOCAB)
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(tiny).double()
        logits = model(torch.tensor([prompt])).logits[0, -1] / sampling.temperature
    p = logits.softmax(-1).numpy()
    order = np.argsort(-p)
    keep = np.ones(VOCAB, dtype=bool)
    if sampling.top_k:
        keep[order[sampling.top_k :]] = False
    if sampling.top_p < 1:
        keep[order[1 + np.searchsorted(np.cumsum(p[order]), sampling.top_p) :]] = False
    keep &= p >= sampling.min_p * p.max()
    q = np.where(keep, p, 0) / p[keep].sum()
    assert got[~keep].sum() == 0
    common = q * count >= 5  # chi-square wants five expected counts a cell; the rest share one
    observed = np.append(got[common], got[~common].sum())
    expected = np.append(q[common], q[~common].sum()) * count
    cells = expected > 0
    chi2, degrees = (((observed - expected) ** 2)[cells] / expected[cells]).sum(), cells.sum() - 1
    assert degrees > 5 and abs(chi2 - degrees) < 4.5 * np.sqrt(2 * degrees), (chi2, degrees)
    got_logprobs = rollout.sampler_logprobs_N.view(count, -1)[:, -1].double()
    want = logits.log_softmax(-1)[rollout.tokens_N.view(count, -1)[:, -1]]
    assert (got_logprobs - want).abs().max() < 1e-5


def test_same_seed_same_tokens_whatever_the_batch(sampler: NativeSampler):
    g = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, VOCAB, (n,), generator=g).tolist() for n in (3, 11, 1, 7, 5, 20)]
    sampling = Sampling(max_tokens=30, seed=5, stop=(9, 50, 51, 52, 53))
    together = responses(sampler, prompts, sampling, n=3)
    assert {r.finished for r in together.values()} == {True, False}
    for i, prompt in enumerate(prompts):
        alone = responses(sampler, [prompt], sampling, n=1)[0, 0]
        assert alone.tokens == together[i, 0].tokens
        assert np.allclose(alone.logprobs, together[i, 0].logprobs, atol=1e-5)
    reversed_ = responses(sampler, prompts[::-1], sampling, n=3)
    assert all(reversed_[5 - i, j].tokens == r.tokens for (i, j), r in together.items())
    other = responses(sampler, prompts, Sampling(max_tokens=30, seed=6), n=3)
    assert sum(other[k].tokens[:5] == r.tokens[:5] for k, r in together.items()) <= 2
    assert len({tuple(together[1, j].tokens) for j in range(3)}) == 3


def test_small_batches_give_the_same_responses(tiny: Path, sampler: NativeSampler):
    prompts = [[5, 6], [7], [8, 9, 10], [11, 12]]
    small = NativeSampler.from_pretrained(tiny)
    small.max_batch = 2
    sampling = Sampling(max_tokens=6, seed=1)
    a, b = responses(sampler, prompts, sampling), responses(small, prompts, sampling)
    assert {k: r.tokens for k, r in a.items()} == {k: r.tokens for k, r in b.items()}


def test_stop_token_ends_and_belongs_to_the_response(sampler: NativeSampler):
    sampling = Sampling(max_tokens=40, seed=3, stop=tuple(range(0, VOCAB, 10)))
    for r in responses(sampler, [[5, 6], [7, 8, 9]], sampling, n=8).values():
        stops = [t % 10 == 0 for t in r.tokens]
        assert r.finished == stops[-1] and not any(stops[:-1]) and len(r.logprobs) == len(r.tokens) <= 40


def test_sampler_and_trainer_agree_on_logprobs(tiny: Path):
    sampler, policy = NativeSampler.from_pretrained(tiny), make_policy(tiny)
    rollout = sampler.generate([[5, 6, 7], [8], [9, 10]], Sampling(max_tokens=12, seed=2), n=2)
    logprobs_N, _ = policy.infer(rollout)
    assert (logprobs_N - rollout.sampler_logprobs_N).abs().max() < 2e-5
    assert (logprobs_N[rollout.action_mask_N] < 0).all()


def test_errors_name_what_to_change(sampler: NativeSampler):
    with pytest.raises(ValueError, match="prompt 1 has 120 tokens and max_tokens is 10.*context of 128"):
        sampler.generate([[5], [5] * 120], Sampling(max_tokens=10))
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        sampler.generate([[]], Sampling())
    for bad in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"max_tokens": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Sampling(**bad)
