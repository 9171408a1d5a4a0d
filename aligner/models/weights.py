"""Where each row of a Megatron-core parameter stands in the Hugging Face checkpoint: for import, export, refit.

A manifest is a list of plain JSON entries {"name", "shape", "dtype", "segments"}; a segment
{"tensor", "start", "at", "rows"} says that rows [at, at + rows) of the parameter are rows [start, start + rows) of the
Hugging Face tensor.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from aligner.models.shape import ModelShape


def entry(name: str, tensor: Tensor, parts: list[tuple[str, int, int]]) -> dict:
    """A manifest entry for `tensor`, filled from top to bottom by parts (Hugging Face name, first row, rows)."""
    segments, at = [], 0
    for source, start, rows in parts:
        segments.append({"tensor": source, "start": start, "at": at, "rows": rows})
        at += rows
    if at != tensor.shape[0]:
        raise ValueError(f"manifest of {name}: segments fill {at} rows, expected {tensor.shape[0]}.")
    return {"name": name, "shape": list(tensor.shape), "dtype": str(tensor.dtype), "segments": segments}


def megatron_parts(name: str, shape: ModelShape) -> list[tuple[str, int, int]]:
    """(Hugging Face name, first row, rows) that make up the Megatron-core parameter `name`, top to bottom."""
    fixed = {
        "embedding.word_embeddings.weight": ("model.embed_tokens.weight", shape.vocab),
        "output_layer.weight": ("lm_head.weight", shape.vocab),
        "decoder.final_layernorm.weight": ("model.norm.weight", shape.hidden),
    }
    if name in fixed:
        return [(fixed[name][0], 0, fixed[name][1])]
    _, _, layer, suffix = name.split(".", 3)
    at, dim = f"model.layers.{layer}.", shape.head_dim
    if suffix.startswith("self_attention.linear_qkv."):  # per key-value group: its queries, its key, its value
        kind = suffix.rsplit(".", 1)[1]  # weight or bias
        queries = shape.heads // shape.kv_heads * dim
        sizes = (("q", queries), ("k", dim), ("v", dim))
        return [(f"{at}self_attn.{c}_proj.{kind}", g * n, n) for g in range(shape.kv_heads) for c, n in sizes]
    if suffix == "mlp.linear_fc1.weight":
        return [(f"{at}mlp.gate_proj.weight", 0, shape.ffn), (f"{at}mlp.up_proj.weight", 0, shape.ffn)]
    if suffix in ("self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"):
        return [(f"{at}self_attn.{suffix[15]}_norm.weight", 0, dim)]
    whole = {
        "input_layernorm.weight": "input_layernorm.weight",
        "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
        "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
        "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    }
    return [(at + whole[suffix], 0, shape.hidden)]


@torch.no_grad()
def fill(manifest: list[dict], parameters: dict[str, Tensor], read: Callable[[str], Tensor]) -> None:
    """Copy a Hugging Face checkpoint, given as `read(name) -> tensor`, into the parameters that the manifest names."""
    for item in manifest:
        for s in item["segments"]:
            source = read(s["tensor"])[s["start"] : s["start"] + s["rows"]]
            parameters[item["name"]][s["at"] : s["at"] + s["rows"]].copy_(source)


@torch.no_grad()
def export(manifest: list[dict], read: Callable[[str], Tensor], shape: ModelShape) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, tensor) for every tensor of the checkpoint, from parameters `read(name) -> tensor`."""
    homes: dict[str, list[tuple[str, dict]]] = {}
    for item in manifest:
        for s in item["segments"]:
            homes.setdefault(s["tensor"], []).append((item["name"], s))
    for name, size in shape.tensors().items():
        tensor = torch.empty(size)
        for parameter, s in homes[name]:
            tensor[s["start"] : s["start"] + s["rows"]] = read(parameter)[s["at"] : s["at"] + s["rows"]]
        yield name, tensor
