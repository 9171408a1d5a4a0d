"""A layout changes nothing but who computes what: every method on every layout against one process."""

import dataclasses
import os
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from aligner.run.distributed import ParallelConfig
from tests.conftest import save_llama
from tests.distributed import updates
from tests.distributed.updates import METHODS, VOCAB, Case

TOLERANCE = 1e-5  # relative to the largest entry of a tensor
LAYOUTS = {
    2: {
        "TP2": ParallelConfig(tensor=2),
        "TP2+SP": ParallelConfig(tensor=2, sequence=True),
        "PP2": ParallelConfig(pipeline=2),
        "PP2xVPP2": ParallelConfig(pipeline=2, virtual_pipeline=2),
        "CP2": ParallelConfig(context=2),
        "DP2": ParallelConfig(),
        "DP2, distributed optimizer": ParallelConfig(distributed_optimizer=True),
    },
    4: {
        "TP2xPP2": ParallelConfig(tensor=2, pipeline=2),
        "TP2xDP2": ParallelConfig(tensor=2),
    },
}
CASES = [Case(method=m, model=t, lora=x) for m in METHODS for t in ("tied", "untied") for x in (False, True)]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    sizes = {"num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 48}
    for name, tied in (("tied", True), ("untied", False)):
        save_llama(folder / name, None, vocab_size=VOCAB, tie_word_embeddings=tied, **sizes)
    return folder


def outcomes(world: int, models: Path, cases: list[Case], folder: Path) -> list[dict]:
    """What `cases` give in `world` processes."""
    results = folder / f"{world}.pt"
    mp.spawn(updates.run, (world, models, cases, results), nprocs=world)
    return torch.load(results, weights_only=True)


def differences(got: dict, want: dict) -> list[str]:
    """What differs beyond the tolerance."""
    found = []
    for name, (a, b) in {
        **{name: (got[name], want[name]) for name in ("before", "after")},
        **{
            f"{kind} of {name}": (tensor, want[kind][name])
            for kind in ("gradients", "weights")
            for name, tensor in got.get(kind, {}).items()
        },
    }.items():
        error = float((a - b).abs().max() / b.abs().max().clamp(min=1e-8))
        found += [f"{name} by {error:.1e}"] if not error <= TOLERANCE else []
    for kind in ("gradients", "weights"):
        if kind in got and got[kind].keys() != want[kind].keys():
            found.append(f"{kind} of {sorted(got[kind].keys() ^ want[kind].keys())}")
    for step, (a, b) in enumerate(zip(got["stats"], want["stats"], strict=True)):
        assert a.keys() == b.keys() and len(a) >= 3
        for name in b:
            if not abs(a[name] - b[name]) <= 1e-6 + TOLERANCE * abs(b[name]):
                found.append(f"{name} of step {step}: {a[name]} and {b[name]}")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("world", LAYOUTS)
def test_every_layout_trains_as_one_process_does(world: int, models: Path, tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    truth = dict(zip([c.key for c in CASES], outcomes(1, models, CASES, tmp_path), strict=True))
    cases = [dataclasses.replace(c, layout=layout) for layout in LAYOUTS[world].values() for c in CASES]
    names = [f"{layout}, {c.key}" for layout in LAYOUTS[world] for c in CASES]
    wrong = {}
    for name, case, got in zip(names, cases, outcomes(world, models, cases, tmp_path), strict=True):
        assert ("gradients" in got) != case.layout.distributed_optimizer
        if found := differences(got, truth[case.key]):
            wrong[name] = found
    assert not wrong
