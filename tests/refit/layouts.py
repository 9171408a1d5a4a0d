"""Truth for the planner: whole Hugging Face tensors, and by plain slicing what each trainer and engine rank holds.

The engine's layout is TensorRT-LLM's: [q | k | v] and [gate | up] in each rank, key-value heads repeated where there
are fewer of them than ranks, the vocabulary cut into ceil(V / ranks) rows with padding on the last ranks.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from aligner.models.weights import join, manifest, megatron_entry, window
from aligner.refit.trtllm_layout import engine_entry

PADDING = -7.0  # what stands in rows beyond the vocabulary


@dataclass(frozen=True, kw_only=True)
class Model:
    num_layers: int = 4
    hidden: int = 12
    ffn: int = 16
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 4
    vocab: int = 33
    tied: bool = True
    bias: bool = False
    qk_norm: bool = False


def checkpoint(m: Model) -> dict[str, Tensor]:
    """The Hugging Face tensors; no two of their elements are equal."""
    q, kv = m.heads * m.head_dim, m.kv_heads * m.head_dim
    sizes = {"model.embed_tokens.weight": (m.vocab, m.hidden), "model.norm.weight": (m.hidden,)}
    if not m.tied:
        sizes["lm_head.weight"] = (m.vocab, m.hidden)
    for i in range(m.num_layers):
        at = f"model.layers.{i}."
        for c, rows in (("q", q), ("k", kv), ("v", kv)):
            sizes[f"{at}self_attn.{c}_proj.weight"] = (rows, m.hidden)
            if m.bias:
                sizes[f"{at}self_attn.{c}_proj.bias"] = (rows,)
        if m.qk_norm:
            sizes |= {f"{at}self_attn.{c}_norm.weight": (m.head_dim,) for c in "qk"}
        sizes[at + "self_attn.o_proj.weight"] = (m.hidden, q)
        sizes |= {f"{at}mlp.{c}_proj.weight": (m.ffn, m.hidden) for c in ("gate", "up")}
        sizes[at + "mlp.down_proj.weight"] = (m.hidden, m.ffn)
        sizes |= {f"{at}{c}_layernorm.weight": (m.hidden,) for c in ("input", "post_attention")}
    values = torch.arange(1, 1 + sum(math.prod(s) for s in sizes.values()), dtype=torch.float32)
    assert len(values) < 1 << 24  # integers that float32 holds
    pieces = values.split([math.prod(s) for s in sizes.values()])
    return {name: piece.view(size) for (name, size), piece in zip(sizes.items(), pieces, strict=True)}


def megatron_rank(m: Model, full: dict[str, Tensor], tp: int, pp: int, tr: int, pr: int, multiple: int) -> dict:
    """Parameters of Megatron-core's GPTModel on tensor rank tr of stage pr; vocabulary padded to multiple * tp."""
    held, layers = {}, m.num_layers // pp

    def vocabulary(name: str) -> Tensor:
        rows = math.ceil(m.vocab / (multiple * tp)) * multiple * tp
        return pad(full[name], (0, 0, 0, rows - m.vocab), value=PADDING).chunk(tp)[tr]

    if pr == 0:
        held["embedding.word_embeddings.weight"] = vocabulary("model.embed_tokens.weight")
    for i in range(layers):
        mine, hf = f"decoder.layers.{i}.", f"model.layers.{pr * layers + i}."
        held[mine + "input_layernorm.weight"] = full[hf + "input_layernorm.weight"]
        held[mine + "pre_mlp_layernorm.weight"] = full[hf + "post_attention_layernorm.weight"]
        for kind in ("weight", "bias") if m.bias else ("weight",):
            q, k, v = (full[f"{hf}self_attn.{c}_proj.{kind}"].chunk(m.kv_heads) for c in "qkv")
            rows = torch.cat([torch.cat(group) for group in zip(q, k, v, strict=True)])
            held[f"{mine}self_attention.linear_qkv.{kind}"] = rows.chunk(tp)[tr]
        if m.qk_norm:
            for c in "qk":
                held[f"{mine}self_attention.{c}_layernorm.weight"] = full[f"{hf}self_attn.{c}_norm.weight"]
        held[mine + "self_attention.linear_proj.weight"] = full[hf + "self_attn.o_proj.weight"].chunk(tp, 1)[tr]
        gate, up = (full[f"{hf}mlp.{c}_proj.weight"].chunk(tp)[tr] for c in ("gate", "up"))
        held[mine + "mlp.linear_fc1.weight"] = torch.cat([gate, up])
        held[mine + "mlp.linear_fc2.weight"] = full[hf + "mlp.down_proj.weight"].chunk(tp, 1)[tr]
    if pr == pp - 1:
        held["decoder.final_layernorm.weight"] = full["model.norm.weight"]
        if not m.tied or pp > 1:  # a last stage apart from the first has its own copy of a tied embedding
            held["output_layer.weight"] = vocabulary("model.embed_tokens.weight" if m.tied else "lm_head.weight")
    return {name: t.contiguous() for name, t in held.items()}


@dataclass(frozen=True)
class Whole:
    """A checkpoint in memory, read as huggingface.Weights is."""

    tensors: dict[str, Tensor]

    def window(self, name: str, start: Sequence[int], size: Sequence[int]) -> Tensor:
        return window(self.tensors[name], start, size)


class Megatron:
    """All trainer ranks as one source."""

    def __init__(self, m: Model, full: dict[str, Tensor], tp: int, pp: int, multiple: int = 4):
        self.parameters, manifests, sizes = {}, [], {n: t.shape for n, t in full.items()}
        for pr in range(pp):
            for tr in range(tp):
                held = megatron_rank(m, full, tp, pp, tr, pr, multiple)
                first = pr * (m.num_layers // pp)
                entries = [megatron_entry(n, t, m, rank=tr, ranks=tp, first_layer=first) for n, t in held.items()]
                self.parameters |= {f"{len(manifests)}/{n}": t for n, t in held.items()}
                manifests.append(manifest(sizes, entries))
        self._manifest = join(manifests)

    def manifest(self) -> dict:
        return self._manifest

    def weights(self, names: Iterable[str]) -> list[Tensor]:
        return [self.parameters[name] for name in names]


def engine_rank(m: Model, full: dict[str, Tensor], ranks: int, rank: int) -> dict[str, Tensor]:
    """What a rank of the engine must hold; PADDING where it holds nothing."""
    held = {"model.norm.weight": full["model.norm.weight"]}

    def heads(tensor: Tensor) -> Tensor:  # of keys or values
        if m.kv_heads >= ranks:
            return tensor.chunk(ranks)[rank]
        return tensor.chunk(m.kv_heads)[rank * m.kv_heads // ranks]

    for name in ["model.embed_tokens.weight"] + ([] if m.tied else ["lm_head.weight"]):
        rows = math.ceil(m.vocab / ranks)
        held[name] = pad(full[name], (0, 0, 0, rows * ranks - m.vocab), value=PADDING)[rank * rows :][:rows]
    for i in range(m.num_layers):
        at = f"model.layers.{i}."
        for kind in ("weight", "bias") if m.bias else ("weight",):
            q, k, v = (full[f"{at}self_attn.{c}_proj.{kind}"] for c in "qkv")
            held[f"{at}self_attn.qkv_proj.{kind}"] = torch.cat([q.chunk(ranks)[rank], heads(k), heads(v)])
        for c in ("self_attn.q_norm", "self_attn.k_norm") if m.qk_norm else ():
            held[f"{at}{c}.weight"] = full[f"{at}{c}.weight"]
        for c in ("input_layernorm", "post_attention_layernorm"):
            held[f"{at}{c}.weight"] = full[f"{at}{c}.weight"]
        for c in ("self_attn.o_proj", "mlp.down_proj"):
            held[f"{at}{c}.weight"] = full[f"{at}{c}.weight"].chunk(ranks, 1)[rank]
        gate_up = [full[f"{at}mlp.{c}_proj.weight"].chunk(ranks)[rank] for c in ("gate", "up")]
        held[at + "mlp.gate_up_proj.weight"] = torch.cat(gate_up)
    return held


def engine_manifest(m: Model, full: dict[str, Tensor], storage: dict[str, Tensor], ranks: int, rank: int) -> dict:
    """What that rank publishes."""
    entries = [engine_entry(name, tensor, m, rank=rank, ranks=ranks) for name, tensor in storage.items()]
    return manifest({n: t.shape for n, t in full.items()}, entries)
