"""int8 weights: the same network as float32 rows of the quantised numbers, and how far that is from the original."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from aligner.data.batch import Rollout
from aligner.data.movie_reviews import labelled_reviews
from aligner.refit.plan import compile_plan
from aligner.rollout.native import NativeSampler
from aligner.rollout.sampling import Sampling
from tests.conftest import save_model
from tests.models.test_policy import make_policy

PROMPTS = [[5, 6, 7], [8], [9, 10] * 20]


@pytest.mark.parametrize(
    ("family", "changes"), [("llama", {"tie_word_embeddings": True}), ("qwen2", {}), ("qwen3", {})]
)
def test_int8_equals_the_numbers_it_stands_for(tmp_path, family: str, changes: dict):
    """Widths that fill no vector; half a step is the most that a number moves."""
    sizes = {"hidden_size": 72, "intermediate_size": 50, "head_dim": 18, "vocab_size": 311}
    folder = save_model(tmp_path / "m", family, **sizes, **changes)
    original, small = NativeSampler.from_pretrained(folder), NativeSampler.from_pretrained(folder, dtype="int8")
    meant = NativeSampler(original.shape)
    for name, tensor in original.weights.items():
        if small.weights[name].dtype == torch.int8:
            scale = small.weights[name + ".scale"][:, None]
            meant.weights[name].copy_(small.weights[name] * scale)
            assert (small.weights[name].abs().amax(1) == 127).all()
            assert ((meant.weights[name] - tensor).abs() <= 0.501 * scale).all()
        else:
            meant.weights[name].copy_(small.weights[name])
            assert torch.equal(small.weights[name], tensor)
    assert sum(t.dtype == torch.int8 for t in small.weights.values()) == 4 * original.shape.num_layers
    sampling = Sampling(max_tokens=30, seed=5)
    a, b = (s.generate(PROMPTS, sampling, n=3) for s in (small, meant))
    assert torch.equal(a.tokens_N, b.tokens_N)
    assert (a.sampler_logprobs_N - b.sampler_logprobs_N).abs().max() < 1e-5


def test_refit_quantises_what_it_copies(tmp_path):
    folder = save_model(tmp_path / "m", "qwen2", vocab_size=311)
    policy, loaded = make_policy(folder), NativeSampler.from_pretrained(folder, dtype="int8")
    sampler = NativeSampler(policy.shape, dtype="int8")
    sampler.refit(compile_plan(policy.manifest(), sampler.manifest()), policy, version=3)
    assert all(torch.equal(sampler.weights[name], tensor) for name, tensor in loaded.weights.items())
    assert sampler.generate(PROMPTS, Sampling()).weights_version == 3


def test_a_row_of_zeros_stays_zero(tmp_path):
    sampler = NativeSampler.from_pretrained(save_model(tmp_path / "m", "llama", vocab_size=311), dtype="int8")
    destination = {name: tensor.float() for name, tensor in sampler.weights.items()}
    destination["layers.0.down"][3] = 0
    sampler._quantise(destination)
    assert (sampler.weights["layers.0.down"][3] == 0).all() and sampler.weights["layers.0.down.scale"][3] == 0
    assert sampler.generate(PROMPTS, Sampling()).finished_B.shape == (3,)


@pytest.mark.slow
def test_gap_to_float32_on_smollm2(smollm2: Path):
    """Nats that int8 weights move the log-probability of a sampled token: the figures of NativeSampler's docstring."""
    tokenizer, model = AutoTokenizer.from_pretrained(smollm2), AutoModelForCausalLM.from_pretrained(smollm2).eval()
    prompts = [tokenizer(review.text)["input_ids"][:32] for review in labelled_reviews()[::3000]]
    sampler = NativeSampler.from_pretrained(smollm2, dtype="int8")
    rollout = sampler.generate(prompts, Sampling(max_tokens=30, seed=1, stop=(tokenizer.eos_token_id,)))
    gap = (rollout.sampler_logprobs_N - float32_logprobs(model, rollout)).abs()[rollout.action_mask_N]
    print(f"int8 gap over {len(gap)} tokens: mean {gap.mean():.4f}, max {gap.max():.4f} nats")
    assert len(gap) > 300 and gap.mean() < 0.08 and gap.max() < 0.6


@torch.no_grad()
def float32_logprobs(model, rollout: Rollout) -> torch.Tensor:
    logprobs_N, starts = torch.zeros(len(rollout.tokens_N)), rollout.cu_seqlens.tolist()
    for a, b in zip(starts[:-1], starts[1:], strict=True):
        ids = rollout.tokens_N[a:b]
        p = model(ids[None]).logits[0, :-1].log_softmax(-1)
        logprobs_N[a + 1 : b] = p.gather(1, ids[1:, None])[:, 0]
    return logprobs_N
