"""Runs whose responses come from an engine in another process, which pulls the weights: a stand-in of TensorRT-LLM."""

from pathlib import Path

import pytest

from tests.conftest import save_llama
from tests.programs import runs
from tests.programs.test_ppo_parallel import arguments, launch, metrics
from tests.rollout.engines import engine_python

GAP = 1e-3  # nats between what sampler and trainer give a token; after a step with other weights it is 0.1 and more


@pytest.mark.slow
def test_ppo_on_the_default_task(tmp_path):
    """SmolLM2, movie reviews, two steps; the engine sleeps while the trainer trains, and pulls three times."""
    run = tmp_path / "run"
    options = {"steps": 2, "eval-prompts": 8, "sampler": "trtllm", "trtllm.python": engine_python(tmp_path)}
    done = launch(1, runs.words({"threads": 2, **options, "output": run}))
    assert done.returncode == 0, done.stderr
    rows = metrics(run)
    steps = [row for row in rows if "sampler_gap/max" in row]
    assert [row["step"] for row in steps] == [1, 2]
    assert all(row["sampler_gap/max"] < GAP for row in steps)
    assert steps[1]["kl/mean"] > 0.1  # the second step's responses came from other weights than the first one's
    assert "TensorRT-LLM 1.4.0 answers at" in (run / "engine-0.log").read_text()


@pytest.mark.slow
def test_a_trainer_of_four_ranks_and_an_engine_of_two(smollm2: Path, tmp_path):
    """Real Megatron-core at TP2 x PP2 over gloo; with LoRA, whose product is merged on the way."""
    model = save_llama(tmp_path / "m", smollm2, num_hidden_layers=4, tie_word_embeddings=True)
    layout = ["--parallel.tensor", "2", "--parallel.pipeline", "2"]
    engine = ["--sampler", "trtllm", "--trtllm.python", str(engine_python(tmp_path)), "--trtllm.tensor", "2"]
    done = launch(4, arguments(tmp_path / "run", model=model) + layout + engine)
    assert done.returncode == 0, done.stderr
    steps = [row for row in metrics(tmp_path / "run") if "sampler_gap/max" in row]
    assert len(steps) == 2 and all(row["sampler_gap/max"] < GAP for row in steps)
