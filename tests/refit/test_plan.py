"""The refit plan: every destination row once, from the right source, for any pair of layouts."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from aligner.models.low_rank import LowRank
from aligner.models.weights import entry, manifest
from aligner.refit.plan import compile_plan
from aligner.rollout.native import DTYPES, NativeSampler
from aligner.rollout.sampling import Sampling
from tests.conftest import save_llama
from tests.models.test_policy import make_policy


@pytest.mark.parametrize("tied", [True, False])
def test_refit_from_the_policy_equals_loading_the_folder(tmp_path, tied: bool):
    folder = save_llama(tmp_path / "m", None, vocab_size=311, tie_word_embeddings=tied)
    policy, loaded = make_policy(folder), NativeSampler.from_pretrained(folder)
    sampler = NativeSampler(policy.shape)
    storage = {name: t.data_ptr() for name, t in sampler.weights.items()}
    plan = compile_plan(policy.manifest(), sampler.manifest())
    sampler.refit(plan, policy, version=7)
    assert sampler.weights_version == 7
    assert all(torch.equal(sampler.weights[n], t) for n, t in loaded.weights.items())
    assert storage == {name: t.data_ptr() for name, t in sampler.weights.items()}  # in place
    assert plan.digest == compile_plan(policy.manifest(), sampler.manifest()).digest
    written = plan.execute(policy, sampler.weights)
    assert written == sum(t.numel() * 4 for t in sampler.weights.values())


def test_refit_merges_the_adapters(tmp_path):
    folder = save_llama(tmp_path / "m", None, vocab_size=311)
    policy = make_policy(folder)
    with torch.no_grad():
        for i, adapter in enumerate(policy.network.adapters.values()):
            adapter.b.normal_(std=0.05, generator=torch.Generator().manual_seed(i))
    sampler = NativeSampler(policy.shape)
    sampler.refit(compile_plan(policy.manifest(), sampler.manifest()), policy, version=1)
    rollout = sampler.generate([[5, 6], [7]], Sampling(max_tokens=10, seed=1), n=2)
    gap = policy.infer(rollout)[0] - rollout.sampler_logprobs_N
    moved = policy.infer_reference(rollout) - rollout.sampler_logprobs_N
    assert gap.abs().max() < 5e-5 < 1e-2 < moved.abs().max()


class Parameters:
    """A source from a list of entries."""

    def __init__(self, model: dict, entries: list[dict], tensors: dict[str, torch.Tensor]):
        self.manifest = lambda: manifest(model, entries)
        self.weights = lambda names: [tensors[name] for name in names]


def test_plan_between_different_fusions_moves_every_row():
    full = {"x": torch.arange(24.0).view(12, 2), "y": torch.arange(100.0, 110.0).view(5, 2)}
    model = {name: t.shape for name, t in full.items()}
    held = {
        "a": torch.cat([full["y"][3:], full["x"][:7]]),
        "b": torch.cat([full["x"][7:], full["y"][:3]]),
    }
    left = [
        entry("a", held["a"], [("y", 3, 2), ("x", 0, 7)]),
        entry("b", held["b"], [("x", 7, 5), ("y", 0, 3)]),
    ]
    target = {"p": torch.zeros(9, 2, dtype=torch.bfloat16), "q": torch.zeros(8, 2)}
    right = [
        entry("p", target["p"], [("x", 4, 6), ("y", 1, 3)]),
        entry("q", target["q"], [("y", 4, 1), ("x", 0, 4), ("x", 10, 2), ("y", 0, 1)]),
    ]
    source, described = Parameters(model, left, held), manifest(model, right)
    plan = compile_plan(source.manifest(), described)
    plan.preflight(source, described, target)
    plan.execute(source, target)
    assert torch.equal(target["p"].float(), torch.cat([full["x"][4:10], full["y"][1:4]]).bfloat16().float())
    assert torch.equal(target["q"], torch.cat([full["y"][4:], full["x"][:4], full["x"][10:], full["y"][:1]]))


def test_sources_may_overlap_in_both_directions():
    x = torch.arange(30.0).view(6, 5)
    cuts = {"a": (0, 0, 4, 3), "b": (2, 1, 4, 4), "c": (0, 2, 3, 3), "d": (4, 0, 2, 2)}  # row, column, rows, columns
    held = {name: x[r : r + m, c : c + n].clone() for name, (r, c, m, n) in cuts.items()}
    entries = [
        {
            "name": name,
            "shape": [m, n],
            "dtype": "float32",
            "segments": [{"tensor": "x", "start": [r, c], "at": [0, 0], "size": [m, n]}],
        }
        for name, (r, c, m, n) in cuts.items()
    ]
    source, into = Parameters({"x": x.shape}, entries, held), {"w": torch.full((6, 5), torch.nan)}
    plan = compile_plan(source.manifest(), manifest({"x": x.shape}, [entry("w", into["w"], [("x", 0, 6)])]))
    assert sum(c.size[0] * c.size[1] for c in plan.copies) == 30
    plan.execute(source, into)
    assert torch.equal(into["w"], x)


def test_plan_refuses_gaps_overlaps_and_other_models():
    x, model = torch.zeros(6, 2), {"x": [6, 2]}
    whole = entry("w", x, [("x", 0, 6)])

    def plan(source: list[dict], destination: list[dict]):
        return compile_plan(manifest(model, source), manifest(model, destination))

    with pytest.raises(ValueError, match=r"refit: 4..6 x 0..2 of x, for w, has no source"):
        plan([entry("a", x[:4], [("x", 0, 4)])], [whole])
    with pytest.raises(ValueError, match="2 tensors differ between the two models, the first is x.*same model"):
        compile_plan(manifest({"x": [6, 3], "y": [1]}, [whole]), manifest(model, [whole]))
    with pytest.raises(ValueError, match="segments fill 4 rows, expected 6"):
        entry("w", x, [("x", 0, 4)])
    for at, message in ((2, "2..4 x 0..2 of w is placed twice"), (4, "3..4 x 0..2 of w is placed by no segment")):
        torn = entry("w", x, [("x", 0, 3), ("x", 3, 3)])
        torn["segments"][1] |= {"at": [at, 0], "size": [2, 2]}
        with pytest.raises(ValueError, match=message):
            plan([whole], [torn])


def test_export_is_the_inverse_of_import(tmp_path: Path):
    from aligner.checkpoint.huggingface import Weights

    folder = save_llama(tmp_path / "m", None, vocab_size=311, tie_word_embeddings=False)
    policy = make_policy(folder)
    read = Weights(folder, policy.shape.tensors())
    exported = dict(policy.hugging_face())
    assert exported.keys() == policy.shape.tensors().keys()
    assert all(torch.equal(t, read(name)) for name, t in exported.items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_are_merged_tile_by_tile(dtype: str):
    g, rows, columns, rank = torch.Generator().manual_seed(0), 5003, 301, 7
    w, b, a = (torch.randn(s, generator=g) for s in ((rows, columns), (rows, rank), (rank, columns)))
    truth = w.double() + 0.3 * b.double() @ a.double()
    model, low = {"x": (4100, columns), "y": (903, columns)}, LowRank(w, b, a, 0.3)
    source = Parameters(model, [entry("w", w, [("y", 0, 500), ("x", 0, 4100), ("y", 500, 403)])], {"w": low})
    into = {
        "p": torch.full((4100, columns), torch.nan, dtype=DTYPES[dtype]),
        "q": torch.full((903, columns), torch.nan, dtype=DTYPES[dtype]),
    }
    plan = compile_plan(
        source.manifest(),
        manifest(model, [entry("p", into["p"], [("x", 0, 4100)]), entry("q", into["q"], [("y", 0, 903)])]),
    )
    plan.execute(source, into)
    got = torch.cat([into["q"][:500], into["p"], into["q"][500:]])
    if dtype == "float32":
        assert ((got - truth).abs() <= 1e-6 * (1 + truth.abs())).all()
    else:
        assert ((got.double() - truth).abs() <= 2**-8 * truth.abs() + 1e-6).all()
    with pytest.raises(ValueError, match=r"adapter of \[5003, 7\] x \[7, 300\], expected factors of \[5003, 301\]"):
        bad = Parameters(model, source.manifest()["tensors"], {"w": LowRank(w, b, a[:, :300], 0.3)})
        plan.preflight(bad, manifest(model, list(plan.destinations.values())), into)


MEASURE = """
import pathlib, torch
from aligner.models.low_rank import LowRank
from aligner.models.weights import entry, manifest
from aligner.refit.plan import compile_plan
torch.set_num_threads(2)

class Source:
    def __init__(self, rows):
        w = torch.ones(rows, 1024)
        self.low = LowRank(w, torch.ones(rows, 16), torch.ones(16, 1024), 0.5)
        self.entries = [entry("w", w, [("x", 0, rows)])]
        self.manifest = lambda: manifest({"x": w.shape}, self.entries)
    def weights(self, names):
        return [self.low for _ in names]

def refit(rows):
    source, into = Source(rows), {"w": torch.ones(rows, 1024)}
    plan = compile_plan(source.manifest(), source.manifest())
    return lambda: plan.execute(source, into)

def status(field):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

refit(2048)()
call = refit(65536)
pathlib.Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
call()
print(status("VmHWM") - before)
"""


def test_merging_holds_one_tile_more():
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    extra = int(done.stdout)
    assert extra < 4 << 20, extra  # the weight has 256 MiB, a tile 1 MiB
