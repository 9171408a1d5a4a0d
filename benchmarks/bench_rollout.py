"""Tokens per second of the embedded sampler against transformers: `python benchmarks/bench_rollout.py`.

SmolLM2-135M, 64 random tokens in, 64 out, greedy. A round times every subject once; a row is the median of the rounds.
`bytes` is what the best sampler reads: all weights once for each of the 64 new tokens. The share of the roof compares
that with a read of the weights by torch, timed in the same rounds.
"""

import csv
import datetime
import statistics
import time

import torch
from harness import COLUMNS, RESULTS, commit, machine
from transformers import AutoModelForCausalLM

from aligner.checkpoint.default_model import default_model
from aligner.rollout.native import NativeSampler
from aligner.rollout.sampling import Sampling

TOKENS, ROUNDS = 64, 3


def seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    folder = default_model()
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    samplers = {dtype: NativeSampler.from_pretrained(folder, dtype=dtype) for dtype in ("float32", "bfloat16")}
    weights = torch.cat([t.flatten() for t in samplers["float32"].weights.values()])
    sampling = Sampling(temperature=0, max_tokens=TOKENS)
    rows = []
    for batch in (1, 8, 32):
        prompts_BN = torch.randint(3, 40000, (batch, TOKENS), generator=torch.Generator().manual_seed(batch))
        prompts = prompts_BN.tolist()
        options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
        mask = torch.ones_like(prompts_BN)
        subjects = {
            "transformers float32": lambda x=prompts_BN, m=mask, o=options: model.generate(x, attention_mask=m, **o),
            "native float32": lambda p=prompts: samplers["float32"].generate(p, sampling),
            "native bfloat16": lambda p=prompts: samplers["bfloat16"].generate(p, sampling),
            "read": lambda: weights.sum(),
        }
        times = {name: [] for name in subjects}
        for _ in range(ROUNDS):
            for name, call in subjects.items():
                times[name].append(seconds(call))
        median = {name: statistics.median(values) for name, values in times.items()}
        roof = weights.nbytes / min(times["read"])
        for name in list(subjects)[:3]:
            impl, dtype = name.split()
            size = TOKENS * weights.numel() * (2 if dtype == "bfloat16" else 4)
            rate = size / median[name]
            where = [datetime.date.today().isoformat(), commit(), machine(), torch.get_num_threads()]
            shape = f"B{batch} {TOKENS} in {TOKENS} out"
            rows.append([*where, shape, dtype, impl, f"{median[name]:.6g}", size, f"{rate / 1e9:.3g}", ""])
            print(
                f"{shape} {name}: {batch * TOKENS / median[name]:.0f} tokens/s, "
                f"{median['transformers float32'] / median[name]:.2f}x transformers, {rate / 1e9:.3g} GB/s, "
                f"{100 * rate / roof:.0f} % of the roof"
            )
    path = RESULTS / "rollout.csv"
    new = not path.exists()
    with path.open("a", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows] if new else rows)


if __name__ == "__main__":
    main()
