"""`python -m aligner.serve reward`: many callers at once, against transformers; a run that asks it; how it ends."""

import os
import random
import signal
import subprocess
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from aligner import serve
from aligner.checkpoint.default_model import DEFAULT_MODEL
from aligner.checkpoint.model_folder import model_folder
from aligner.data.tokenizer import digest, load_tokenizer
from aligner.serving import remote
from aligner.serving.grpc_transport import Connection
from aligner.serving.remote import Patience, RemoteReward
from aligner.serving.remote_critic import RemoteCritic
from aligner.serving.service import REWARD, STATUS, Sequences, ServiceError, ServiceStatus
from tests.programs import every
from tests.programs.runs import metrics, run, samples
from tests.programs.services import Launched, Service, free_port
from tests.programs.test_every_program import OF_THE_LAYOUT

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
CALLERS, REQUESTS = 8, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return every.prepare(tmp_path_factory.mktemp("serve"))


@pytest.fixture
def served(folder: Path, tmp_path):
    """Starts a service of a kind with options; of several processes by torchrun."""
    services = []

    def start(kind: str, options: dict | None = None, processes: int = 1) -> Service | Launched:
        options = {"model": folder / ("reward" if kind == "reward" else "model")} | (options or {})
        log = tmp_path / f"service-{len(services)}.log"
        services.append(Launched(kind, options, processes) if processes > 1 else Service(kind, options, log))
        return services[-1]

    yield start
    for service in services:
        service.end()


def test_two_ranks_tell_many_callers_what_transformers_says_and_stop_together(folder: Path, served):
    """Requests of many sizes that are answered together are neither lost nor crossed; the model spans two ranks."""
    service = served("reward", {"parallel.tensor": 2, "serve.request-tokens": 96}, processes=2)
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
    rows = [{"prompt": "w1 w2", "completion": "w3"}, {"text": "w3 w1"}]
    wide, narrow = RemoteReward(service.address, [1.0]), RemoteReward(service.address, [1.0], dtype="bfloat16")
    wide.check()
    narrow.check(tokenizer)
    ids = AutoTokenizer.from_pretrained(folder / "reward" / "policy")("w1 w2 w3")["input_ids"]
    end = model.config.eos_token_id
    given = wide.score_rows(rows)
    assert given == wide.score([[*ids, end], [ids[2], ids[0], end]]) and len(set(given)) == 2
    assert narrow.score_rows(rows) == torch.tensor(given).bfloat16().tolist() != given
    with pytest.raises(ValueError, match="row 1: got the keys"):
        wide.score_rows([rows[0], {"prompt": "w1"}])
    # One rank is told to stop, and all do.
    workers = subprocess.run(["pgrep", "-P", str(service.process.pid)], capture_output=True, text=True, check=True)
    os.kill(int(workers.stdout.split()[1]), signal.SIGTERM)
    out, errors = service.process.communicate(timeout=60)
    assert (service.process.returncode, out) == (0, "stopped: nothing was left to answer\n"), errors


def test_sixteen_callers_and_eight_thousand_requests(folder: Path, served):
    """Of many sizes, some of them bad: nothing is lost or crossed, and the queue stays within its bound."""
    service = served("reward", {"serve.request-tokens": 256, "serve.queue": 12})
    model = AutoModelForSequenceClassification.from_pretrained(folder / "reward" / "policy").double().eval()
    tokenizer, draw = digest(load_tokenizer(folder / "reward" / "policy")), random.Random(0)
    known = [[draw.randrange(3, model.config.vocab_size) for _ in range(draw.randint(1, 12))] for _ in range(200)]
    with torch.no_grad():
        wanted = [float(model(torch.tensor([tokens])).logits[0, 0]) for tokens in known]
    queues = []

    def caller(number: int) -> float:
        draw, worst = random.Random(number), 0.0
        reward, connection = RemoteReward(service.address, [1.0]), Connection(service.address)
        reward.check(tokenizer)
        for i in range(500):
            picked = draw.choices(range(200), k=draw.randint(1, 10))
            given = reward.score([known[p] for p in picked])
            worst = max(worst, *(abs(a - wanted[p]) for a, p in zip(given, picked, strict=True)))
            if i % 25 == 0:
                queues.append(ServiceStatus.of(connection.call(STATUS, {}, 60)).queue)
                with pytest.raises(ServiceError, match="expected 0 to"):
                    connection.call(REWARD, Sequences.pack([[5, 10**6]]).arrays(), 60)
        return worst

    with ThreadPoolExecutor(16) as pool:
        assert max(pool.map(caller, range(16))) < 1e-5
    assert len(queues) == 320 and 0 < max(queues) <= 12


def ppo(folder: Path) -> tuple[dict, dict]:
    """Options of a run of PPO, and those of its rewards by name."""
    program = next(p for p in every.PROGRAMS if p.name == "ppo")
    command = program.command(folder, 3, rank=0)
    return command, {"reward.function": command.pop("reward.function")}


def test_a_run_asks_a_served_model_as_it_asks_its_own(folder: Path, served, tmp_path):
    command, function = ppo(folder)
    service = served("reward", rounding(command))
    weights = function | {"reward.weights": (0.5, 2.0)}
    own = run("ppo", tmp_path / "own", command | weights | {"reward.model": folder / "reward"})
    asked = run("ppo", tmp_path / "asked", command | weights | {"reward.url": service.address})
    assert metrics(asked) == metrics(own) and samples(asked) == samples(own)
    assert len({row["reward"] for row in samples(asked)}) > 20


def test_a_service_that_dies_in_the_middle_of_a_run_and_comes_back(folder: Path, served, tmp_path, monkeypatch):
    command, _ = ppo(folder)
    service = served("reward")
    whole = run("ppo", tmp_path / "whole", command | {"reward.url": service.address})
    score, calls, back = RemoteReward.score, [], []

    def score_and_kill(self, sequences):
        calls.append(len(sequences))
        if len(calls) == 3:
            service.kill()
            again = threading.Timer(1.0, lambda: back.append(served("reward", {"serve.port": service.port})))
            again.start()
        return score(self, sequences)

    monkeypatch.setattr(RemoteReward, "score", score_and_kill)
    done = run("ppo", tmp_path / "done", command | {"reward.url": service.address})
    assert len(calls) > 3 and len(back) == 1
    assert metrics(done) == metrics(whole)


def complete(folder: Path) -> dict:
    command, function = ppo(folder)
    return command | function


def rounding(command: dict) -> dict:
    """The same for the service: the size of micro-batches decides about it."""
    return {name: command[name] for name in ["batch.tokens-per-micro-batch"]}


def critic_options(command: dict, output: Path) -> dict:
    critic = {name: value for name, value in command.items() if name.startswith("critic.")}
    return critic | rounding(command) | {"output": output}


def test_a_served_critic_is_the_run_s_own_bit_by_bit(folder: Path, served, tmp_path):
    command, function = ppo(folder)
    command |= function | {"reward.weights": (0.5, 2.0), "reward.model": folder / "reward"}
    own = run("ppo", tmp_path / "own", command)
    service = served("critic", critic_options(command, tmp_path / "critic"))
    asked = run("ppo", tmp_path / "asked", command | {"critic.url": service.address})
    assert metrics(asked) == metrics(own) and samples(asked) == samples(own)
    assert all(row["loss/value"] > 0 < row["reward/std"] for row in metrics(own) if row["step"])
    assert service.end() == [0] and service.words().endswith("\nstopped: nothing was left to answer\n")
    assert [f.name for f in (tmp_path / "critic" / "checkpoints").iterdir()] == ["step-3"]
    assert not list((tmp_path / "asked" / "critic-steps").iterdir())


def test_the_same_over_pytriton(folder: Path, served, tmp_path):
    command, function = ppo(folder)
    command |= function | {"reward.weights": (0.5, 2.0)}
    own = run("ppo", tmp_path / "own", command | {"reward.model": folder / "reward"})
    secret = tmp_path / "secret"
    secret.write_text("correct horse battery staple")
    shared = {"serve.transport": "pytriton", "serve.token-file": secret}
    critic = served("critic", critic_options(command, tmp_path / "critic") | shared)
    reward = served("reward", shared | rounding(command))
    addresses = {"critic.url": critic.address, "reward.url": reward.address}
    addresses |= {"critic.token-file": secret, "reward.token-file": secret}
    asked = run("ppo", tmp_path / "asked", command | addresses)
    assert metrics(asked) == metrics(own) and samples(asked) == samples(own)
    assert serve.main(["status", critic.address, "--token-file", str(secret)]) == 0
    assert critic.end() == reward.end() == [0]
    assert "correct horse" not in critic.words() + reward.words()
    assert [f.name for f in (tmp_path / "critic" / "checkpoints").iterdir()] == ["step-3"]


def test_critic_and_reward_model_on_layouts_of_their_own(folder: Path, served, tmp_path):
    """Two services, the critic's of two tensor ranks, and a run of two data-parallel ones."""
    command, function = ppo(folder)
    command |= function | {"reward.weights": (0.5, 2.0)}
    own = run("ppo", tmp_path / "own", command | {"reward.model": folder / "reward"})
    reward = served("reward")
    critic = served("critic", critic_options(command, tmp_path / "critic") | {"parallel.tensor": 2}, processes=2)
    asked = tmp_path / "asked"
    command |= {"critic.url": critic.address, "reward.url": reward.address}
    mp.start_processes(every.run_one, (2, tmp_path, "ppo", asked, command), nprocs=2, start_method="forkserver")
    for mine, theirs in zip(metrics(asked), metrics(own), strict=True):
        names = [name for name in theirs if not name.startswith(OF_THE_LAYOUT)]
        assert mine.keys() == theirs.keys() and len(names) > 4
        assert {n: mine[n] for n in names} == pytest.approx({n: theirs[n] for n in names}, rel=1e-6, abs=1e-6)
    assert [row["response"] for row in samples(asked)] == [row["response"] for row in samples(own)]
    mine, theirs = (load_file(done / "policy" / "model.safetensors") for done in (asked, own))
    assert all((tensor - mine[name]).abs().max() < 1e-6 for name, tensor in theirs.items())


@pytest.mark.parametrize(("swap", "transport"), [(False, "grpc"), (True, "pytriton")])
def test_critic_and_reward_model_in_the_same_processes(folder: Path, served, tmp_path, swap: bool, transport: str):
    command, function = ppo(folder)
    command |= function | {"reward.weights": (0.5, 2.0)}
    own = run("ppo", tmp_path / "own", command | {"reward.model": folder / "reward"})
    port = free_port()
    options = critic_options(command, tmp_path / "critic") | {"reward-model": folder / "reward", "reward-port": port}
    both = served(
        "both", options | {"serve.metrics-port": 0, "serve.transport": transport} | ({"swap": True} if swap else {})
    )
    asked = run(
        "ppo",
        tmp_path / "asked",
        command | {"critic.url": both.address, "reward.url": f"{both.prefix}127.0.0.1:{port}"},
    )
    assert metrics(asked) == metrics(own) and samples(asked) == samples(own)
    (turns,) = (line for line in scraped(both).splitlines() if line.startswith("aligner_swap_seconds_count"))
    assert float(turns.split()[1]) >= (6 if swap else 0) and (swap or turns.endswith(" 0.0"))
    assert both.end() == [0] and both.words().count("\nready: ") == 2
    assert [f.name for f in (tmp_path / "critic" / "checkpoints").iterdir()] == ["step-3"]


def test_answers_of_sixteen_bits_and_a_training_that_is_too_large(folder: Path, served, tmp_path, monkeypatch):
    command, _ = ppo(folder)
    command |= {"steps": 2, "eval-every": 0}
    own = run("ppo", tmp_path / "own", command | {"reward.model": folder / "reward"})
    reward = served("reward", rounding(command))
    critic = served("critic", critic_options(command, tmp_path / "critic"))
    addresses = {"reward.url": reward.address, "critic.url": critic.address}
    whole = RemoteCritic._begin
    with monkeypatch.context() as patched:
        patched.setattr(RemoteCritic, "_begin", lambda *given: replace(whole(*given), request_bytes=100))
        said = refusal(tmp_path / "large", command | addresses, critic)
    assert "a training has " in said and "takes 100 in a request; train on fewer" in said
    shorter = {"reward.answer-dtype": "bfloat16", "critic.answer-dtype": "bfloat16"}
    asked = run("ppo", tmp_path / "asked", command | addresses | shorter)
    given = [torch.tensor([row["reward"] for row in samples(done)]) for done in (own, asked)]
    first = len(given[0]) // 2  # later ones are of other weights
    assert torch.equal(given[1][:first], given[0][:first].bfloat16().float()) and not torch.equal(*given)
    mine, theirs = metrics(asked)[-1], metrics(own)[-1]
    assert mine["values/mean"] != theirs["values/mean"]
    assert mine["values/mean"] == pytest.approx(theirs["values/mean"], rel=1e-2)


def test_the_default_run_with_both_remote(served, tmp_path):
    """SmolLM2 on IMDb, with all options as they are; the reward model is untrained."""
    given = model_folder(DEFAULT_MODEL)
    judge = AutoModelForSequenceClassification.from_pretrained(given, num_labels=1, num_hidden_layers=2)
    judge.save_pretrained(tmp_path / "judge")
    AutoTokenizer.from_pretrained(given).save_pretrained(tmp_path / "judge")
    shared = {"model": given, "threads": 0}
    critic = served("critic", shared | {"output": tmp_path / "critic"})
    reward = served("reward", {"model": tmp_path / "judge", "threads": 0})
    options = {"critic.url": critic.address, "reward.url": reward.address, "steps": 1}
    done = run("ppo", tmp_path / "run", options)
    first, last = metrics(done)[0], metrics(done)[-1]
    assert last["step"] == 1 and last["reward/std"] > 0 and last["loss/value"] > 0 and last["grad_norm/value"] > 0
    assert first["eval/reward/mean"] != 0
    assert critic.end() == [0] == reward.end()
    assert [f.name for f in (tmp_path / "critic" / "checkpoints").iterdir()] == ["step-1"]


def refusal(tmp_path: Path, command: dict, service: Service) -> str:
    with pytest.raises(ValueError) as error:
        run("ppo", tmp_path, command | {"critic.url": service.address})
    return str(error.value)


def test_a_run_and_a_critic_of_different_steps(folder: Path, served, tmp_path):
    """Both stop; the critic is a step ahead, and they go on from the newest step that both have saved."""
    command = complete(folder)
    shared = critic_options(command, tmp_path / "critic") | {"resume": True}
    every_step = command | {"save-every": 1, "steps": 3}
    again = every_step | {"resume": True}
    first = served("critic", shared)
    whole = run("ppo", tmp_path / "run", every_step | {"critic.url": first.address})
    wanted = metrics(whole), policy(whole)
    newest = tmp_path / "run" / "checkpoints" / "step-3"
    newest.rename(newest.with_name("gone"))  # a run that was killed after its critic had saved
    said = refusal(tmp_path / "run", again, first)
    assert "this run is at step 2 and the critic at" in said and "at step 3; give both --resume --resume-step 2" in said
    assert "belongs to another run, at its step 3" in refusal(tmp_path / "new", every_step, first)
    other = refusal(tmp_path / "run", again | {"critic.optimizer.lr": 0.5}, first)
    assert "--critic.optimizer.lr is 0.5 here and 0.001 at the critic's service" in other
    first.end()
    second = served("critic", shared | {"resume-step": 2})
    resumed = run("ppo", tmp_path / "run", again | {"critic.url": second.address, "resume-step": 2})
    assert (metrics(resumed), policy(resumed)) == wanted
    left = sorted(f.name for f in (tmp_path / "critic" / "checkpoints").iterdir())
    assert left == ["left-3", "step-1", "step-2", "step-3"]
    # A critic that lost everything can be given only the trainings that no save has acknowledged.
    second.end()
    third = served("critic", critic_options(command, tmp_path / "other"))
    said = refusal(tmp_path / "run", again | {"steps": 4}, third)
    assert "this run is at step 3" in said and "at step 0; start both anew" in said


def policy(done: Path) -> bytes:
    return (done / "policy" / "model.safetensors").read_bytes()


def test_a_critic_in_the_run_and_one_that_is_served_are_not_mixed_up(folder: Path, served, tmp_path):
    command = complete(folder)
    run("ppo", tmp_path / "own", command)
    service = served("critic", critic_options(command, tmp_path / "critic"))
    said = refusal(tmp_path / "own", command | {"resume": True, "steps": 4}, service)
    assert "has a critic of its own; leave --critic.url out" in said
    reward = served("reward")
    assert "serves a reward, expected a critic" in refusal(tmp_path / "wrong", command, reward)
    run("ppo", tmp_path / "asked", command | {"critic.url": service.address})
    with pytest.raises(ValueError, match="holds another model or optimizer"):
        run("ppo", tmp_path / "asked", command | {"resume": True, "steps": 4})


def scraped(service: Service) -> str:
    """Its metrics."""
    (metrics_at,) = (line.split()[1] for line in service.words().splitlines() if line.startswith("metrics: "))
    with urllib.request.urlopen(metrics_at, timeout=10) as answer:
        return answer.read().decode()


def test_status_says_what_is_served(served, folder: Path, tmp_path, capsys):
    secret = tmp_path / "secret"
    secret.write_text("correct horse battery staple")
    service = served("reward", {"serve.token-file": secret, "serve.metrics-port": 0})
    assert serve.main(["status", service.address, "--token-file", str(secret)]) == 0
    said = capsys.readouterr().out
    assert "kind: reward" in said and "attributes: 1" in said and "draining: false" in said
    assert serve.main(["status", service.address]) == 1
    assert "the token is missing or wrong. (UNAUTHENTICATED)" in capsys.readouterr().err
    said += scraped(service)
    assert 'aligner_requests_total{code="OK",endpoint="status_v1"} 1.0' in said
    assert "correct horse" not in service.words() + said
    service.end()
    assert serve.main(["status", service.address, "--token-file", str(secret)]) == 1
    assert "(UNAVAILABLE)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "got 'nothing', expected `aligner.serve reward`, `critic`, `both` or `status`"),
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
    monkeypatch.setattr(remote, "Patience", partial(Patience, start_s=0.2))
    with pytest.raises(ValueError, match="reward model at 127.0.0.1:9 has not answered since"):
        run("ppo", tmp_path / "run", command | {"reward.url": "127.0.0.1:9"})
