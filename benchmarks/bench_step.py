"""Seconds of each phase of one PPO step on the default model, median over steps: `python benchmarks/bench_step.py`."""

import statistics
import tempfile
from pathlib import Path

import torch

from aligner import ppo
from aligner.run import config as options
from aligner.run.timers import peak_memory_bytes

STEPS = 5


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = options.parse(ppo.Config, ["--output", str(Path(folder) / "run"), "--eval-prompts", "0"])
        run, _, _ = ppo.setup(config)
        ppo.step(run, 1)  # warm-up
        steps = [ppo.step(run, number)[0] for number in range(2, 2 + STEPS)]
    phases = {name: statistics.median(m[name] for m in steps) for name in steps[0] if name.startswith("time/")}
    b = config.batch
    tokens = statistics.median(m["tokens_per_second"] for m in steps)
    print(f"{b.sequences} responses, {config.sampling.max_tokens} new tokens, {torch.get_num_threads()} threads")
    for name, seconds in phases.items():
        print(f"{name.removeprefix('time/'):>14} {seconds:8.2f} s")
    print(f"{'step':>14} {sum(phases.values()):8.2f} s, {tokens:.0f} tokens/s, peak {peak_memory_bytes() / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
