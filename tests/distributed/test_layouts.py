"""A layout changes nothing but who computes what: every method on every layout against one process."""

import dataclasses
import os
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from aligner.run.distributed import ParallelConfig
from tests.conftest import save_model
from tests.distributed import updates
from tests.distributed.updates import METHODS, VOCAB, Case

TOLERANCE = 1e-5  # relative to the largest entry of a tensor
LAYOUTS = {
    2: [
        ParallelConfig(tensor=2),
        ParallelConfig(tensor=2, sequence=True),
        ParallelConfig(pipeline=2),
        ParallelConfig(pipeline=2, virtual_pipeline=2),
        ParallelConfig(context=2),
        ParallelConfig(),
        ParallelConfig(distributed_optimizer=True),
    ],
    4: [ParallelConfig(tensor=2, pipeline=2), ParallelConfig(tensor=2)],
}
EVERY = [Case(method=m, model=t, lora=x) for m in METHODS for t in ("tied", "untied") for x in (False, True)]
FAMILIES = [Case(method="sft", model=m, lora=x) for m in ("qwen2", "qwen3") for x in (False, True)]
SOME = [Case(method="dpo", model="tied", lora=x) for x in (False, True)]
ALSO = {  # what the layouts above do not show
    2: [
        (ParallelConfig(tensor=2, sequence=True), FAMILIES),
        (ParallelConfig(pipeline=2), FAMILIES),
        (ParallelConfig(tensor=2, sequence=True, recompute="full"), SOME),
        (ParallelConfig(pipeline=2, recompute="selective"), SOME),
    ],
    4: [
        (ParallelConfig(tensor=2, sequence=True, context=2, distributed_optimizer=True), SOME),
        # Every sequence alone: those of three tokens leave a rank with padding only.
        (ParallelConfig(context=4), [dataclasses.replace(c, budget=1, method="sft") for c in SOME]),
    ],
}
FULL = {  # make test-distributed-full
    2: [ParallelConfig(context=2, recompute="full"), ParallelConfig(pipeline=2, virtual_pipeline=2, recompute="full")],
    4: [
        ParallelConfig(tensor=4),
        ParallelConfig(tensor=4, sequence=True),
        ParallelConfig(pipeline=4),
        ParallelConfig(context=4),
        ParallelConfig(distributed_optimizer=True),
        ParallelConfig(tensor=2, context=2, sequence=True),
        ParallelConfig(pipeline=2, context=2),
        ParallelConfig(pipeline=2, virtual_pipeline=2, distributed_optimizer=True),
        ParallelConfig(tensor=2, pipeline=2, virtual_pipeline=2, sequence=True),
        ParallelConfig(tensor=2, pipeline=2, sequence=True, recompute="full"),
    ],
    8: [
        ParallelConfig(tensor=2, pipeline=2, sequence=True, distributed_optimizer=True),
        ParallelConfig(tensor=2, pipeline=2, context=2, sequence=True),
        ParallelConfig(tensor=2, pipeline=2, virtual_pipeline=2, context=2, sequence=True, recompute="selective"),
        ParallelConfig(tensor=4, pipeline=2),
    ],
}


def small_models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    sizes = {"num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 48, "vocab_size": VOCAB}
    save_model(folder / "tied", "llama", tie_word_embeddings=True, **sizes)
    save_model(folder / "untied", "llama", **sizes)
    save_model(folder / "four", "llama", num_key_value_heads=4, **sizes)  # key-value heads for four tensor ranks
    save_model(folder / "qwen2", "qwen2", tie_word_embeddings=True, **sizes)
    save_model(folder / "qwen3", "qwen3", head_dim=16, **sizes)
    return folder


models = pytest.fixture(scope="module")(small_models)


def outcomes(world: int, models: Path, cases: list[Case], folder: Path) -> list:
    """What `cases` give in `world` processes."""
    results = folder / f"{world}.pt"
    mp.start_processes(updates.run, (world, models, cases, results), nprocs=world, start_method="forkserver")
    return torch.load(results, weights_only=True)


def differences(got: dict, want: dict) -> list[str]:
    """What differs beyond the tolerance."""
    pairs = {name: (got[name], want[name]) for name in ("before", "after")}
    for kind in ("gradients", "weights"):
        if kind in got:
            assert got[kind].keys() == want[kind].keys()
            pairs |= {f"{kind} of {name}": (tensor, want[kind][name]) for name, tensor in got[kind].items()}
    errors = {name: float((a - b).abs().max() / b.abs().max().clamp(min=1e-8)) for name, (a, b) in pairs.items()}
    found = [f"{name} by {error:.1e}" for name, error in errors.items() if not error <= TOLERANCE]
    for step, (a, b) in enumerate(zip(got["stats"], want["stats"], strict=True)):
        assert a.keys() == b.keys() and len(a) >= 3
        # Losses are means of terms that cancel: what is far below 1 is rounding.
        wrong = [name for name in b if not abs(a[name] - b[name]) <= 1e-6 + TOLERANCE * abs(b[name])]
        found += [f"{name} of step {step}: {a[name]} and {b[name]}" for name in wrong]
    return found


def check(world: int, work: list[tuple[ParallelConfig, list[Case]]], models: Path, folder: Path) -> None:
    alone = list({case.key: case for _, cases in work for case in cases}.values())
    truth = dict(zip([c.key for c in alone], outcomes(1, models, alone, folder), strict=True))
    cases = [dataclasses.replace(c, layout=layout) for layout, members in work for c in members]
    wrong = {}
    for case, got in zip(cases, outcomes(world, models, cases, folder), strict=True):
        assert ("gradients" in got) != case.layout.distributed_optimizer
        if found := differences(got, truth[case.key]):
            wrong[f"{case.key}, {case.layout}"] = found
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize("world", LAYOUTS)
def test_every_layout_trains_as_one_process_does(world: int, models: Path, tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    check(world, [(layout, EVERY) for layout in LAYOUTS[world]] + ALSO[world], models, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("distributed_optimizer", [False, True])
def test_all_ranks_stop_or_skip_together(distributed_optimizer: bool, models: Path, tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    layout = ParallelConfig(distributed_optimizer=distributed_optimizer)
    case = Case(method="sft", model="tied", layout=layout, work="non-finite")
    stop, skip = outcomes(2, models, [case, dataclasses.replace(case, non_finite="skip")], tmp_path)
    assert "not finite" in stop["stopped"] and skip["skipped"] == 1 and not skip["stopped"]
    for result in (stop, skip):
        assert result["unchanged"] and result["after"] == 0


@pytest.mark.full
@pytest.mark.parametrize("world", FULL)
def test_larger_layouts_train_as_one_process_does(world: int, models: Path, tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    fits = {layout: [c for c in EVERY + FAMILIES if layout.tensor <= 2] for layout in FULL[world]}
    four = [Case(method=m, model="four", lora=x) for m in METHODS for x in (False, True)]
    check(world, [(layout, cases or four) for layout, cases in fits.items()], models, tmp_path)
