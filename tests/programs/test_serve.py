"""`python -m aligner.serve reward`: many callers at once, against transformers; a run that asks it; how it ends."""

import os
import random
import signal
import subprocess
import sys
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from aligner import serve
from aligner.data.tokenizer import digest, load_tokenizer
from aligner.serving.remote import Patience, RemoteReward
from tests.programs import every
from tests.programs.runs import metrics, run, samples

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
CALLERS, REQUESTS = 8, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return every.prepare(tmp_path_factory.mktemp("serve"))


class Served:
    """A service in processes of its own."""

    def __init__(self, model: Path, *options: str, processes: int = 1):
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [
            sys.executable,
            "-W",
            "ignore",
            *(launcher if processes > 1 else []),
            "-m",
            "aligner.serve",
            "reward",
        ]
        command += ["--model", str(model), "--serve.port", "0", "--threads", "1", *options]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.lines = []
        for line in self.process.stdout:
            self.lines.append(line)
            if line.startswith("ready: "):
                self.address = line.split()[1]
                return
        raise AssertionError(self.process.stderr.read())

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str, str]:
        """(status, what it printed, errors) once it has ended by this signal."""
        self.process.send_signal(number)
        out, errors = self.process.communicate(timeout=60)
        return self.process.returncode, out, errors


@pytest.fixture
def served(folder: Path):
    services = []

    def start(*options: str, model: str = "reward", processes: int = 1) -> Served:
        services.append(Served(folder / model, *options, processes=processes))
        return services[-1]

    yield start
    for service in services:
        if service.process.poll() is None:
            service.process.kill()
            service.process.communicate()


def test_two_ranks_tell_many_callers_what_transformers_says_and_stop_together(folder: Path, served):
    """Requests of many sizes that are answered together are neither lost nor crossed; the model spans two ranks."""
    service = served("--parallel.tensor", "2", "--serve.request-tokens", "96", processes=2)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "reward" / "policy").double().eval()
    tokenizer = digest(load_tokenizer(folder / "reward" / "policy"))

    @torch.no_grad()
    def caller(number: int) -> float:
        draw, worst = random.Random(number), 0.0
        reward = RemoteReward(service.address, [1.0])
        reward.check(tokenizer)
        for _ in range(REQUESTS):
            sequences = [
                [draw.randrange(3, model.config.vocab_size) for _ in range(draw.randint(1, 12))]
                for _ in range(draw.randint(1, 10))
            ]
            given = reward.score(sequences)
            wanted = [float(model(torch.tensor([tokens])).logits[0, 0]) for tokens in sequences]
            worst = max(worst, *(abs(a - b) for a, b in zip(given, wanted, strict=True)))
        return worst

    with ThreadPoolExecutor(CALLERS) as pool:
        assert max(pool.map(caller, range(CALLERS))) < 1e-5
    # One rank is told to stop, and all do.
    workers = subprocess.run(["pgrep", "-P", str(service.process.pid)], capture_output=True, text=True, check=True)
    os.kill(int(workers.stdout.split()[1]), signal.SIGTERM)
    out, errors = service.process.communicate(timeout=60)
    assert (service.process.returncode, out) == (0, "stopped: nothing was left to answer\n"), errors


def ppo(folder: Path) -> tuple[dict, dict]:
    """Options of a run of PPO, and those of its rewards by name."""
    program = next(p for p in every.PROGRAMS if p.name == "ppo")
    command = program.command(folder, 3, rank=0)
    return command, {"reward.function": command.pop("reward.function")}


def test_a_run_asks_a_served_model_as_it_asks_its_own(folder: Path, served, tmp_path):
    command, function = ppo(folder)
    service = served()
    weights = function | {"reward.weights": (0.5, 2.0)}
    own = run("ppo", tmp_path / "own", command | weights | {"reward.model": folder / "reward"})
    asked = run("ppo", tmp_path / "asked", command | weights | {"reward.url": service.address})
    for mine, theirs in zip(metrics(asked), metrics(own), strict=True):
        assert mine.keys() == theirs.keys()
        assert all(mine[name] == pytest.approx(theirs[name], rel=1e-6, abs=1e-6) for name in mine)
    assert [row["response"] for row in samples(asked)] == [row["response"] for row in samples(own)]
    assert len({row["reward"] for row in samples(asked)}) > 20


def test_a_service_that_dies_in_the_middle_of_a_run_and_comes_back(folder: Path, served, tmp_path, monkeypatch):
    command, _ = ppo(folder)
    service = served()
    port = service.address.rpartition(":")[2]
    whole = run("ppo", tmp_path / "whole", command | {"reward.url": service.address})
    score, calls, back = RemoteReward.score, [], []

    def score_and_kill(self, sequences):
        calls.append(len(sequences))
        if len(calls) == 3:
            service.process.kill()
            service.process.wait()
            again = threading.Timer(1.0, lambda: back.append(served("--serve.port", port)))
            again.start()
        return score(self, sequences)

    monkeypatch.setattr(RemoteReward, "score", score_and_kill)
    done = run("ppo", tmp_path / "done", command | {"reward.url": service.address})
    assert len(calls) > 3 and len(back) == 1
    assert metrics(done) == metrics(whole)


def test_status_says_what_is_served(served, folder: Path, tmp_path, capsys):
    secret = tmp_path / "secret"
    secret.write_text("correct horse battery staple")
    service = served("--serve.token-file", str(secret), "--serve.metrics-port", "0")
    assert serve.main(["status", service.address, "--token-file", str(secret)]) == 0
    said = capsys.readouterr().out
    assert "kind: reward" in said and "attributes: 1" in said and "draining: false" in said
    assert serve.main(["status", service.address]) == 1
    assert "the token is missing or wrong. (UNAUTHENTICATED)" in capsys.readouterr().err
    (metrics_at,) = (line.split()[1] for line in service.lines if line.startswith("metrics: "))
    with urllib.request.urlopen(metrics_at, timeout=10) as answer:
        said += answer.read().decode()
    assert 'aligner_requests_total{code="OK",endpoint="status_v1"} 1.0' in said
    assert "correct horse" not in "".join(service.lines) + said
    service.end()
    assert serve.main(["status", service.address, "--token-file", str(secret)]) == 1
    assert "(UNAVAILABLE)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "got 'nothing', expected `aligner.serve reward` or `status`"),
        (["critics"], "got 'critics', expected"),
        (["status"], "got no address"),
        (["reward", "--model", "{folder}/model"], "is no reward model; train one"),
        (
            ["reward", "--serve.host", "0.0.0.0"],
            "serve.host is 0.0.0.0, where others can call; give --serve.token-file",
        ),
        (["reward", "--serve.tls-cert", "x.pem"], "come together"),
        (["reward", "--serve.token-file", "/nowhere"], "--serve.token-file '/nowhere' cannot be read"),
    ],
)
def test_mistakes(folder: Path, argv: list[str], words: str):
    with pytest.raises(ValueError, match=words):
        serve.main([word.format(folder=folder) for word in argv])


def test_a_run_whose_service_is_not_there(folder: Path, tmp_path, monkeypatch):
    command, _ = ppo(folder)
    monkeypatch.setattr(
        RemoteReward.__init__,
        "__kwdefaults__",
        {**RemoteReward.__init__.__kwdefaults__, "patience": Patience(start_s=0.2)},
    )
    with pytest.raises(ValueError, match="reward model at 127.0.0.1:9 has not answered since"):
        run("ppo", tmp_path / "run", command | {"reward.url": "127.0.0.1:9"})
