"""What holds for every training program: layouts, resume, LoRA and all weights, --dry-run. every.py has the table."""

import os
import signal
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file

from aligner import spin
from tests.programs import every
from tests.programs.every import NAMES, PROGRAMS, STEPS, Program
from tests.programs.runs import metrics, run, samples, start

pytestmark = pytest.mark.slow

LAYOUTS = {"tensor": {"parallel.tensor": 2}, "data": {}}
OF_THE_LAYOUT = ("padding/", "sampler_gap/")  # what a layout may change: shares of padding, and rounding alone
every_program = pytest.mark.parametrize("program", PROGRAMS, ids=NAMES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return every.prepare(tmp_path_factory.mktemp("every"))


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Path]:
    """Every program in one process, all weights trained."""
    return {p.name: run(p.name, folder / f"alone-{p.name}", p.command(folder, STEPS, rank=0)) for p in PROGRAMS}


@pytest.fixture(scope="module")
def together(folder: Path) -> Path:
    """Every program in two processes, in each layout."""
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        mp.start_processes(every.run, (2, folder, LAYOUTS), nprocs=2, start_method="forkserver")
    finally:
        os.environ["OMP_NUM_THREADS"] = threads or "2"
    return folder


@pytest.fixture(scope="module")
def straight(folder: Path) -> dict[str, Path]:
    """Every program in one process by LoRA, without a break."""
    return {
        p.name: run(p.name, folder / f"straight-{p.name}", p.command(folder, 6, rank=4) | WITH.get(p.name, {}))
        for p in PROGRAMS
    }


WITH = {  # what a resume must not forget
    "ppo": {"kl-target": 0.01, "kl-horizon": 20},
    "grpo": {"dynamic-sampling": 3, "reward.function": "tests.programs.rewards:has_a_seven"},
    "reinforce": {"optimizer.warmup-steps": 2, "optimizer.decay-steps": 5},
}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def check_same(one: Path, other: Path) -> None:
    """The same run, bit for bit."""
    assert metrics(one) == metrics(other)
    mine, theirs = weights(one / "policy"), weights(other / "policy")
    assert mine.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
    assert (one / "samples.jsonl").exists() == (other / "samples.jsonl").exists()
    if (one / "samples.jsonl").exists():
        assert samples(one) == samples(other)


@pytest.mark.parametrize("layout", LAYOUTS)
@every_program
def test_two_processes_train_as_one_does(program: Program, layout: str, alone, together):
    two, one = together / f"{layout}-{program.name}", alone[program.name]
    rows, wanted = metrics(two), metrics(one)
    assert [row["step"] for row in rows] == list(range(STEPS + 1)) == [row["step"] for row in wanted]
    for row, want in zip(rows, wanted, strict=True):
        assert row.keys() == want.keys() and len(row) > (0 if row["step"] == 0 else 4)
        for name in (name for name in want if not name.startswith(OF_THE_LAYOUT)):
            assert row[name] == pytest.approx(want[name], rel=1e-4, abs=1e-5), (row["step"], name)
    if program.online:
        said = [[row["response"] for row in samples(done)] for done in (two, one)]
        assert said[0] == said[1] and len(set(said[0])) > 8
    mine, theirs = weights(two / "policy"), weights(one / "policy")
    assert all(torch.allclose(tensor, theirs[name], rtol=1e-3, atol=1e-4) for name, tensor in mine.items())


@every_program
def test_all_weights_or_adapters_alone_are_trained(program: Program, folder: Path, alone, straight):
    before = weights(folder / "model")
    full, lora = (weights(done[program.name] / "policy") for done in (alone, straight))
    moved = {name: not torch.equal(tensor, full[name]) for name, tensor in before.items()}
    assert all(moved.values()), [name for name, has in moved.items() if not has]
    for name, tensor in before.items():
        adapted = "_proj" in name
        assert torch.equal(tensor, lora[name]) != adapted, name


@every_program
def test_a_run_that_stops_goes_on_as_if_it_had_not(program: Program, folder: Path, straight, tmp_path):
    whole = program.command(folder, 6, rank=4) | WITH.get(program.name, {})
    done = run(program.name, tmp_path / "run", whole | program.steps(2))
    assert len(metrics(done)) == 3
    run(program.name, done, whole | {"resume": True})
    check_same(done, straight[program.name])
    rows = metrics(done)
    if program.name == "ppo":  # what the rest hangs on was there
        assert len({row["kl_coef"] for row in rows[1:]}) == 6
    if program.name == "grpo":
        assert len({row["groups/batches_tried"] for row in rows[1:]}) > 1


def test_spin_goes_on_within_an_iteration(folder: Path, straight, tmp_path, monkeypatch):
    """Its reference has moved twice, and the opponent is no longer the policy."""
    (program,) = (p for p in PROGRAMS if p.name == "spin")
    calls, pairs = [], spin.pairs

    def stopping(*arguments):
        calls.append(arguments)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return pairs(*arguments)

    monkeypatch.setattr(spin, "pairs", stopping)
    command = program.command(folder, 6, rank=4)
    assert start("spin", tmp_path / "run", command) == 130
    assert [row.get("iteration") for row in metrics(tmp_path / "run")] == [None, 0, 0, 1, 1, 2]
    run("spin", tmp_path / "run", command | {"resume": True})
    assert len(calls) == 6
    check_same(tmp_path / "run", straight["spin"])


@every_program
def test_dry_run_says_who_would_hold_what(program: Program, folder: Path, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    command = program.command(folder, 2, rank=4) | {"parallel.tensor": 2, "dry-run": True}
    assert start(program.name, tmp_path / "run", command) == 0
    printed = capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    assert "2 processes: 2 tensor x" in printed
    for network in {"ppo": ["policy", "critic"], "reward_model": ["reward model"]}.get(program.name, ["policy"]):
        assert network in printed
