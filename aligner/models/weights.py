"""Where each part of a parameter stands in the Hugging Face checkpoint: for import, export, refit.

A manifest is plain JSON: {"model": {Hugging Face name: shape}, "tensors": [entry, ...], "digest": its SHA-256}. An
entry {"name", "shape", "dtype", "segments"} cuts one parameter into boxes. The segment {"tensor", "start", "at",
"size"} says that the box of `size` (rows, columns) at `at` in the parameter is the box at `start` of the Hugging Face
tensor; where "tensor" is null it is padding and stands nowhere.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from aligner.models.boxes import box_of, cover, move, size_of, words
from aligner.models.shape import ModelShape

Part = tuple[str | None, int, int]  # Hugging Face name (None: padding), first row or column, how many


def manifest(model: dict[str, Sequence[int]], tensors: list[dict]) -> dict:
    """The manifest of one side: the checkpoint's tensors, and this side's parameters as entries."""
    body = {"model": {name: list(size) for name, size in model.items()}, "tensors": tensors}
    return body | {"digest": hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()}


def join(manifests: Sequence[dict]) -> dict:
    """One manifest of all ranks; the parameter `name` of the rank i becomes `i/name`."""
    if any(m["model"] != manifests[0]["model"] for m in manifests):
        raise ValueError("the ranks' manifests are of different models; start all ranks on the same one.")
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
        # Megatron's last pipeline stage calls its copy of a tied embedding output_layer too.
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


class Reader(Protocol):
    """A checkpoint that gives the box of `size` at `start` of any tensor: checkpoint.huggingface.Weights."""

    def window(self, name: str, start: Sequence[int], size: Sequence[int]) -> Tensor: ...


class Adapted(Protocol):
    """A weight that is computed when it is asked for: low_rank.LowRank."""

    def merged(self) -> Tensor: ...


@torch.no_grad()
def fill(tensors: list[dict], parameters: dict[str, Tensor], read: Reader) -> None:
    """Copy a Hugging Face checkpoint into the parameters that the entries name; nothing else of it is read."""
    for item in tensors:
        for s in item["segments"]:
            if s["tensor"]:
                into = window(parameters[item["name"]], s["at"], s["size"])
                into.copy_(read.window(s["tensor"], s["start"], s["size"]))


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """The box of `size` at `start` of a Hugging Face tensor is the one at `at` of a parameter of `rank`."""

    rank: int
    parameter: str
    at: Sequence[int]
    start: Sequence[int]
    size: Sequence[int]


@torch.no_grad()
def export(
    tensors: list[dict],
    read: Callable[[str], Tensor | Adapted],
    shape: ModelShape,
    *,
    dtype: torch.dtype = torch.float32,
    group: dist.ProcessGroup | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, tensor) for every tensor of the checkpoint, from the parameters of all ranks.

    Every rank calls this and exhausts the iterator. Rank 0 yields the tensors, on the CPU, one at a time; the others
    send it what it lacks and yield nothing.

    tensors: the entries of this rank's parameters, which `read(name)` returns.
    dtype: of the tensors that are yielded and of what is sent.
    group: the ranks that hold the model, replicas allowed; None for the default group, or for no other rank without it.
    Raises ValueError, on every rank and before anything is sent, when no rank holds some part of a tensor.
    """
    ranks = dist.get_world_size(group) if dist.is_initialized() else 1
    rank = dist.get_rank(group) if ranks > 1 else 0
    manifests = [manifest(shape.tensors(), tensors)] * ranks
    if ranks > 1:
        dist.all_gather_object(manifests, manifests[rank], group=group)
    pieces = _pieces(join(manifests), shape)
    merged: dict[str, Tensor] = {}  # at most one: neighbouring tensors are often of the same parameter

    def local(piece: _Piece) -> Tensor:
        if piece.parameter not in merged:
            merged.clear()
            weight = read(piece.parameter)
            merged[piece.parameter] = weight if isinstance(weight, Tensor) else weight.merged()
        return window(merged[piece.parameter], piece.at, piece.size)

    for name, size in shape.tensors().items():
        if rank:
            for piece in pieces[name]:
                if piece.rank == rank:
                    _send(local(piece).to(dtype), group)
            continue
        tensor = torch.empty(size, dtype=dtype)
        for piece in pieces[name]:
            into = window(tensor, piece.start, piece.size)
            if piece.rank:
                _receive(into, piece.rank, group)
            else:
                into.copy_(local(piece))
        yield name, tensor


def _pieces(joined: dict, shape: ModelShape) -> dict[str, list[_Piece]]:
    """What each tensor of the checkpoint is put together from. The first rank that holds an element gives it."""
    homes: dict[str, list] = {}
    for item in joined["tensors"]:
        for s in item["segments"]:
            homes.setdefault(s["tensor"], []).append(((item["name"], s), box_of(s["start"], s["size"])))
    pieces = {}
    for name, size in shape.tensors().items():
        found, missing = cover(box_of([0] * len(size), size), homes.get(name, ()))
        if missing:
            raise ValueError(
                f"export: no rank holds {words(missing[0])} of {name}; call it on all ranks of a whole model."
            )
        pieces[name] = []
        for (home, s), part in found:
            rank, _, parameter = home.partition("/")
            start = [low for low, _ in part]
            at = move(start, s["start"], s["at"])
            pieces[name].append(_Piece(rank=int(rank), parameter=parameter, at=at, start=start, size=size_of(part)))
    return pieces


def _device(group: dist.ProcessGroup | None) -> torch.device:
    """Where tensors must be for the group to send them."""
    return torch.device("cuda" if "nccl" in dist.get_backend(group) else "cpu")


def _send(piece: Tensor, group: dist.ProcessGroup | None) -> None:
    dist.send(piece.to(_device(group)).contiguous(), group=group, group_dst=0)


def _receive(into: Tensor, rank: int, group: dist.ProcessGroup | None) -> None:
    device = _device(group)
    if into.is_contiguous() and into.device == device:
        dist.recv(into, group=group, group_src=rank)
        return
    buffer = torch.empty(into.shape, dtype=into.dtype, device=device)
    dist.recv(buffer, group=group, group_src=rank)
    into.copy_(buffer)
