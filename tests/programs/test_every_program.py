"""What holds for every training program: layouts, resume, LoRA and all weights, --dry-run. every.py has the table."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file

from aligner import spin
from tests.programs import every
from tests.programs.every import PROGRAMS, STEPS, VARIATIONS, Program
from tests.programs.runs import metrics, run, samples, start

pytestmark = pytest.mark.slow

LAYOUTS = {  # options and LoRA's rank
    "tensor": ({"parallel.tensor": 2}, 0),
    "tensor-lora": ({"parallel.tensor": 2}, 4),
    "data": ({}, 0),
}
MORE_LAYOUTS = {
    "pipeline": ({"parallel.pipeline": 2}, 0),
    "context": ({"parallel.context": 2}, 4),
    "sequence": ({"parallel.tensor": 2, "parallel.sequence": True, "parallel.recompute": "full"}, 4),
    "distributed-optimizer": ({"parallel.distributed-optimizer": True}, 0),
}
MORE = STEPS + 2  # steps of the runs in one process
OF_THE_LAYOUT = ("padding/", "sampler_gap/")  # what a layout may change: shares of padding, and rounding alone
every_program = pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.title)
every_variation = pytest.mark.parametrize("program", VARIATIONS, ids=lambda program: program.title)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return every.prepare(tmp_path_factory.mktemp("every"))


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[tuple[str, int], Path]:
    """Every program in one process, without a break, by LoRA's rank, 0 for all weights; variations with all weights."""
    wanted = [(p, rank) for p in PROGRAMS for rank in (0, 4)] + [(p, 0) for p in VARIATIONS]
    names = {(p.title, rank): f"alone-{p.title}-{rank}" for p, rank in wanted}
    return {
        (p.title, rank): run(p.name, folder / name, p.command(folder, MORE, rank=rank, run=name))
        for (p, rank), name in zip(wanted, names.values(), strict=True)
    }


@pytest.fixture(scope="module")
def together(folder: Path) -> Path:
    """Every program in two processes, in each layout."""
    return in_two_processes(folder, LAYOUTS)


def in_two_processes(folder: Path, layouts: dict) -> Path:
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        mp.start_processes(every.run, (2, folder, layouts), nprocs=2, start_method="forkserver")
    finally:
        os.environ["OMP_NUM_THREADS"] = threads or "2"
    return folder


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


def check_close(rows: list[dict], wanted: list[dict]) -> None:
    for row, want in zip(rows, wanted, strict=True):
        assert row.keys() == want.keys() and len(row) > (1 if row["step"] == 0 else 4)
        for name in (name for name in want if not name.startswith(OF_THE_LAYOUT)):
            assert row[name] == pytest.approx(want[name], rel=1e-4, abs=1e-5), (row["step"], name)


@pytest.mark.parametrize("layout", LAYOUTS)
@every_program
def test_two_processes_train_as_one_does(program: Program, layout: str, alone, together):
    check_two(program, together / f"{layout}-{program.title}", alone[program.title, LAYOUTS[layout][1]])


def check_two(program: Program, two: Path, one: Path) -> None:
    """A run in two processes and one in one."""
    assert [row["step"] for row in metrics(two)] == list(range(STEPS + 1))
    check_close(metrics(two), metrics(one)[: STEPS + 1])
    if program.online:
        said = [[row["response"] for row in samples(done) if row["step"] <= STEPS] for done in (two, one)]
        assert said[0] == said[1] and len(set(said[0])) > 8


@pytest.fixture(scope="module")
def more(folder: Path) -> Path:
    return in_two_processes(folder, MORE_LAYOUTS)


MORE_RUNS = [  # variations are trained with all weights
    pytest.param(program, layout, rank, id=f"{program.title}-{layout}")
    for layout, (_, rank) in MORE_LAYOUTS.items()
    for program in (PROGRAMS if rank else [*PROGRAMS, *VARIATIONS])
]


@pytest.mark.full
@pytest.mark.parametrize(("program", "layout", "rank"), MORE_RUNS)
def test_more_layouts(program: Program, layout: str, rank: int, alone, more):
    check_two(program, more / f"{layout}-{program.title}", alone[program.title, rank])


@every_program
def test_a_run_of_two_tensor_ranks_goes_on_in_one_process(program: Program, folder: Path, alone, together, tmp_path):
    shutil.copytree(together / f"tensor-lora-{program.name}", tmp_path / "run")
    done = run(program.name, tmp_path / "run", program.command(folder, MORE, rank=4) | {"resume": True})
    assert [row["step"] for row in metrics(done)] == list(range(MORE + 1))
    check_close(metrics(done), metrics(alone[program.name, 4]))
    mine, theirs = (weights(run / "policy") for run in (done, alone[program.name, 4]))
    assert all(torch.allclose(tensor, theirs[name], rtol=1e-3, atol=1e-4) for name, tensor in mine.items())


@every_program
def test_all_weights_or_adapters_alone_are_trained(program: Program, folder: Path, alone):
    before = weights(folder / "model")
    full, lora = (weights(alone[program.name, rank] / "policy") for rank in (0, 4))
    moved = {name: not torch.equal(tensor, full[name]) for name, tensor in before.items()}
    assert all(moved.values()), [name for name, has in moved.items() if not has]
    for name, tensor in before.items():
        adapted = "_proj" in name
        assert torch.equal(tensor, lora[name]) != adapted, name


def check_resumed(program: Program, folder: Path, rank: int, whole: Path, place: Path) -> None:
    command = program.command(folder, MORE, rank=rank, run=place.name)
    done = run(program.name, place, command | program.steps(2))
    assert len(metrics(done)) == 3
    run(program.name, done, command | {"resume": True})
    check_same(done, whole)


@every_program
def test_a_run_that_stops_goes_on_as_if_it_had_not(program: Program, folder: Path, alone, tmp_path):
    check_resumed(program, folder, 4, alone[program.title, 4], tmp_path / "run")


@every_variation
def test_options_are_not_forgotten_in_a_resumed_run(program: Program, folder: Path, alone, tmp_path):
    check_resumed(program, folder, 0, alone[program.title, 0], folder / f"resumed-{program.title}")


@pytest.mark.parametrize("layout", [name for name, (_, rank) in LAYOUTS.items() if not rank])
@every_variation
def test_options_mean_the_same_in_two_processes(program: Program, layout: str, folder: Path, alone, together):
    check_two(program, together / f"{layout}-{program.title}", alone[program.title, 0])


def test_the_variations_do_something(folder: Path, alone):
    """What they are there for was seen in the runs that are compared."""

    def values(title: str, name: str) -> list[float]:
        return [row[name] for row in metrics(alone[title, 0])[1:]]

    assert len(set(values("ppo-controller", "kl_coef"))) == MORE
    assert len(set(values("grpo-dapo", "groups/batches_tried"))) > 1
    judged, plain = (metrics(alone[title, 0])[0]["eval/reward/mean"] for title in ("ppo-judged", "ppo"))
    assert abs(judged - plain) > 0.01
    assert (folder / "alone-dpo-cached-0.npz").exists()
    for program in VARIATIONS:
        plain = [p for p in PROGRAMS if p.name == program.name and p.kind == program.kind]
        for same in plain:
            one, other = (weights(alone[p.title, 0] / "policy") for p in (program, same))
            changed = program.title != "sft-answers"
            assert changed == any(not torch.equal(tensor, other[name]) for name, tensor in one.items()), program.title


@pytest.mark.parametrize("rank", [0, 4])
def test_spin_goes_on_within_an_iteration(folder: Path, alone, tmp_path, monkeypatch, rank: int):
    """Its reference has moved twice, and the opponent is no longer the policy."""
    (program,) = (p for p in PROGRAMS if p.name == "spin")
    calls, pairs = [], spin.pairs

    def stopping(*arguments):
        calls.append(arguments)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return pairs(*arguments)

    monkeypatch.setattr(spin, "pairs", stopping)
    command = program.command(folder, MORE, rank=rank)
    assert start("spin", tmp_path / "run", command) == 130
    assert [row.get("iteration") for row in metrics(tmp_path / "run")] == [None, 0, 0, 1, 1, 2]
    run("spin", tmp_path / "run", command | {"resume": True})
    assert len(calls) == 6
    check_same(tmp_path / "run", alone["spin", rank])


@every_program
def test_dry_run_says_who_would_hold_what(program: Program, folder: Path, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    command = program.command(folder, 2, rank=4) | {"parallel.tensor": 2, "dry-run": True}
    assert start(program.name, tmp_path / "run", command) == 0
    printed = capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    assert "2 processes: 2 tensor x" in printed
    networks = {"ppo": ["policy", "critic"], "reward_model": ["reward model"], "distill": ["policy", "teacher"]}
    for network in networks.get(program.name, ["policy"]):
        assert network in printed
