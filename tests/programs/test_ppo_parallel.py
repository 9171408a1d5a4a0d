"""PPO in several processes: the same run as in one, on real reviews; what is wrong is told once and stops all."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import save_llama

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
SMALL = {
    "eval-prompts": 3,
    "threads": 1,
    "batch.sequences": 8,
    "batch.minibatch-sequences": 4,
    "sampling.max-tokens": 6,
    "steps": 2,
    "critic.layers": 2,
}
COMPARED = ("reward/mean", "kl/mean", "loss/policy", "loss/value", "grad_norm/policy", "entropy/mean")


def arguments(output: Path, **options) -> list[str]:
    given = SMALL | {"output": output} | {name.replace("_", "-"): value for name, value in options.items()}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def launch(processes: int, words: list[str]) -> subprocess.CompletedProcess:
    torchrun = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    launcher = torchrun if processes > 1 else [sys.executable, "-W", "ignore"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MASTER_PORT": str(free_port())}
    if processes > 1:
        launcher += ["--master-port", environment["MASTER_PORT"]]
    command = [*launcher, "-m", "aligner.ppo", *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def check_same_run(run: Path, reference: Path, steps: int) -> None:
    rows, wanted = metrics(run), metrics(reference)
    assert [row["step"] for row in rows] == list(range(steps + 1))
    for row, want in zip(rows[1:], wanted[1:], strict=False):
        for name in COMPARED:
            assert row[name] == pytest.approx(want[name], rel=1e-4, abs=1e-5), (row["step"], name)
    responses = [[json.loads(line)["response"] for line in (r / "samples.jsonl").open()][:19] for r in (run, reference)]
    assert responses[0] == responses[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory, smollm2: Path) -> Path:
    """SmolLM2 itself has 9 heads, which two tensor ranks cannot share: a network of 4, with its tokenizer."""
    folder = tmp_path_factory.mktemp("model") / "m"
    return save_llama(folder, smollm2, num_hidden_layers=4, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory) -> Path:
    """Two steps on the default task, movie reviews rated by the sentiment classifier, in one process."""
    run = tmp_path_factory.mktemp("runs") / "alone"
    done = launch(1, arguments(run, model=model))
    assert done.returncode == 0, done.stderr
    return run


def test_tensor_and_pipeline_parallel_then_resumed_in_two_replicas(alone: Path, model: Path, tmp_path):
    run = tmp_path / "run"
    done = launch(4, arguments(run, model=model) + ["--parallel.tensor", "2", "--parallel.pipeline", "2"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tuned model: ") == done.stdout.count("step 2/2") == 1
    check_same_run(run, alone, steps=2)
    # The step is told apart by the learning rate's schedule and the sampling seed, and must be the third on both.
    for processes, layout in ((1, []), (2, ["--parallel.offload"])):
        source = alone if processes == 1 else run
        third = launch(processes, arguments(source, model=model, steps=3) + ["--resume", *layout])
        assert third.returncode == 0, third.stderr
    check_same_run(run, alone, steps=3)


@pytest.mark.parametrize("large", [False, pytest.param(True, marks=pytest.mark.full)])
def test_two_replicas_that_share_an_optimizer(model: Path, smollm2: Path, tmp_path, large: bool):
    run = tmp_path / "run"
    done = launch(2, arguments(run, model=smollm2 if large else model) + ["--parallel.distributed-optimizer"])
    assert done.returncode == 0, done.stderr
    rows = metrics(run)
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(row["sampler_gap/max"] < 1e-4 for row in rows[1:])
    assert rows[1]["kl/mean"] == 0 != rows[2]["kl/mean"]
    from transformers import AutoModelForCausalLM

    assert (AutoModelForCausalLM.from_pretrained(run / "policy").num_parameters() > 1e8) == large


@pytest.mark.parametrize(
    ("processes", "options", "message"),
    [
        (
            2,
            ["--parallel.tensor", "4"],
            r"2 processes cannot hold copies of 4 tensor x 1 context x 1 pipeline = 4 ranks",
        ),
        pytest.param(
            3,
            ["--parallel.tensor", "3"],
            r"parallel.tensor is 3, .* the 4 attention heads .* expected one of 1, 2\.",
            marks=pytest.mark.full,
        ),
        pytest.param(
            3,
            ["--parallel.pipeline", "3"],
            r"pipeline 3 makes 3 stages, .* the 4 layers of the model; expected .* 1, 2, 4",
            marks=pytest.mark.full,
        ),
        (2, ["--reward.function", "tests.programs.rewards:raises"], r"rewards:raises raised KeyError"),
    ],
)
def test_mistakes_are_told_once_before_anything_is_loaded(processes, options, message, model: Path, tmp_path):
    done = launch(processes, arguments(tmp_path / "run", model=model) + options)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ") and re.search(message, line)]
    assert len(errors) == (processes if "--reward.function" in options else 1), done.stderr


def test_a_signal_to_one_rank_stops_all_after_the_same_step(model: Path, tmp_path):
    run = tmp_path / "run"
    words = arguments(run, model=model, steps=6) + ["--reward.function", "tests.programs.rewards:InterruptInStep3"]
    done = launch(2, [*words, "--parallel.tensor", "2"])
    assert "exitcode  : 130" in done.stderr and done.returncode != 0, done.stderr
    assert [row["step"] for row in metrics(run)] == [0, 1, 2, 3]
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == ["step-3"]


def test_a_rank_that_dies_stops_the_others_and_leaves_a_checkpoint(model: Path, tmp_path):
    run = tmp_path / "run"
    words = arguments(run, model=model, steps=500, save_every=1) + [
        "--reward.function",
        "tests.programs.rewards:letters",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    first, second = (
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "aligner.ppo", *words],
            cwd=ROOT,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(2)
    )
    try:
        while not (run / "checkpoints" / "step-2").is_dir():
            assert first.poll() is second.poll() is None
            time.sleep(0.1)
        second.send_signal(signal.SIGKILL)
        _, stderr = first.communicate(timeout=60)
        assert first.returncode == 1
        assert re.search(rf"error: rank 1 of 2 \(host .*, pid {second.pid}\) stopped", stderr)
    finally:
        first.kill()
        second.kill()
    whole = [folder for folder in (run / "checkpoints").glob("step-*")]
    last = max(int(folder.name.removeprefix("step-")) for folder in whole)
    words[words.index("--steps") + 1] = str(last + 1)
    resumed = launch(1, [*words, "--resume"])
    assert resumed.returncode == 0, resumed.stderr
    assert metrics(run)[-1]["step"] == last + 1
