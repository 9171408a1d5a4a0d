"""An engine in a process of its own, asked by JSON: what it answers, whom it refuses, and how it ends."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from multiprocessing import connection as connections
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from aligner.checkpoint.huggingface import Weights
from aligner.models.shape import ModelShape
from aligner.rollout import wire
from aligner.rollout.sampling import Sampling
from aligner.rollout.wire import EngineSampler, TrtllmConfig, last_words, start_engine
from tests.conftest import save_model
from tests.refit.layouts import Model
from tests.refit.test_extension import Trainer
from tests.rollout.engines import ROOT, engine_python

PROMPTS = [[5, 6, 7], [9], [11, 3, 8, 2]]


class Setup:
    """An engine of two ranks that a trainer of two gives weights. folder: of the model."""

    def __init__(self, folder: Path, python: Path, log: Path):
        self.folder, self.log = folder, log
        self.shape = shape = ModelShape.from_folder(folder)
        read = Weights(folder, shape.tensors())
        self.full = {name: read.window(name, [0] * len(size), size) for name, size in shape.tensors().items()}
        names = ("num_layers", "hidden", "ffn", "heads", "kv_heads", "head_dim", "vocab", "tied")
        self.trainer = Trainer(Model(**{n: getattr(shape, n) for n in names}), 2, 1)
        config = TrtllmConfig(python=str(python), tensor=2, max_batch=4, drain_s=5.0)
        self.engine = start_engine(config, folder, shape.context, log, ())
        self.version = -1
        self.known = self.engine.wait_until_ready(60)

    def step(self, scale: float = 1.0) -> None:
        """The next version: the model's weights, their norms scaled."""
        self.version += 1
        full = {name: t * scale if "norm" in name else t for name, t in self.full.items()}
        self.trainer.publish(full, self.version)
        self.engine.pull(self.version)


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine")
    made = Setup(save_model(folder / "m", "llama", vocab_size=51), engine_python(folder), folder / "engine.log")
    made.engine.attach(asdict(made.shape), made.trainer.told)
    made.step()
    yield made
    made.trainer.close()
    made.engine._process.kill()


def truth(setup: Setup, tokens: list[int]) -> torch.Tensor:
    """Log-probabilities of each next token by transformers."""
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(setup.folder).float()(torch.tensor([tokens])).logits[0]
    return torch.log_softmax(logits, 1)


def test_responses_come_with_their_log_probabilities_and_version(setup):
    assert setup.known["tensor"] == 2 and setup.known["engine"] == "1.4.0" and setup.known["model"] == str(setup.folder)
    how = Sampling(max_tokens=6, stop=(2, 13), seed=4)
    rollout = setup.engine.generate(PROMPTS, how, 2)
    assert rollout.weights_version == setup.version and len(rollout.finished_B) == 6
    starts = rollout.cu_seqlens.tolist()
    for begin, end in zip(starts[:-1], starts[1:], strict=True):
        tokens = rollout.tokens_N[begin:end].tolist()
        nats = truth(setup, tokens)[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
        mask = rollout.action_mask_N[begin:end][1:]
        assert (rollout.sampler_logprobs_N[begin:end][1:] - nats)[mask].abs().max() < 1e-4
    assert torch.equal(setup.engine.generate(PROMPTS, how, 2).tokens_N, rollout.tokens_N)


def test_sleep_loses_the_weights_and_a_pull_brings_them(setup):
    how = Sampling(temperature=0, max_tokens=5)
    before = setup.engine.generate(PROMPTS, how)
    setup.engine.sleep()
    setup.engine.sleep()  # twice is once
    with pytest.raises(RuntimeError, match="its weights were released; refit all of them"):
        setup.engine.generate(PROMPTS, how)
    setup.step()
    assert torch.equal(setup.engine.generate(PROMPTS, how).tokens_N, before.tokens_N)
    setup.step(scale=3.0)
    after = setup.engine.generate(PROMPTS, how)
    assert not torch.equal(after.sampler_logprobs_N, before.sampler_logprobs_N)
    setup.step()


def test_what_is_wrong_is_told_as_what_it_is(setup):
    for prompts, words in (([[]], "prompt 0 is empty"), ([[1] * setup.shape.context], "over the model's context")):
        with pytest.raises(ValueError, match=words):
            next(setup.engine.stream(prompts, Sampling()))
    with pytest.raises(ValueError, match=f"to version {setup.version}, but the weights are of version"):
        setup.engine.pull(setup.version)
    with pytest.raises(ValueError, match="sample at temperature 1"):
        setup.engine.generate([[1]], Sampling(temperature=0.5, top_p=0.5, max_tokens=1))
    with pytest.raises(ValueError, match="asked for 'explode'"):
        setup.engine._ask("explode")
    stranger = EngineSampler(setup.engine._address, b"0" * 32, 64)
    with pytest.raises(ValueError, match="has another key; give both the same"):
        stranger.describe()
    for garbage in (b"", b"x" * 10_000, b"\xff" * 300):
        with connections.Client(setup.engine._address) as raw:
            raw.send_bytes(garbage)
    other = EngineSampler(setup.engine._address, setup.engine._key, 64)
    with pytest.raises(RuntimeError, match="expected -1; somebody else gives this engine weights"):
        other.generate([[1]], Sampling(max_tokens=1))
    assert len(setup.engine.generate([[1]], Sampling(max_tokens=1)).finished_B) == 1


def test_a_stranger_that_says_nothing_is_not_waited_for_long(setup, monkeypatch):
    ours, theirs = connections.Pipe()
    monkeypatch.setattr(wire, "STRANGER_S", 1)
    began = time.monotonic()
    wire._answer(ours, None, b"0" * 32, {})
    assert 0.9 < time.monotonic() - began < 5.0
    assert theirs.recv_bytes()  # the challenge


def test_another_model_or_a_shorter_context_is_refused(setup):
    wire.check_model(setup.known, setup.shape)
    for change, words in (
        (
            {"vocab": 52, "norm_eps": 1e-3},
            "another model than the trainer .vocab 51 for 52, norm_eps .* for 0.001.; start",
        ),
        ({"rope": replace(setup.shape.rope, theta=5.0)}, "another model than the trainer .rope .*theta"),
        ({"context": 10_000}, f"takes {setup.shape.context} tokens, the model 10000; start it with --context 10000"),
    ):
        with pytest.raises(ValueError, match=words):
            wire.check_model(setup.known, replace(setup.shape, **change))


def test_a_stream_that_is_closed_is_cancelled(setup):
    """Or a refit would wait for it until its deadline."""
    stream = setup.engine.stream(PROMPTS, Sampling(max_tokens=50), 20)
    next(stream)
    stream.close()
    began = time.monotonic()
    setup.step()
    assert time.monotonic() - began < 4.0


def test_an_engine_at_an_address_and_its_end(setup, tmp_path):
    elsewhere = EngineSampler(str(tmp_path / "nobody"), b"0" * 32, 64)
    with pytest.raises(RuntimeError, match="does not answer .* is it still running"):
        elsewhere.describe()
    with pytest.raises(TimeoutError, match="had 0.3 s to start"):
        elsewhere.wait_until_ready(0.3)
    second = Setup(setup.folder, engine_python(tmp_path), tmp_path / "log")
    second.engine.attach(asdict(second.shape), second.trainer.told)
    second.step()
    failed = []

    def sample() -> None:
        try:
            second.engine.generate(PROMPTS, Sampling(max_tokens=60), 50)
        except RuntimeError as error:
            failed.append(str(error))

    thread = threading.Thread(target=sample)
    thread.start()
    time.sleep(0.5)
    second.engine._process.kill()
    thread.join(20)
    second.trainer.close()
    assert failed and "the engine has ended with status -9; its last words: TensorRT-LLM 1.4.0 answers" in failed[0]


def test_a_python_without_tensorrt_llm(setup, tmp_path):
    config = TrtllmConfig(python=str(engine_python(tmp_path, without=True)))
    engine = start_engine(config, setup.folder, 64, tmp_path / "log", ())
    with pytest.raises(ValueError, match="ended with status 2; its last words: error: TensorRT-LLM cannot be imported"):
        engine.wait_until_ready(60)
    assert last_words(str(tmp_path / "log")).startswith("error: TensorRT-LLM cannot")


def test_a_trainer_that_is_killed_takes_its_engine_along(setup, tmp_path):
    python = engine_python(tmp_path)
    trainer = f"""
import sys, time
from pathlib import Path
from aligner.rollout.wire import TrtllmConfig, start_engine
engine = start_engine(TrtllmConfig(python={str(python)!r}), Path({str(setup.folder)!r}), 64, Path("log"), ())
print(engine._process.pid, engine.wait_until_ready(60)["engine"], flush=True)
time.sleep(100)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", trainer]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    engine = psutil.Process(int(process.stdout.readline().split()[0]))
    process.send_signal(signal.SIGKILL)
    process.wait()
    psutil.wait_procs([engine], 20)
    assert not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE


def test_the_environment_of_an_engine(setup, tmp_path, monkeypatch):
    """Nothing of torchrun's, whose ranks are the trainer's; its own GPUs; reload on one stream."""
    for name in ("TORCHELASTIC_RUN_ID", "PYTHONPATH", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "x")
    for name, value in {"RANK": "3", "MASTER_ADDR": "node1", "CUDA_VISIBLE_DEVICES": "0,1,2,3", "KEPT": "1"}.items():
        monkeypatch.setenv(name, value)
    (python := tmp_path / "python").write_text("#!/bin/sh\nenv\n")
    python.chmod(0o755)
    engine = start_engine(TrtllmConfig(python=str(python)), setup.folder, 64, tmp_path / "log", ("2", "3"))
    assert engine._process.wait(20) == 0
    given = dict(line.split("=", 1) for line in (tmp_path / "log").read_text().splitlines())
    told = {"RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "PYTHONPATH", "OMP_NUM_THREADS"}
    assert not told & given.keys()
    wanted = {"CUDA_VISIBLE_DEVICES": "2,3", "KEPT": "1", "TRT_LLM_DISABLE_LOAD_WEIGHTS_IN_PARALLEL": "True"}
    assert (wanted | {"TLLM_RAY_FORCE_LOCAL_CLUSTER": "1"}).items() <= given.items()


def test_options():
    for wrong in ({"tensor": 0}, {"kv_fraction": 1.0}, {"url": ("a:1",)}, {"node_gb_s": 0.0}):
        with pytest.raises(ValueError):
            TrtllmConfig(**wrong)
    assert json.dumps(asdict(TrtllmConfig()))
