"""The refit plan: every destination row once, from the right source, for any pair of layouts."""

from pathlib import Path

import pytest
import torch

from aligner.models.weights import entry
from aligner.refit.plan import compile_plan
from aligner.rollout.native import NativeSampler
from aligner.rollout.sampling import Sampling
from tests.conftest import save_llama
from tests.models.test_policy import make_policy


@pytest.mark.parametrize("tied", [True, False])
def test_refit_from_the_policy_equals_loading_the_folder(tmp_path, tied: bool):
    folder = save_llama(tmp_path / "m", None, vocab_size=311, tie_word_embeddings=tied)
    policy, loaded = make_policy(folder), NativeSampler.from_pretrained(folder)
    sampler = NativeSampler(policy.shape)
    storage = {name: t.data_ptr() for name, t in sampler.weights.items()}
    plan = compile_plan(policy.manifest(), sampler.manifest())
    sampler.refit(plan, policy.weight, version=7)
    assert sampler.weights_version == 7
    assert all(torch.equal(sampler.weights[n], t) for n, t in loaded.weights.items())
    assert storage == {name: t.data_ptr() for name, t in sampler.weights.items()}  # in place
    assert plan.digest == compile_plan(policy.manifest(), sampler.manifest()).digest
    written = plan.execute(policy.weight, sampler.weights)
    assert written == sum(t.numel() * 4 for t in sampler.weights.values())


def test_refit_merges_the_adapters(tmp_path):
    folder = save_llama(tmp_path / "m", None, vocab_size=311)
    policy = make_policy(folder)
    with torch.no_grad():
        for i, adapter in enumerate(policy.network.adapters.values()):
            adapter.b.normal_(std=0.05, generator=torch.Generator().manual_seed(i))
    sampler = NativeSampler(policy.shape)
    sampler.refit(compile_plan(policy.manifest(), sampler.manifest()), policy.weight, version=1)
    rollout = sampler.generate([[5, 6], [7]], Sampling(max_tokens=10, seed=1), n=2)
    gap = policy.infer(rollout)[0] - rollout.sampler_logprobs_N
    moved = policy.infer_reference(rollout) - rollout.sampler_logprobs_N
    assert gap.abs().max() < 5e-5 < 1e-2 < moved.abs().max()


def test_plan_between_different_fusions_moves_every_row():
    full = {"x": torch.arange(24.0).view(12, 2), "y": torch.arange(100.0, 110.0).view(5, 2)}
    source = {
        "a": torch.cat([full["y"][3:], full["x"][:7]]),
        "b": torch.cat([full["x"][7:], full["y"][:3]]),
    }
    left = [
        entry("a", source["a"], [("y", 3, 2), ("x", 0, 7)]),
        entry("b", source["b"], [("x", 7, 5), ("y", 0, 3)]),
    ]
    target = {"p": torch.zeros(9, 2, dtype=torch.bfloat16), "q": torch.zeros(8, 2)}
    right = [
        entry("p", target["p"], [("x", 4, 6), ("y", 1, 3)]),
        entry("q", target["q"], [("y", 4, 1), ("x", 0, 4), ("x", 10, 2), ("y", 0, 1)]),
    ]
    compile_plan(left, right).execute(source.__getitem__, target)
    assert torch.equal(target["p"].float(), torch.cat([full["x"][4:10], full["y"][1:4]]).bfloat16().float())
    assert torch.equal(target["q"], torch.cat([full["y"][4:], full["x"][:4], full["x"][10:], full["y"][:1]]))


def test_plan_refuses_gaps_overlaps_and_other_models():
    x = torch.zeros(6, 2)
    whole = entry("w", x, [("x", 0, 6)])
    with pytest.raises(ValueError, match="have no source"):
        compile_plan([entry("a", x[:4], [("x", 0, 4)])], [whole])
    with pytest.raises(ValueError, match="two sources or none"):
        compile_plan([entry("a", x[:4], [("x", 0, 4)]), entry("b", x[:3], [("x", 3, 3)])], [whole])
    with pytest.raises(ValueError, match="must hold the same model"):
        compile_plan([entry("a", torch.zeros(6, 3), [("x", 0, 6)])], [whole])
    with pytest.raises(ValueError, match="segments fill 4 rows, expected 6"):
        entry("w", x, [("x", 0, 4)])


def test_export_is_the_inverse_of_import(tmp_path: Path):
    from aligner.checkpoint.huggingface import Weights

    folder = save_llama(tmp_path / "m", None, vocab_size=311, tie_word_embeddings=False)
    policy = make_policy(folder)
    read = Weights(folder, policy.shape.tensors())
    exported = dict(policy.hugging_face())
    assert exported.keys() == policy.shape.tensors().keys()
    assert all(torch.equal(t, read(name)) for name, t in exported.items())
