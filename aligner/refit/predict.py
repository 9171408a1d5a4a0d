"""What a refit into TensorRT-LLM would move, and how long that should take, before either side exists.

Both sides' manifests are written from the model's shape, on meta tensors, and the plans are compiled from them as an
engine's ranks will do. Neither Megatron-core nor TensorRT-LLM is imported. Parameters stand in the order in which the
modules register them, because a plan's digest names it: the trainer's as models.network has it; an engine that
registers its own in another order than engine_manifest() has plans of other digests, and the same copies.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aligner.models.shape import ModelShape
from aligner.models.weights import join, manifest, megatron_entry
from aligner.refit.plan import Plan, compile_plan
from aligner.refit.trtllm_layout import check_shape, engine_entry

LETTERS = 12  # of a digest, as messages have them
Sizes = dict[str, tuple[int, ...]]


def trainer_manifests(shape: ModelShape, *, tensor: int, pipeline: int, dtype: torch.dtype) -> list[dict]:
    """What the ranks of a trainer's replica publish, the tensor rank changing fastest.

    The vocabulary is not padded: models.parallel wants it to be shared by the tensor ranks as it is. Stages have as
    many layers, or differ by one.
    Raises ValueError for a parameter that the tensor ranks cannot share.
    """
    model, found = shape.tensors(), []
    for stage in range(pipeline):
        held = _meta(_trainer_sizes(shape, tensor, stage, pipeline), dtype)
        for rank in range(tensor):
            entries = [megatron_entry(name, t, shape, rank=rank, ranks=tensor) for name, t in held.items()]
            found.append(manifest(model, entries))
    return found


def engine_manifest(shape: ModelShape, *, rank: int, ranks: int, dtype: torch.dtype) -> dict:
    """What the tensor rank `rank` of `ranks` of an unquantised engine publishes."""
    held = _meta(_engine_sizes(shape, ranks), dtype)
    return manifest(shape.tensors(), [engine_entry(name, t, shape, rank=rank, ranks=ranks) for name, t in held.items()])


def given(plan: Plan) -> dict[int, int]:
    """Trainer rank -> bytes that it gives, in the trainer's dtype: the reader casts. Ranks that give none are absent.

    plan: of manifests that models.weights.join made.
    """
    found: dict[int, int] = {}
    for c in plan.copies:
        rank, width = int(c.source.partition("/")[0]), getattr(torch, plan.sources[c.source]["dtype"]).itemsize
        found[rank] = found.get(rank, 0) + width * torch.Size(c.size).numel()
    return found


def describe(
    shape: ModelShape,
    *,
    tensor: int,
    pipeline: int,
    ranks: int,
    source_dtype: torch.dtype,
    dtype: torch.dtype,
    node_gb_s: float = 400.0,
    network_gb_s: float = 50.0,
) -> str:
    """The plans of a refit from tensor x pipeline trainer ranks into an engine of `ranks` tensor ranks, as text.

    source_dtype, dtype: of the trainer's weights, which is what travels, and of the engine's.
    node_gb_s, network_gb_s: 1e9 bytes/s into or out of one rank, within a node and over the network. The seconds made
    of them are predictions: only plans are compiled.
    Raises ValueError for an engine that cannot be refitted, for trainer ranks that cannot share the model, and for
    counts and rates that are not above 0.
    """
    if min(tensor, pipeline, ranks, node_gb_s, network_gb_s) <= 0:
        raise ValueError(
            f"refit: {tensor} x {pipeline} trainer ranks, {ranks} engine ranks, {node_gb_s:g} GB/s within a node and "
            f"{network_gb_s:g} GB/s over the network; expected all above 0."
        )
    check_shape(shape, ranks)
    source = join(trainer_manifests(shape, tensor=tensor, pipeline=pipeline, dtype=source_dtype))
    plans = [_compile(source, engine_manifest(shape, rank=rank, ranks=ranks, dtype=dtype)) for rank in range(ranks)]
    received = [sum(p.given.values()) for p in plans]
    whole = shape.num_bytes() // 4 * source_dtype.itemsize
    gives = [sum(p.given.get(rank, 0) for p in plans) for rank in range(tensor * pipeline)]
    busiest = max(gives)

    def predicted(sizes: Sequence[int]) -> str:
        within, over = ([size / rate / 1e9 for size in sizes] for rate in (node_gb_s, network_gb_s))
        return (
            f"predicted, not measured: {_span(within, _seconds)} within a node at {node_gb_s:g} GB/s, "
            f"{_span(over, _seconds)} over the network at {network_gb_s:g} GB/s"
        )

    lines = [
        f"refit from {tensor} tensor x {pipeline} pipeline ranks, {_word(source_dtype)}, into an engine of {ranks} "
        f"tensor ranks, {_word(dtype)}; nothing is loaded",
        f"each engine rank: {_span([p.copies for p in plans], str)} copies, receives {_span(received, _size)} from "
        f"{_span([len(p.given) for p in plans], str)} trainer ranks",
        f"  {predicted(received)}",
        f"  whole tensors instead: {_size(whole)}, "
        f"{_span([whole / n for n in received], '{:.2f}'.format)} times as much",
        f"each trainer rank: gives {_span(gives, _size)}",
        f"  the busiest, rank {gives.index(busiest)}, {predicted([busiest])}",
        f"each plan: compiled in {_span([p.seconds for p in plans], _seconds)}, table of copies "
        f"{_span([p.table for p in plans], _size)}",
        f"plans of ranks 0 to {ranks - 1}: {', '.join(p.digest[:LETTERS] for p in plans)}",
    ]
    return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class _Compiled:
    """Of one engine rank's plan, which may be large itself. given: as of given(). seconds: to compile. table: bytes."""

    copies: int
    given: dict[int, int]
    seconds: float
    table: int
    digest: str


def _compile(source: dict, destination: dict) -> _Compiled:
    began = time.perf_counter()
    plan = compile_plan(source, destination)
    return _Compiled(
        seconds=time.perf_counter() - began,
        copies=len(plan.copies),
        given=given(plan),
        table=plan.boxes.numel() * plan.boxes.element_size(),
        digest=plan.digest,
    )


def _trainer_sizes(s: ModelShape, tensor: int, stage: int, pipeline: int) -> Sizes:
    """Of a tensor rank of a stage; rounded down where ranks cannot share, which megatron_entry() refuses."""
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    vocabulary, last = (s.vocab // tensor, s.hidden), stage == pipeline - 1
    sizes: Sizes = {"embedding.word_embeddings.weight": vocabulary} if stage == 0 else {}
    for i in range(s.num_layers * stage // pipeline, s.num_layers * (stage + 1) // pipeline):
        at = f"decoder.layers.{i}."
        sizes[at + "input_layernorm.weight"] = (s.hidden,)
        sizes[at + "self_attention.linear_proj.weight"] = (s.hidden, q // tensor)
        sizes[at + "self_attention.linear_qkv.weight"] = ((q + 2 * kv) // tensor, s.hidden)
        if s.qkv_bias:
            sizes[at + "self_attention.linear_qkv.bias"] = ((q + 2 * kv) // tensor,)
        if s.qk_norm:
            sizes |= {f"{at}self_attention.{c}_layernorm.weight": (s.head_dim,) for c in "qk"}
        sizes[at + "pre_mlp_layernorm.weight"] = (s.hidden,)
        sizes[at + "mlp.linear_fc1.weight"] = (s.ffn // tensor * 2, s.hidden)
        sizes[at + "mlp.linear_fc2.weight"] = (s.hidden, s.ffn // tensor)
    if last:
        sizes["decoder.final_layernorm.weight"] = (s.hidden,)
        if not s.tied or pipeline > 1:  # a last stage apart from the first has its own copy of a tied embedding
            sizes["output_layer.weight"] = vocabulary
    return sizes


def _engine_sizes(s: ModelShape, ranks: int) -> Sizes:
    q, ffn, vocabulary = s.heads * s.head_dim // ranks, s.ffn // ranks, (-(-s.vocab // ranks), s.hidden)
    kv = max(1, s.kv_heads // ranks) * s.head_dim
    sizes: Sizes = {"model.embed_tokens.weight": vocabulary, "model.norm.weight": (s.hidden,)}
    for i in range(s.num_layers):
        at = f"model.layers.{i}."
        sizes |= {f"{at}{c}_layernorm.weight": (s.hidden,) for c in ("input", "post_attention")}
        sizes[at + "self_attn.qkv_proj.weight"] = (q + 2 * kv, s.hidden)
        if s.qkv_bias:
            sizes[at + "self_attn.qkv_proj.bias"] = (q + 2 * kv,)
        sizes[at + "self_attn.o_proj.weight"] = (s.hidden, q)
        if s.qk_norm:
            sizes |= {f"{at}self_attn.{c}_norm.weight": (s.head_dim,) for c in "qk"}
        sizes[at + "mlp.gate_up_proj.weight"] = (2 * ffn, s.hidden)
        sizes[at + "mlp.down_proj.weight"] = (s.hidden, ffn)
    return sizes if s.tied else sizes | {"lm_head.weight": vocabulary}


def _meta(sizes: Sizes, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: torch.empty(size, dtype=dtype, device="meta") for name, size in sizes.items()}


def _span(values: Sequence, word: Callable[..., str]) -> str:
    """One word where all read alike, else the least and the greatest."""
    low, high = word(min(values)), word(max(values))
    return low if low == high else f"{low} to {high}"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e3:.1f} kB"


def _seconds(value: float) -> str:
    return f"{value:.3g} s"


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
