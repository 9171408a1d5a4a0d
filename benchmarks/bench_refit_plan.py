"""Plans of a refit from Megatron-core's layouts into TensorRT-LLM's, for large models, without their weights.

One engine rank compiles its plan from what all trainer ranks publish. Rows in results/refit_plan.csv: seconds, copies,
bytes of the copy table, bytes that the rank receives, over what it must (each of its elements once) and against whole
tensors sent to every rank, which is what upstream's receivers get.
"""

import csv
import datetime
import os
import statistics
import time
from pathlib import Path

import torch

from aligner.models.rope import Rope
from aligner.models.shape import ModelShape
from aligner.models.weights import join
from aligner.refit.plan import compile_plan
from aligner.refit.predict import engine_manifest, given, trainer_manifests

RESULTS = Path(__file__).parent / "results" / "refit_plan.csv"
ROUNDS, TP = 3, 8


def shape(layers: int, hidden: int, ffn: int, heads: int, vocab: int, **others) -> ModelShape:
    fixed = {"kv_heads": 8, "head_dim": 128, "context": 8192, "norm_eps": 1e-5, "tied": False, "rope": Rope()}
    return ModelShape(num_layers=layers, hidden=hidden, ffn=ffn, heads=heads, vocab=vocab, **fixed | others)


MODELS = {
    "Llama-3.1-8B": shape(32, 4096, 14336, 32, 128256),
    "Qwen3-32B": shape(64, 5120, 25600, 64, 151936, qk_norm=True),
    "Llama-3.1-70B": shape(80, 8192, 28672, 64, 128256),
    "Llama-3.1-405B": shape(126, 16384, 53248, 128, 128256),
}


def main() -> None:
    with RESULTS.open("a", newline="") as file:
        writer = csv.writer(file)
        if file.tell() == 0:
            columns = ["date", "model", "trainer", "engine", "seconds", "copies", "table_bytes", "received_bytes"]
            writer.writerow([*columns, "over_needed", "whole_over_received", "peers", "cores", "load"])
        for name, s in MODELS.items():
            for stages in (1, 4, 8):
                source = join(trainer_manifests(s, tensor=TP, pipeline=stages, dtype=torch.bfloat16))
                for ranks in (4, 8):
                    destination = engine_manifest(s, rank=ranks - 1, ranks=ranks, dtype=torch.bfloat16)
                    times = []
                    for _ in range(ROUNDS):
                        began = time.perf_counter()
                        plan = compile_plan(source, destination)
                        times.append(time.perf_counter() - began)
                    gives = given(plan)
                    moved = sum(gives.values())
                    needed = 2 * sum(
                        torch.Size(g["size"]).numel()
                        for item in destination["tensors"]
                        for g in item["segments"]
                        if g["tensor"]
                    )
                    whole = s.num_bytes() // 2
                    row = [
                        name,
                        f"TP{TP} PP{stages}",
                        f"TP{ranks}",
                        f"{statistics.median(times):.3f}",
                        len(plan.copies),
                    ]
                    row += [plan.boxes.numel() * 8, moved, f"{moved / needed:.4f}", f"{whole / moved:.2f}", len(gives)]
                    print(*row)
                    writer.writerow([datetime.date.today(), *row, os.cpu_count(), f"{os.getloadavg()[0]:.1f}"])


if __name__ == "__main__":
    main()
