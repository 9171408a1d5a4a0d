"""Refit of SmolLM2-135M into the embedded sampler: `python benchmarks/bench_refit.py`.

The trainer's layout (Megatron's) goes into the engine's through `sampler.refit`: preflight, copy, read back and verify,
commit. A round times every subject once; a row is the median of the rounds. `bytes` is what the copy itself must move:
the parameters read once and written once; `contiguous-copy` moves as many in one piece with torch.
"""

import argparse
import csv
import datetime
import statistics
import time

import torch
from harness import COLUMNS, RESULTS, commit, machine

from aligner.checkpoint.default_model import default_model
from aligner.models.low_rank import LowRank
from aligner.models.shape import ModelShape
from aligner.models.weights import manifest, megatron_entry
from aligner.refit.plan import compile_plan
from aligner.rollout.native import NativeSampler

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

    def weight(self, name: str):
        return self._weights[name]


def subjects(shape: ModelShape) -> dict:
    """Name -> (call, bytes, dtypes)."""
    found, elements = {}, shape.num_bytes() // 4
    for dtype, width in (("float32", 4), ("bfloat16", 2)):
        for adapted in (False, True):
            trainer, sampler = Trainer(shape, adapted), NativeSampler(shape, dtype=dtype)
            plan = compile_plan(trainer.manifest(), sampler.manifest())
            versions = iter(range(1 << 30))

            def refit(p=plan, t=trainer, s=sampler, v=versions):
                s.refit(p, t, version=next(v))

            words = f"float32 to {dtype}"
            found[f"refit{'-lora' if adapted else ''} {words}"] = (refit, elements * (4 + width), words)
        flat = torch.ones(elements * (4 + width) // 8), torch.zeros(elements * (4 + width) // 8)
        found[f"contiguous-copy {words}"] = (lambda f=flat: f[1].copy_(f[0]), elements * (4 + width), words)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=f"Benchmark the refit; rows go to {RESULTS.name}/refit.csv.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cases = subjects(ModelShape.from_folder(default_model()))
    times: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(options.rounds + 1):
        for name, (call, _, _) in cases.items():
            start = time.perf_counter()
            call()
            if number:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    median = {name: statistics.median(values) for name, values in times.items()}
    rows, where = [], [datetime.date.today().isoformat(), commit(), machine(), options.threads]
    for name, (_, size, dtype) in cases.items():
        seconds, rate = median[name], size / median[name] / 1e9
        impl = name.split()[0]
        rows.append([*where, "SmolLM2-135M", dtype, impl, f"{seconds:.6g}", size, f"{rate:.3g}", ""])
        print(
            f"{dtype} {impl}: {1e3 * seconds:.4g} ms, {rate:.3g} GB/s, "
            f"{median['contiguous-copy ' + dtype] / seconds:.2f}x of copy bandwidth, "
            f"{100 * seconds / PPO_STEP_S:.2f} % of a PPO step of {PPO_STEP_S:g} s"
        )
    path = RESULTS / "refit.csv"
    new = not path.exists()
    with path.open("a", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows] if new else rows)


if __name__ == "__main__":
    main()
