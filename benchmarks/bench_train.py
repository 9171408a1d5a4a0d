"""Tokens per second and peak memory of one training step against TRL on transformers and peft, SmolLM2-135M, float32.

    python benchmarks/bench_train.py [--only "sft full"] [--rival transformers] [--profile]

* sft: 4 sequences of 512 tokens, all but the first learnt;
* dpo: 4 pairs of 256 tokens each, of which 64 are the prompt; both sides have the reference's log-probabilities;
* dpo-reference: the same, and the step makes them (not measured against plain transformers);
each with all weights trained ("full") and with adapters of rank 16 on all linear layers ("lora").

The texts are movie reviews, of equal length, so nobody pads. Every side lives in a process of its own and takes one
step when asked; they take turns. Seconds are medians over the steps after the first; peak bytes are the process's
high-water mark, which holds the model's loading and the libraries too. Bfloat16 and gradient checkpointing, TRL's
defaults, are off: on a CPU they only cost time.

Both sides start from the same weights and the same A of their adapters. Their losses must agree to 1e-4 in the first
step and the second, which sees the first one's update; later ones are printed. The adapters are not quite the same:
q, k and v share one A here, and so do gate and up, where peft has one each.
"""

import argparse
import csv
import datetime
import multiprocessing
import os
import statistics

import torch
from harness import RESULTS, commit, machine
from train_sides import HAS_PEFT, HAS_TRL, PROMPT, Case, aligner, serve
from transformers import AutoTokenizer

from aligner.checkpoint.default_model import default_model
from aligner.data.movie_reviews import labelled_reviews

COLUMNS = ["date", "commit", "machine", "threads", "shape", "dtype", "impl", "seconds_median", "cpu_seconds_median"]
COLUMNS += ["tokens_per_s", "peak_bytes"]
CASES = [Case(method=method, lora=lora) for method in ("sft", "dpo", "dpo-reference") for lora in (False, True)]
AGREE = 1e-4
INSTALL = "pip install --no-deps trl==1.16.0 peft datasets, and what `import trl` then misses"


def batches(method: str, steps: int) -> torch.Tensor:
    """(steps, sequences, tokens) of reviews; for DPO each pair shares its prompt."""
    count, length = (4, 512) if method == "sft" else (8, 256)
    tokenizer = AutoTokenizer.from_pretrained(default_model())
    texts = [r.text for r in labelled_reviews() if len(r.text) > 8 * length][: steps * count]
    ids = tokenizer(texts, truncation=True, max_length=length)["input_ids"]
    rows = torch.tensor([row for row in ids if len(row) == length])
    rows = rows[: len(rows) // count * count].unflatten(0, (-1, count))
    assert len(rows) >= steps, f"{len(rows)} batches of whole reviews, expected {steps}"
    if method != "sft":
        rows[:, 1::2, :PROMPT] = rows[:, 0::2, :PROMPT]
    return rows[:steps]


class Side:
    """One trainer in its process."""

    def __init__(self, name: str, *arguments):
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(name, other, *arguments), daemon=True)
        self.process.start()
        other.close()  # so that a side that ends early is an EOFError here
        self.steps: list[dict] = []

    def step(self) -> None:
        self.pipe.send("step")
        self.steps.append(self.pipe.recv())

    def median(self, what: str) -> float:
        return statistics.median(step[what] for step in self.steps[1:])  # the first step warms up


def compare(case: Case, rival: str, rounds: int, threads: int, micro_batch: int) -> dict[str, Side]:
    data = batches(case.method, rounds + 1)
    sides = {name: Side(name, threads, case, data, micro_batch) for name in ("aligner", rival)}
    for number in range(rounds + 1):
        for side in sides.values() if number % 2 else reversed(sides.values()):
            side.step()
    for side in sides.values():
        side.process.join()
    values = [[step["values"] for step in side.steps] for side in sides.values()]
    apart = [max(abs(a[k] - b[k]) / abs(b[k]) for k in b) for a, b in zip(*values, strict=True)]
    print(f"{case.name}: losses are apart by", ", ".join(f"{x:.0e}" for x in apart), "in each step", flush=True)
    assert max(apart[:2]) < AGREE, f"{case.name}: not the same work, {values}"
    return sides


class Profiled:
    """A turn of nobody else: prints where the seconds of the latest step went."""

    def begin(self) -> None:
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        self.profile.start()

    def end(self, **_) -> None:
        self.profile.stop()

    def print(self) -> None:
        events = sorted(self.profile.key_averages(), key=lambda e: -e.self_cpu_time_total)
        total = sum(e.self_cpu_time_total for e in events)
        for e in events[:12]:
            print(f"{100 * e.self_cpu_time_total / total:6.1f} %  {e.key}")


def main() -> None:
    parser = argparse.ArgumentParser(description=f"Benchmark a training step; rows go to {RESULTS.name}/train.csv.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each side")
    parser.add_argument("--micro-batch", type=int, default=1024, help="this library's tokens per forward pass")
    parser.add_argument("--rival", choices=["trl", "transformers"], default="trl" if HAS_TRL else "transformers")
    parser.add_argument("--profile", action="store_true", help="print where this library's step spends its time")
    parser.add_argument("--only", help='one case, for example "dpo lora"')
    options = parser.parse_args()
    if options.profile:
        case, turn = next(c for c in CASES if options.only in (None, c.name)), Profiled()
        torch.set_num_threads(options.threads)
        aligner(turn, case, batches(case.method, 2), options.micro_batch)
        turn.print()
        return
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # the side that waits must not hold a core
    if not HAS_TRL:
        print(f"trl is not installed ({INSTALL}); measuring transformers with torch's AdamW.")
    plain = options.rival == "transformers"
    cases = [c for c in CASES if (options.only or c.name) == c.name and not (plain and c.method == "dpo-reference")]
    where = [datetime.date.today().isoformat(), commit(), machine(), options.threads]
    for case in cases:
        if case.lora and not HAS_PEFT:
            print(f"{case.name}: left out, peft is not installed.")
            continue
        sides = compare(case, options.rival, options.rounds, options.threads, options.micro_batch)
        rows = []
        for name, side in sides.items():
            seconds, cpu, peak = side.median("seconds"), side.median("cpu"), side.steps[-1]["peak"]
            shape = "SmolLM2-135M B4 T512" if case.method == "sft" else "SmolLM2-135M B8 T256"
            values = [f"{seconds:.4g}", f"{cpu:.4g}", f"{2048 / seconds:.4g}", peak]
            parts = f" micro-batch {options.micro_batch}" if name == "aligner" else ""
            rows.append([*where, f"{shape} {case.name}", "float32", name + parts, *values])
            print(f"{case.name} {name}: {seconds:.2f} s, {cpu:.2f} CPU s, {2048 / seconds:.0f} tokens/s, ", end="")
            print(f"{peak / 1e9:.2f} GB", flush=True)
        ours, theirs = sides.values()
        wall, cpu = (theirs.median(what) / ours.median(what) for what in ("seconds", "cpu"))
        memory = ours.steps[-1]["peak"] / theirs.steps[-1]["peak"]
        print(f"{case.name}: {wall:.2f}x as fast, {cpu:.2f}x by CPU seconds, {memory:.2f}x the memory", flush=True)
        path = RESULTS / "train.csv"
        new = not path.exists()
        with path.open("a", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *rows] if new else rows)


if __name__ == "__main__":
    main()
