"""Resident memory of a sampler: weights, the cache's budget, and little else."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import save_model

SLACK = 16 << 20  # bytes; activations and logits of a step, tables of the sequences, the allocator's own

# Prints a digest of all responses, preemptions, and the growth of resident memory while the sampler lives.
PROGRAM = """
import gc, hashlib, json, sys, torch
from aligner.models.shape import ModelShape
from aligner.rollout.native import NativeSampler
from aligner.rollout.sampling import Sampling

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

folder, small, cache_bytes = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.set_num_threads(2)
prompts = [[3 + (i * j) % 90 for j in range(60)] for i in range(1, 65)]
sampling = Sampling(max_tokens=64, seed=1)
list(NativeSampler.from_pretrained(small).stream([[5]], sampling))  # what is loaded on first use
gc.collect()
before = resident()
sampler = NativeSampler.from_pretrained(folder)
sampler = NativeSampler(sampler.shape, cache_bytes=cache_bytes)
torch.manual_seed(0)
for tensor in sampler.weights.values():
    tensor.normal_(std=0.1)
peak, found = 0, {}
for response in sampler.stream(prompts, sampling):
    found[response.prompt] = (response.tokens, response.logprobs)
    peak = max(peak, resident())
print(json.dumps({
    "digest": hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest(),
    "preemptions": sampler.engine.counters.preemptions,
    "growth": peak - before,
    "weights": sum(t.nbytes for t in sampler.weights.values()),
    "after": resident() - before,
}))
"""


def measure(*arguments) -> dict:
    done = subprocess.run([sys.executable, "-c", PROGRAM, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_memory_stays_under_weights_and_budget(tmp_path):
    """64 sequences of 124 tokens; what eight of them need is the budget, then more than all of them need."""
    sizes = {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 97}
    folder = save_model(tmp_path / "m", "llama", **sizes, num_hidden_layers=6)
    small = save_model(tmp_path / "s", "llama", vocab_size=97)
    sequence = 128 * 6 * 2 * 8 * 64 * 4  # bytes of cache
    narrow, wide = (measure(Path(folder), small, budget) for budget in (8 * sequence, 70 * sequence))
    print(narrow, wide)
    assert narrow["preemptions"] > 0 == wide["preemptions"]
    assert narrow["digest"] == wide["digest"]  # tokens and log-probabilities
    assert narrow["growth"] < narrow["weights"] + 8 * sequence + SLACK
    assert wide["growth"] > narrow["weights"] + 24 * sequence + SLACK  # so that the bound above says something
    assert wide["after"] < wide["weights"] + SLACK  # the cache goes back to the system
