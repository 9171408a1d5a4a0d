"""Trainer ranks in other processes: their weights arrive, and what happens when one of them is killed."""

import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import torch

from aligner import ops
from aligner.models.weights import fill
from aligner.refit import execute, shared
from aligner.refit.plan import compile_plan
from aligner.refit.shared import SharedSource, SharedWeights
from aligner.rollout.native import NativeSampler
from aligner.rollout.sampling import Sampling
from tests.refit.layouts import Whole
from tests.refit.publisher import SHAPE, Rank, weights

ROOT = Path(__file__).parent.parent.parent
PROMPTS, SAMPLING = [[5, 6, 7], [9]], Sampling(max_tokens=8, seed=4)


class Process:
    """A publisher, started; commands go down its standard input."""

    def __init__(self, name: str, rank: int, ranks: int):
        command = [sys.executable, "-m", "tests.refit.publisher", name, str(rank), str(ranks)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def expect(self, word: str) -> None:
        assert self.process.stdout.readline().strip() == word

    def tell(self, command: str, version: int) -> None:
        self.process.stdin.write(f"{command} {version}\n")
        self.process.stdin.flush()

    def publish(self, version: int) -> None:
        self.tell("publish", version)
        self.expect("published")

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def trainers():
    """(names, processes) of two tensor-parallel ranks."""
    run = uuid.uuid4().hex
    names = [f"{run}-{rank}" for rank in range(2)]
    processes = [Process(name, rank, 2) for rank, name in enumerate(names)]
    for p in processes:
        p.expect("ready")
    yield names, processes
    for p in processes:
        p.process.kill()
        p.process.wait()
    for name in names:
        (shared.FOLDER / (shared.PREFIX + name)).unlink(missing_ok=True)


def generated(sampler: NativeSampler):
    found = sampler.stream(PROMPTS, SAMPLING, n=2)
    return sorted((r.prompt, r.sample, r.tokens, r.logprobs) for r in found)


def fresh(version: int) -> NativeSampler:
    sampler = NativeSampler(SHAPE)
    fill(sampler.manifest()["tensors"], sampler.weights, Whole(weights(version)))
    return sampler


def assert_holds(sampler: NativeSampler, version: int) -> None:
    want = fresh(version)
    assert all(torch.equal(t, want.weights[name]) for name, t in sampler.weights.items())
    assert sampler.generate(PROMPTS, SAMPLING).weights_version == version
    assert generated(sampler) == generated(want)


def test_two_ranks_arrive_and_a_killed_one_poisons(trainers, monkeypatch):
    names, processes = trainers
    source, sampler = SharedSource(names, timeout_s=0.2), NativeSampler(SHAPE)
    plan = compile_plan(source.manifest(), sampler.manifest())
    for version in (1, 2):
        for p in processes:
            p.publish(version)
        source.wait(version)
        sampler.refit(plan, source, version=version)
        assert_holds(sampler, version)

    # Killed between two refits: nothing has been written, the last version goes on.
    processes[0].publish(3)
    processes[1].tell("stall", 3)
    processes[1].expect("stalled")  # in the middle of its copy to shared memory
    processes[1].kill()
    with pytest.raises(RuntimeError, match=f"{names[1]} belongs to a process that has died; start the trainer rank"):
        source.wait(3)
    assert_holds(sampler, 2)

    # Started again it is found again. Killed while the sampler copies: the sampler refuses.
    processes[1] = Process(names[1], 1, 2)
    processes[1].expect("ready")
    processes[1].publish(3)
    source.wait(3)
    real = ops.refit_copy

    def copy_and_kill(*arguments, **options):
        processes[1].kill()
        monkeypatch.undo()
        return real(*arguments, **options)

    monkeypatch.setattr(execute.ops, "refit_copy", copy_and_kill)
    with pytest.raises(RuntimeError, match="has died"):
        sampler.refit(plan, source, version=3)
    with pytest.raises(RuntimeError, match=f"mixture, because the refit to version 3 failed.*{names[1]} has died"):
        sampler.generate(PROMPTS, SAMPLING)
    with pytest.raises(RuntimeError, match="has died"):
        sampler.refit(plan, source, version=3)  # still dead: nothing is copied, nothing heals
    with pytest.raises(RuntimeError, match="mixture"):
        sampler.generate(PROMPTS, SAMPLING)

    # The whole refit ends it. What the killed processes left in /dev/shm is gone when the next one starts.
    processes[1] = Process(names[1], 1, 2)
    processes[1].expect("ready")
    for p in processes:
        p.publish(4)
    source.wait(4)
    sampler.refit(plan, source, version=4)
    assert_holds(sampler, 4)
    for p in processes:
        p.process.stdin.close()
        assert p.process.wait(20) == 0
    assert not [path for name in names for path in shared.FOLDER.glob(f"*{name}*")]


@pytest.fixture
def one():
    """A rank of this process: (name, its weights, where it publishes them)."""
    name, rank = uuid.uuid4().hex, Rank(0, 1)
    published = SharedWeights(name, rank)
    yield name, rank, published
    published.close()


def test_truncated_rewritten_and_missing_sources(one):
    name, rank, published = one
    source, sampler = SharedSource([name], timeout_s=0.05), NativeSampler(SHAPE)
    plan = compile_plan(source.manifest(), sampler.manifest())
    with pytest.raises(TimeoutError, match=r"holds version -1 after 0.05 s, expected 1"):
        source.wait(1)
    rank.step(1)
    published.publish(1)
    source.wait(1)
    sampler.refit(plan, source, version=1)
    assert_holds(sampler, 1)

    rank.step(2)
    published.publish(2)  # before the sampler waited for it
    with pytest.raises(RuntimeError, match="holds version 2, expected 1"):
        sampler.refit(plan, source, version=2)
    assert_holds(sampler, 1)
    source.wait(2)
    size = published.path.stat().st_size
    os.truncate(published.path, size - 4096)
    with pytest.raises(ValueError, match=f"is cut short: {size - 4096} bytes of {size}"):
        sampler.refit(plan, source, version=2)
    assert_holds(sampler, 1)
    os.truncate(published.path, size)
    published.publish(2)
    sampler.refit(plan, source, version=2)
    assert_holds(sampler, 2)
    with pytest.raises(RuntimeError, match="is not there; start the trainer rank"):
        SharedSource([name + "x"], timeout_s=0.01)
    with pytest.raises(ValueError, match="belongs to a process that is alive"):
        SharedWeights(name, rank)


def test_a_source_that_moves_on_while_it_is_read_poisons(one, monkeypatch):
    name, rank, published = one
    source, sampler = SharedSource([name]), NativeSampler(SHAPE)
    plan = compile_plan(source.manifest(), sampler.manifest())
    rank.step(1)
    published.publish(1)
    source.wait(1)
    real = ops.refit_copy

    def copy_meanwhile(*arguments, **options):
        monkeypatch.undo()
        rank.step(2)
        published.publish(2)
        return real(*arguments, **options)

    monkeypatch.setattr(execute.ops, "refit_copy", copy_meanwhile)
    with pytest.raises(RuntimeError, match="holds version 2, expected 1"):
        sampler.refit(plan, source, version=1)
    with pytest.raises(RuntimeError, match="mixture"):
        sampler.generate(PROMPTS, SAMPLING)
    source.wait(2)
    sampler.refit(plan, source, version=2)
    assert_holds(sampler, 2)


def test_a_publisher_removes_what_dead_ones_left(one):
    _, rank, _ = one
    left = shared.FOLDER / (shared.PREFIX + uuid.uuid4().hex)
    left.write_bytes(b"x" * 100)  # nobody holds it
    alive = SharedWeights(uuid.uuid4().hex, rank)
    try:
        assert not left.exists() and one[2].path.exists() and alive.path.exists()
    finally:
        alive.close()
    assert not alive.path.exists()
