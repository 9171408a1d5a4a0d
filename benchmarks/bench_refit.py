"""Refit of SmolLM2-135M into samplers on the CPU: `python benchmarks/bench_refit.py`.

The trainer's layout (Megatron's) goes into the embedded sampler's through `sampler.refit`: preflight, copy, read back
and verify, commit; `copy` is the copy alone. `refit-engine-tpN` goes from shared memory into N tensor ranks of the
tests' stand-in for TensorRT-LLM through `RefitExtension.refit`, from the call to the last rank's answer; publishing is
not timed. A rank is a thread here, and gets its share of --threads, at least one: of three ranks on two cores two share
one. SmolLM2's 3 key-value heads do not go onto two ranks, so that those have a model of its sizes with 8 heads and 4.

A round times every subject of one destination once; a row is the median of the rounds. `bytes` is what the copy itself
must move: the parameters read once and written once; `contiguous-copy` moves as many in one piece with torch. Engines
come last, with a copy of their own: once their threads exist, OpenMP's sleep between regions and adapters take longer.
"""

import argparse
import csv
import datetime
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from harness import COLUMNS, RESULTS, commit, machine

from aligner.checkpoint.default_model import default_model
from aligner.models.low_rank import LowRank
from aligner.models.shape import ModelShape
from aligner.models.weights import manifest, megatron_entry
from aligner.refit import execute
from aligner.refit.plan import compile_plan
from aligner.refit.shared import SharedWeights
from aligner.rollout.native import NativeSampler

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.refit.standin import Engine, Worker  # noqa: E402

MODEL, EVEN_MODEL = "SmolLM2-135M", "SmolLM2-135M with 8 heads and 4 key-value heads"
DEADLINE_S = 60.0
RANK, PPO_STEP_S = 16, 10.0  # of the default run's adapters; seconds of one of its steps (docs/ppo.md)


class Trainer:
    """Parameters in Megatron's layout, random; every linear layer under an adapter if `adapted`."""

    def __init__(self, shape: ModelShape, adapted: bool):
        q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        sizes = {"embedding.word_embeddings.weight": (shape.vocab, shape.hidden)}
        for i in range(shape.num_layers):
            at = f"decoder.layers.{i}."
            sizes |= {
                at + "input_layernorm.weight": (shape.hidden,),
                at + "self_attention.linear_qkv.weight": (q + 2 * kv, shape.hidden),
                at + "self_attention.linear_proj.weight": (shape.hidden, q),
                at + "pre_mlp_layernorm.weight": (shape.hidden,),
                at + "mlp.linear_fc1.weight": (2 * shape.ffn, shape.hidden),
                at + "mlp.linear_fc2.weight": (shape.hidden, shape.ffn),
            }
        sizes["decoder.final_layernorm.weight"] = (shape.hidden,)
        parameters = {name: torch.randn(size) for name, size in sizes.items()}
        entries = [megatron_entry(name, t, shape) for name, t in parameters.items()]
        self._manifest, self._weights = manifest(shape.tensors(), entries), parameters
        if adapted:
            self._weights = {
                name: LowRank(t, torch.randn(t.shape[0], RANK), torch.randn(RANK, t.shape[1]), 2.0)
                if "linear" in name
                else t
                for name, t in parameters.items()
            }

    def manifest(self) -> dict:
        return self._manifest

    def weights(self, names):
        return [self._weights[name] for name in names]


class Published:
    """A trainer's weights in shared memory, and their version."""

    def __init__(self, shape: ModelShape):
        self.shape, self.name, self.version = shape, f"bench-{os.getpid()}-{shape.heads}", -1
        self._shared = SharedWeights(self.name, Trainer(shape, False))

    def next(self) -> None:
        self.version += 1
        self._shared.publish(self.version)


def set_own_threads(count: int) -> None:
    """OpenMP's number of threads is each thread's own; torch overwrites it the first time that a thread asks for it."""
    torch.get_num_threads()
    torch.set_num_threads(count)


class EngineRefit:
    """Refits of the stand-in engine, each to the version that `published` has."""

    def __init__(self, shape: ModelShape, published: Published, ranks: int, threads: int):
        self.engine, self.published = Engine(shape, ranks), published
        share = max(1, threads // ranks)
        for actor in self.engine.actors:
            actor.submit(set_own_threads, share).result()
        ranks_told = [{"host": socket.gethostname(), "name": published.name, "manifest": None}]
        told = [f.result() for f in self.engine.rpc("refit_attach", asdict(shape), ranks_told, None, DEADLINE_S)]
        torch.set_num_threads(threads)
        self.plans, self.bytes = [t["plan"] for t in told], 2 * sum(t["bytes"] for t in told)

    def __call__(self) -> None:
        deadline = time.time() + DEADLINE_S
        waiting = self.engine.rpc("refit", self.published.version, self.plans, deadline=deadline)
        for future in waiting:
            future.result()

    def copy(self) -> None:
        """What the refits before this one copied, by all ranks at once."""
        pairs = zip(self.engine.actors, self.engine.workers, strict=True)
        for future in [actor.submit(copy_again, worker) for actor, worker in pairs]:
            future.result()


def copy_again(worker: Worker) -> None:
    plan, parameters = worker._refit_plan.plan, worker._refit_found.parameters
    sources = worker._refit_source.weights(plan.sources)
    execute.write(plan.boxes, sources, [parameters[name] for name in plan.destinations])


def sampler_subjects(shape: ModelShape) -> dict:
    """Name -> (call, bytes, dtypes, model)."""
    found, elements = {}, shape.num_bytes() // 4
    for dtype, width in (("float32", 4), ("bfloat16", 2)):
        for adapted in (False, True):
            trainer, sampler = Trainer(shape, adapted), NativeSampler(shape, dtype=dtype)
            plan = compile_plan(trainer.manifest(), sampler.manifest())
            versions = iter(range(1 << 30))

            def refit(p=plan, t=trainer, s=sampler, v=versions):
                s.refit(p, t, version=next(v))

            words = f"float32 to {dtype}"

            def copy(p=plan, t=trainer, s=sampler):
                execute.write(p.boxes, t.weights(p.sources), [s.weights[name] for name in p.destinations])

            kind = "-lora" if adapted else ""
            found[f"copy{kind} {words}"] = (copy, elements * (4 + width), words, MODEL)
            found[f"refit{kind} {words}"] = (refit, elements * (4 + width), words, MODEL)
        size = elements * (4 + width)
        found[f"contiguous-copy {words}"] = (contiguous_copy(size), size, words, MODEL)
    return found


def engine_subjects(shape: ModelShape, published: dict[str, Published], threads: int) -> dict:
    """As sampler_subjects()."""
    words, size = "float32 to float32", 2 * shape.num_bytes()
    found = {f"contiguous-copy-engine {words}": (contiguous_copy(size), size, words, MODEL)}
    for model, ranks in ((MODEL, 1), (EVEN_MODEL, 2), (MODEL, 3)):
        refit = EngineRefit(published[model].shape, published[model], ranks, threads)
        found[f"refit-engine-tp{ranks} {words}"] = (refit, refit.bytes, words, model)
        found[f"copy-engine-tp{ranks} {words}"] = (refit.copy, refit.bytes, words, model)
    return found


def contiguous_copy(size: int) -> Callable[[], object]:
    """A copy that reads and writes `size` bytes together."""
    source, destination = torch.ones(size // 8), torch.zeros(size // 8)
    return lambda: destination.copy_(source)


def measure(cases: dict, rounds: int, before_round: Callable[[], None]) -> list[list]:
    """Print, and return for each case, what a row of results says of it."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        before_round()
        for name, (call, *_) in cases.items():
            start = time.perf_counter()
            call()
            if number:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    median = {name: statistics.median(values) for name, values in times.items()}
    copied = {
        dtype: size / median[name] / 1e9 for name, (_, size, dtype, _) in cases.items() if name.startswith("contiguous")
    }
    rows = []
    for name, (_, size, dtype, model) in cases.items():
        seconds, rate = median[name], size / median[name] / 1e9
        impl = name.split()[0]
        rows.append([model, dtype, impl, f"{seconds:.6g}", size, f"{rate:.3g}", ""])
        print(
            f"{dtype} {impl}: {1e3 * seconds:.4g} ms, {rate:.3g} GB/s, "
            f"{rate / copied[dtype]:.2f}x of copy bandwidth, "
            f"{100 * seconds / PPO_STEP_S:.2f} % of a PPO step of {PPO_STEP_S:g} s"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=f"Benchmark the refit; rows go to {RESULTS.name}/refit.csv.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape = ModelShape.from_folder(default_model())
    where = [datetime.date.today().isoformat(), commit(), machine(), options.threads]
    rows = measure(sampler_subjects(shape), options.rounds, lambda: None)
    shapes = {MODEL: shape, EVEN_MODEL: replace(shape, heads=8, kv_heads=4)}
    published = {model: Published(s) for model, s in shapes.items()}

    def publish():
        for p in published.values():
            p.next()

    rows += measure(engine_subjects(shape, published, options.threads), options.rounds, publish)
    rows = [where + row for row in rows]
    path = RESULTS / "refit.csv"
    new = not path.exists()
    with path.open("a", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows] if new else rows)


if __name__ == "__main__":
    main()
