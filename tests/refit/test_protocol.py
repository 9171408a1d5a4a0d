"""What a refit that fails leaves behind: an untouched sampler before the first write, a refusing one after it."""

import dataclasses

import pytest
import torch

from aligner import ops
from aligner.refit import execute
from aligner.refit.plan import compile_plan
from aligner.rollout.native import NativeSampler
from aligner.rollout.sampling import Sampling
from tests.conftest import save_llama
from tests.models.test_policy import make_policy

PROMPTS, SAMPLING = [[5, 6, 7], [9], [5, 6, 8, 200]], Sampling(max_tokens=12, seed=4)


class Policies:
    """A source that goes from one set of weights to the next."""

    def __init__(self, folder):
        self.now = self.policy = make_policy(folder, rank=0)
        self.plan = None

    def manifest(self) -> dict:
        return self.policy.manifest()

    def weights(self, names):
        return self.policy.weights(names)

    @torch.no_grad()
    def step(self, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        for tensor in self.policy.network.base.values():
            tensor.add_(torch.randn(tensor.shape, generator=g), alpha=0.05)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("protocol") / "m", None, vocab_size=311, tie_word_embeddings=False)


@pytest.fixture
def trained(folder):
    """(source, sampler at version 1, plan); the source has moved on since."""
    source, sampler = Policies(folder), NativeSampler.from_pretrained(folder)
    plan = compile_plan(source.manifest(), sampler.manifest())
    source.step(1)
    sampler.refit(plan, source, version=1)
    source.step(2)
    return source, sampler, plan


def generated(sampler: NativeSampler):
    return [(r.prompt, r.sample, r.tokens, r.logprobs) for r in sorted(
        sampler.stream(PROMPTS, SAMPLING, n=2), key=lambda r: (r.prompt, r.sample)
    )]  # fmt: skip


def fresh(source, plan) -> NativeSampler:
    """A sampler that has held nothing before."""
    sampler = NativeSampler(source.policy.shape)
    sampler.refit(plan, source, version=1)
    return sampler


def assert_recovers(source, sampler: NativeSampler, plan, version: int) -> None:
    sampler.refit(plan, source, version=version)
    assert sampler.generate(PROMPTS, SAMPLING).weights_version == version
    other = fresh(source, plan)
    assert all(torch.equal(t, other.weights[name]) for name, t in sampler.weights.items())
    assert generated(sampler) == generated(other)


def test_refit_then_generate_equals_a_fresh_engine(trained):
    source, sampler, plan = trained
    before = generated(sampler)
    rollout = sampler.generate(PROMPTS, SAMPLING)
    assert rollout.weights_version == 1
    assert_recovers(source, sampler, plan, version=2)
    assert generated(sampler) != before


def wrong_dtype(source, name, weight):
    return weight.double()


def cut_short(source, name, weight):
    short = weight.clone()
    short.untyped_storage().resize_(weight.nbytes - 4)
    return short


def other_shape(source, name, weight):
    return weight[:-1]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (wrong_dtype, r"source decoder\S+linear_fc2.weight is float64 \[64, 96\], its manifest says float32"),
        (other_shape, r"linear_fc2.weight is float32 \[63, 96\], its manifest says float32 \[64, 96\]"),
        (cut_short, r"linear_fc2.weight is cut short: 24572 bytes are behind it, its shape needs 24576"),
    ],
)
def test_a_wrong_source_changes_nothing(trained, monkeypatch, fault, message: str):
    source, sampler, plan = trained
    before, whole = generated(sampler), source.policy.network.weight
    broken = "decoder.layers.2.mlp.linear_fc2.weight"
    monkeypatch.setattr(
        source, "weights", lambda names: [fault(source, n, whole(n)) if n == broken else whole(n) for n in names]
    )
    with pytest.raises(ValueError, match=message):
        sampler.refit(plan, source, version=2)
    assert sampler.weights_version == 1 and generated(sampler) == before  # the last version is still served
    monkeypatch.undo()
    assert_recovers(source, sampler, plan, version=2)


def test_a_plan_of_other_manifests_changes_nothing(trained, tmp_path, monkeypatch):
    source, sampler, plan = trained
    before = generated(sampler)
    tied = make_policy(save_llama(tmp_path / "m", None, vocab_size=311, tie_word_embeddings=True), rank=0)
    other = compile_plan(tied.manifest(), NativeSampler(tied.shape).manifest())
    for wrong in (other, dataclasses.replace(plan, digest="0" * 64)):
        with pytest.raises(ValueError, match=f"the plan {wrong.digest[:12]} was compiled from other manifests"):
            sampler.refit(wrong, source, version=2)
    with pytest.raises(ValueError, match="versions go up"):
        sampler.refit(plan, source, version=1)
    number = sampler.engine.add([5], [1], Sampling())[0]
    with pytest.raises(RuntimeError, match="1 responses are unfinished"):
        sampler.refit(plan, source, version=2)
    sampler.engine.cancel(number)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="destination norm is missing"):
        patch.delitem(sampler.weights, "norm")
        sampler.refit(plan, source, version=2)
    assert generated(sampler) == before


def flip_a_byte(monkeypatch, sampler: NativeSampler, name: str) -> None:
    """A byte of the destination changes between the copy and the reading back."""
    real = ops.refit_copy

    def copy_then_flip(sources, destinations, **options):
        sums = real(sources, destinations, **options)
        sampler.weights[name].view(torch.uint8).flatten()[1234] ^= 1
        monkeypatch.undo()
        return sums

    monkeypatch.setattr(execute.ops, "refit_copy", copy_then_flip)


@pytest.mark.parametrize("name", ["layers.1.qkv", "embedding", "layers.2.down"])
def test_a_flipped_byte_poisons_until_a_whole_refit(trained, monkeypatch, name: str):
    source, sampler, plan = trained
    flip_a_byte(monkeypatch, sampler, name)
    with pytest.raises(RuntimeError, match=f"1 of .* pieces read back other than .* the first in {name}"):
        sampler.refit(plan, source, version=2)
    for call in (sampler.generate, lambda *a: next(sampler.stream(*a))):
        with pytest.raises(RuntimeError, match=r"mixture, because the refit to version 2 failed.*refit all of them"):
            call(PROMPTS, SAMPLING)
    with pytest.raises(ValueError, match="compiled from other manifests"):
        sampler.refit(dataclasses.replace(plan, digest="1" * 64), source, version=2)
    with pytest.raises(RuntimeError, match="mixture"):  # a preflight that fails does not heal it either
        sampler.generate(PROMPTS, SAMPLING)
    assert_recovers(source, sampler, plan, version=2)


@pytest.mark.parametrize("last", [1, 2])  # the preflight asks for all weights, the copy does, and what comes after it
@pytest.mark.parametrize("error", [RuntimeError("the link is down"), KeyboardInterrupt()])
def test_a_source_that_fails_in_the_middle_poisons(trained, monkeypatch, error: BaseException, last: int):
    source, sampler, plan = trained
    whole, calls = source.policy.weights, 0

    def failing(names):
        nonlocal calls
        calls += 1
        if calls > last:
            raise error
        return whole(names)

    monkeypatch.setattr(source, "weights", failing)
    with pytest.raises(type(error)):
        sampler.refit(plan, source, version=2)
    reason = "failed after its first write .the link is down" if str(error) else "was interrupted"
    with pytest.raises(RuntimeError, match=f"the refit to version 2 {reason}"):
        sampler.generate(PROMPTS, SAMPLING)
    assert sampler.weights_version == 1
    monkeypatch.undo()
    assert_recovers(source, sampler, plan, version=2)
