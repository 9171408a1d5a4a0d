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
from aligner.models.weights import join, manifest, megatron_entry
from aligner.refit.plan import compile_plan
from aligner.refit.trtllm_layout import engine_entry

RESULTS = Path(__file__).parent / "results" / "refit_plan.csv"
ROUNDS, TP = 3, 8
PADDED = 128  # Megatron-core pads the vocabulary to a multiple of so much for each tensor rank


def shape(layers: int, hidden: int, ffn: int, heads: int, vocab: int, **others) -> ModelShape:
    fixed = {"kv_heads": 8, "head_dim": 128, "context": 8192, "norm_eps": 1e-5, "tied": False, "rope": Rope()}
    return ModelShape(num_layers=layers, hidden=hidden, ffn=ffn, heads=heads, vocab=vocab, **fixed | others)


MODELS = {
    "Llama-3.1-8B": shape(32, 4096, 14336, 32, 128256),
    "Qwen3-32B": shape(64, 5120, 25600, 64, 151936, qk_norm=True),
    "Llama-3.1-70B": shape(80, 8192, 28672, 64, 128256),
    "Llama-3.1-405B": shape(126, 16384, 53248, 128, 128256),
}


def empty(*size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.bfloat16, device="meta")


def trainer_rank(s: ModelShape, rank: int, stage: int, stages: int) -> dict:
    """The manifest of a tensor rank of a stage."""
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    vocab = -(-s.vocab // (PADDED * TP)) * PADDED
    first, last = (s.num_layers * i // stages for i in (stage, stage + 1))
    held = {"embedding.word_embeddings.weight": empty(vocab, s.hidden)} if stage == 0 else {}
    for i in range(last - first):
        at = f"decoder.layers.{i}."
        held[at + "input_layernorm.weight"] = empty(s.hidden)
        held[at + "self_attention.linear_qkv.weight"] = empty((q + 2 * kv) // TP, s.hidden)
        if s.qk_norm:
            held |= {f"{at}self_attention.{c}_layernorm.weight": empty(s.head_dim) for c in "qk"}
        held[at + "self_attention.linear_proj.weight"] = empty(s.hidden, q // TP)
        held[at + "pre_mlp_layernorm.weight"] = empty(s.hidden)
        held[at + "mlp.linear_fc1.weight"] = empty(2 * s.ffn // TP, s.hidden)
        held[at + "mlp.linear_fc2.weight"] = empty(s.hidden, s.ffn // TP)
    if stage == stages - 1:
        held |= {"decoder.final_layernorm.weight": empty(s.hidden), "output_layer.weight": empty(vocab, s.hidden)}
    entries = [megatron_entry(n, t, s, rank=rank, ranks=TP, first_layer=first) for n, t in held.items()]
    return manifest(s.tensors(), entries)


def engine_rank(s: ModelShape, rank: int, ranks: int) -> dict:
    q, kv, ffn, vocab = (
        s.heads * s.head_dim // ranks,
        s.kv_heads * s.head_dim // ranks,
        s.ffn // ranks,
        -(-s.vocab // ranks),
    )
    held = {"model.embed_tokens.weight": empty(vocab, s.hidden), "lm_head.weight": empty(vocab, s.hidden)}
    for i in range(s.num_layers):
        at = f"model.layers.{i}."
        held |= {f"{at}{c}_layernorm.weight": empty(s.hidden) for c in ("input", "post_attention")}
        held[at + "self_attn.qkv_proj.weight"] = empty(q + 2 * kv, s.hidden)
        if s.qk_norm:
            held |= {f"{at}self_attn.{c}_norm.weight": empty(s.head_dim) for c in "qk"}
        held[at + "self_attn.o_proj.weight"] = empty(s.hidden, q)
        held |= {
            at + "mlp.gate_up_proj.weight": empty(2 * ffn, s.hidden),
            at + "mlp.down_proj.weight": empty(s.hidden, ffn),
        }
    held["model.norm.weight"] = empty(s.hidden)
    return manifest(s.tensors(), [engine_entry(n, t, s, rank=rank, ranks=ranks) for n, t in held.items()])


def main() -> None:
    with RESULTS.open("a", newline="") as file:
        writer = csv.writer(file)
        if file.tell() == 0:
            columns = ["date", "model", "trainer", "engine", "seconds", "copies", "table_bytes", "received_bytes"]
            writer.writerow([*columns, "over_needed", "whole_over_received", "peers", "cores", "load"])
        for name, s in MODELS.items():
            for stages in (1, 4, 8):
                source = join([trainer_rank(s, r, p, stages) for p in range(stages) for r in range(TP)])
                for ranks in (4, 8):
                    destination, times = engine_rank(s, ranks - 1, ranks), []
                    for _ in range(ROUNDS):
                        began = time.perf_counter()
                        plan = compile_plan(source, destination)
                        times.append(time.perf_counter() - began)
                    moved = 2 * sum(torch.Size(c.size).numel() for c in plan.copies)
                    needed = 2 * sum(
                        torch.Size(g["size"]).numel()
                        for item in destination["tensors"]
                        for g in item["segments"]
                        if g["tensor"]
                    )
                    whole = 2 * sum(torch.Size(size).numel() for size in s.tensors().values())
                    peers = len({c.source.partition("/")[0] for c in plan.copies})
                    row = [
                        name,
                        f"TP{TP} PP{stages}",
                        f"TP{ranks}",
                        f"{statistics.median(times):.3f}",
                        len(plan.copies),
                    ]
                    row += [plan.boxes.numel() * 8, moved, f"{moved / needed:.4f}", f"{whole / moved:.2f}", peers]
                    print(*row)
                    writer.writerow([datetime.date.today(), *row, os.cpu_count(), f"{os.getloadavg()[0]:.1f}"])


if __name__ == "__main__":
    main()
