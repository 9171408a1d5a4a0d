"""Runs whose responses come from an engine in another process, which pulls the weights: a stand-in of TensorRT-LLM."""

import subprocess
from pathlib import Path

import pytest

from aligner.models.shape import ModelShape
from tests.conftest import save_llama
from tests.programs import runs
from tests.programs.test_ppo_parallel import arguments, launch, metrics
from tests.rollout.engines import engine_python

GAP = 1e-3  # nats between what sampler and trainer give a token; after a step with other weights it is 0.1 and more


@pytest.mark.slow
def test_ppo_on_the_default_task(tmp_path):
    """SmolLM2, movie reviews, two steps; the engine sleeps while the trainer trains, and pulls three times."""
    run = tmp_path / "run"
    fewer = {"eval-prompts": 8, "batch.sequences": 16, "batch.minibatch-sequences": 8}
    options = {"steps": 2, **fewer, "sampler": "trtllm", "trtllm.python": engine_python(tmp_path)}
    done = launch(1, runs.words({"threads": 2, **options, "output": run}))
    assert done.returncode == 0, done.stderr
    rows = metrics(run)
    steps = [row for row in rows if "sampler_gap/max" in row]
    assert [row["step"] for row in steps] == [1, 2]
    assert all(row["sampler_gap/max"] < GAP for row in steps)
    assert steps[1]["kl/mean"] > 0.1  # the second step's responses came from other weights than the first one's
    assert "TensorRT-LLM 1.4.0 answers at" in (run / "engine-0.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("far", [pytest.param(False, marks=pytest.mark.full), True])
def test_a_trainer_of_four_ranks_and_an_engine_of_two(smollm2: Path, tmp_path, far: bool):
    """Real Megatron-core at TP2 x PP2 over gloo. far: the engine runs on another machine, and outlives the trainer."""
    model = save_llama(tmp_path / "m", smollm2, num_hidden_layers=4, tie_word_embeddings=True)
    words = [*arguments(tmp_path / "run", model=model), "--parallel.tensor", "2", "--parallel.pipeline", "2"]
    python = engine_python(tmp_path, host="elsewhere" if far else "")
    if far:
        (key := tmp_path / "key").write_text("0123456789abcdef" * 2)
        context = ModelShape.from_folder(model).context
        given = {"model": model, "context": context, "tensor": 2, "listen": tmp_path / "socket", "key-file": key}
        engine = subprocess.Popen([python, "-m", "aligner.trtllm", *runs.words(given)], stdin=subprocess.DEVNULL)
        words += ["--trtllm.key-file", str(key), "--trtllm.url", str(tmp_path / "socket"), "--trtllm.start-s", "60"]
    else:
        words += ["--trtllm.python", str(python), "--trtllm.tensor", "2"]
    done = launch(4, [*words, "--sampler", "trtllm"])
    assert done.returncode == 0, done.stderr
    steps = [row for row in metrics(tmp_path / "run") if "sampler_gap/max" in row]
    assert len(steps) == 2 and all(row["sampler_gap/max"] < GAP for row in steps)
    assert steps[1]["kl/mean"] != 0
    if far:
        assert engine.poll() is None
        engine.kill()
        engine.wait()
