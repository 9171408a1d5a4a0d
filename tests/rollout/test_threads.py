"""The number of threads changes no token and no log-probability, whatever else is in the batch."""

from pathlib import Path

import pytest
import torch
from aligner._engine import max_threads

from aligner.rollout.native import NativeSampler
from aligner.rollout.sampling import Sampling
from tests.conftest import save_model


@pytest.fixture
def wide(tmp_path) -> Path:
    """Large enough that a product of one row is worth a second thread."""
    sizes = {"hidden_size": 256, "intermediate_size": 330, "num_attention_heads": 8, "vocab_size": 2011}
    return save_model(tmp_path / "m", "qwen3", head_dim=40, **sizes)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_threads_and_batch_change_no_bit(wide: Path, threads, dtype: str):
    sampler = NativeSampler.from_pretrained(wide, dtype=dtype)
    prompts = [[3 + 7 * i % 2000 for i in range(n)] for n in (1, 90, 17, 4)]
    sampling = Sampling(max_tokens=24, seed=3, top_p=0.9, repetition_penalty=1.1)
    found = {}
    for count in (1, 2, 3):
        threads(count)
        assert max_threads() == count  # the engine's own OpenMP follows torch
        together = {(r.prompt, r.sample): r for r in sampler.stream(prompts, sampling, n=3)}
        alone = [next(sampler.stream([prompt], sampling)) for prompt in prompts]
        found[count] = together, alone
        for i, response in enumerate(alone):
            same = together[i, 0]
            assert response.tokens == same.tokens and response.logprobs == same.logprobs
    assert found[1] == found[2] == found[3]
