"""Where each part of a parameter stands in the Hugging Face checkpoint: for import, export, refit.

A manifest is plain JSON: {"model": {Hugging Face name: shape}, "tensors": [entry, ...], "digest": its SHA-256}. An
entry {"name", "shape", "dtype", "segments"} cuts one parameter into boxes. The segment {"tensor", "start", "at",
"size"} says that the box of `size` (rows, columns) at `at` in the parameter is the box at `start` of the Hugging Face
tensor; where "tensor" is null it is padding and stands nowhere.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from aligner.models.shape import ModelShape

Part = tuple[str | None, int, int]  # Hugging Face name (None: padding), first row or column, how many


def manifest(model: dict[str, Sequence[int]], tensors: list[dict]) -> dict:
    """The manifest of one side: the checkpoint's tensors, and this side's parameters as entries."""
    body = {"model": {name: list(size) for name, size in model.items()}, "tensors": tensors}
    return body | {"digest": hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()}


def join(manifests: Sequence[dict]) -> dict:
    """One manifest of all ranks; the parameter `name` of the rank i becomes `i/name`."""
    if any(m["model"] != manifests[0]["model"] for m in manifests):
        raise ValueError("refit: the ranks' manifests are of different models; start all ranks on the same one.")
    tensors = [item | {"name": f"{i}/{item['name']}"} for i, m in enumerate(manifests) for item in m["tensors"]]
    return manifest(manifests[0]["model"], tensors)


def entry(name: str, tensor: Tensor, parts: Sequence[Part], axis: int = 0) -> dict:
    """The entry of `tensor`, which the parts fill from top to bottom, or with axis 1 from left to right."""
    segments, at = [], 0
    for source, start, count in parts:
        size, origin, first = list(tensor.shape), [0] * tensor.dim(), [0] * tensor.dim()
        size[axis], origin[axis], first[axis] = count, at, start
        segments.append({"tensor": source, "start": first, "at": origin, "size": size})
        at += count
    if at != tensor.shape[axis]:
        line = ("rows", "columns")[axis]
        raise ValueError(f"manifest of {name}: segments fill {at} {line}, expected {tensor.shape[axis]}.")
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"name": name, "shape": list(tensor.shape), "dtype": dtype, "segments": segments}


def megatron_entry(
    name: str, tensor: Tensor, shape: ModelShape, *, rank: int = 0, ranks: int = 1, first_layer: int = 0
) -> dict:
    """The entry of a Megatron-core parameter as tensor-parallel rank `rank` of `ranks` holds it.

    first_layer: layers on earlier pipeline stages, because every stage counts its own from 0.
    """
    axis, stacks = _megatron_stacks(name, shape, first_layer)
    if axis is None:  # every rank holds all of it
        return entry(name, tensor, stacks[0])
    length, rest = divmod(tensor.shape[axis], len(stacks))
    whole = sum(count for _, _, count in stacks[0])
    padded = name in ("embedding.word_embeddings.weight", "output_layer.weight")  # to a multiple that ranks divide
    if rest or length * ranks < whole or (length * ranks > whole and not padded):
        raise ValueError(
            f"manifest of {name}: {ranks} ranks of shape {list(tensor.shape)} do not share {len(stacks)} x {whole}."
        )
    return entry(name, tensor, [p for stack in stacks for p in _share(stack, rank * length, length)], axis)


def megatron_axis(name: str, shape: ModelShape) -> int | None:
    """The axis along which tensor-parallel ranks share a Megatron-core parameter; None where each has all of it."""
    return _megatron_stacks(name, shape, 0)[0]


def _share(parts: Sequence[Part], begin: int, length: int) -> list[Part]:
    """What [begin, begin + length) holds of parts that lie one after the other; beyond the last there is padding."""
    share, at, end = [], 0, begin + length
    for tensor, start, count in parts:
        low, high = max(begin, at), min(end, at + count)
        if low < high:
            share.append((tensor, start + low - at, high - low))
        at += count
    return share + ([(None, 0, end - max(at, begin))] if at < end else [])


def _megatron_stacks(name: str, shape: ModelShape, first_layer: int) -> tuple[int | None, list[list[Part]]]:
    """(axis that tensor parallelism cuts, stacks of parts): a rank holds its share of each stack, one after another."""
    fixed: dict[str, tuple[int | None, str, int]] = {
        "embedding.word_embeddings.weight": (0, "model.embed_tokens.weight", shape.vocab),
        "output_layer.weight": (0, "model.embed_tokens.weight" if shape.tied else "lm_head.weight", shape.vocab),
        "decoder.final_layernorm.weight": (None, "model.norm.weight", shape.hidden),
    }
    if name in fixed:
        axis, tensor, count = fixed[name]
        return axis, [[(tensor, 0, count)]]
    _, _, layer, suffix = name.split(".", 3)
    at, dim = f"model.layers.{int(layer) + first_layer}.", shape.head_dim
    module, _, kind = suffix.rpartition(".")
    if module == "self_attention.linear_qkv":  # per key-value group: its queries, its key, its value
        queries = shape.heads // shape.kv_heads * dim
        sizes = (("q", queries), ("k", dim), ("v", dim))
        return 0, [[(f"{at}self_attn.{c}_proj.{kind}", g * n, n) for g in range(shape.kv_heads) for c, n in sizes]]
    if module == "mlp.linear_fc1":  # a rank's gate rows, then its up rows
        return 0, [[(f"{at}mlp.{c}_proj.{kind}", 0, shape.ffn)] for c in ("gate", "up")]
    axis, tensor, count = {
        "input_layernorm": (None, "input_layernorm", shape.hidden),
        "self_attention.q_layernorm": (None, "self_attn.q_norm", dim),
        "self_attention.k_layernorm": (None, "self_attn.k_norm", dim),
        "self_attention.linear_proj": (1, "self_attn.o_proj", shape.heads * dim),
        "pre_mlp_layernorm": (None, "post_attention_layernorm", shape.hidden),
        "mlp.linear_fc2": (1, "mlp.down_proj", shape.ffn),
    }[module]
    return axis, [[(f"{at}{tensor}.{kind}", 0, count)]]


def window(tensor: Tensor, at: Sequence[int], size: Sequence[int]) -> Tensor:
    """The box of `size` at `at`, as a view."""
    if tensor.shape == size:
        return tensor
    for axis, (first, count) in enumerate(zip(at, size, strict=True)):
        if count != tensor.shape[axis]:
            tensor = tensor.narrow(axis, first, count)
    return tensor


@torch.no_grad()
def fill(tensors: list[dict], parameters: dict[str, Tensor], read: Callable[[str], Tensor]) -> None:
    """Copy a Hugging Face checkpoint, given as `read(name) -> tensor`, into the parameters that the entries name."""
    for item in tensors:
        for s in item["segments"]:
            if s["tensor"]:
                into = window(parameters[item["name"]], s["at"], s["size"])
                into.copy_(window(read(s["tensor"]), s["start"], s["size"]))


@torch.no_grad()
def export(tensors: list[dict], read: Callable[[str], Tensor], shape: ModelShape) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, tensor) for every tensor of the checkpoint, from parameters `read(name) -> tensor`."""
    homes: dict[str, list[tuple[str, dict]]] = {}
    for item in tensors:
        for s in item["segments"]:
            homes.setdefault(s["tensor"], []).append((item["name"], s))
    for name, size in shape.tensors().items():
        tensor = torch.empty(size)
        for parameter, s in homes[name]:
            window(tensor, s["start"], s["size"]).copy_(window(read(parameter), s["at"], s["size"]))
        yield name, tensor
