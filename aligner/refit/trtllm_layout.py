"""What a rank of TensorRT-LLM's PyTorch backend holds, and which of it a refit may write directly.

    qkv_proj       [q | k | v] of this rank, key-value heads repeated where there are fewer of them than ranks
    gate_up_proj   [gate | up] of this rank
    o_proj, down_proj   this rank's columns
    embed_tokens, lm_head   ceil(vocab / ranks) rows, padding after the last token
    norms          whole

Source: TensorRT-LLM, modules/linear.py, modules/embedding.py and models/checkpoints/hf/weight_mapper.py of its PyTorch
backend (tests/contracts). Nothing of it is imported here, nor Megatron-core: this runs in the engine's workers.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aligner.models.shape import ModelShape
from aligner.models.weights import Part, entry, manifest

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
UNQUANTISED = "UnquantizedLinearMethod"
ALIAS = "next_layer_layernorm"
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True, kw_only=True)
class Survey:
    """A rank's model: what a refit writes, and what it leaves to upstream's own reload.

    manifest: as of models.weights, of what is written directly. parameters: their live storage, by name.
    reloaded: Hugging Face names of the tensors behind modules that must not be written directly.
    """

    manifest: dict
    parameters: dict[str, Tensor]
    reloaded: list[str]


def check_shape(shape: ModelShape, ranks: int) -> None:
    """Raise ValueError, with all reasons at once, where an engine of so many tensor ranks cannot be refitted."""
    reasons = []
    if shape.heads % ranks:
        reasons.append(f"{shape.heads} heads are not shared by {ranks} ranks")
    if shape.ffn % ranks:
        reasons.append(f"{shape.ffn} columns of the MLP are not shared by {ranks} ranks")
    if max(shape.kv_heads, ranks) % min(shape.kv_heads, ranks):
        reasons.append(f"{shape.kv_heads} key-value heads and {ranks} ranks do not divide each other")
    if shape.qkv_bias and ranks > shape.kv_heads:
        # HfWeightMapper._duplicate_kv repeats each element of a bias and not each head; who is right is not settled.
        reasons.append(f"a bias of {shape.kv_heads} key-value heads on {ranks} ranks is repeated otherwise upstream")
    if reasons:
        raise ValueError(f"refit: {'; '.join(reasons)}. Choose another tensor_parallel_size of the engine.")


def engine_entry(name: str, tensor: Tensor, shape: ModelShape, *, rank: int, ranks: int) -> dict:
    """The manifest entry of one of the engine's parameters. Raises KeyError for a name that is none of them."""
    axis, parts = _parts(name, shape, rank, ranks)
    return entry(name, tensor, parts, axis)


def _parts(name: str, shape: ModelShape, rank: int, ranks: int) -> tuple[int, list[Part]]:
    """(axis along which they lie, boxes of the checkpoint that this rank's parameter holds)."""
    if name in VOCABULARY:
        rows = -(-shape.vocab // ranks)
        held = max(0, min(rows, shape.vocab - rank * rows))
        return 0, ([(name, rank * rows, held)] if held else []) + ([(None, 0, rows - held)] if held < rows else [])
    if name == "model.norm.weight":
        return 0, [(name, 0, shape.hidden)]
    _, _, layer, rest = name.split(".", 3)
    at, (module, _, kind) = f"model.layers.{int(layer)}.", rest.rpartition(".")
    if module == "self_attn.qkv_proj":
        queries, copies = shape.heads * shape.head_dim // ranks, max(1, ranks // shape.kv_heads)
        keys = shape.kv_heads * copies * shape.head_dim // ranks
        begin = rank // copies * keys
        kv = [(f"{at}self_attn.{c}_proj.{kind}", begin, keys) for c in "kv"]
        return 0, [(f"{at}self_attn.q_proj.{kind}", rank * queries, queries), *kv]
    if module == "mlp.gate_up_proj":
        rows = shape.ffn // ranks
        return 0, [(f"{at}mlp.{c}_proj.{kind}", rank * rows, rows) for c in ("gate", "up")]
    if module in ("self_attn.o_proj", "mlp.down_proj"):
        columns = (shape.heads * shape.head_dim if module == "self_attn.o_proj" else shape.ffn) // ranks
        return 1, [(name, rank * columns, columns)]
    length = {
        "input_layernorm": shape.hidden,
        "post_attention_layernorm": shape.hidden,
        "self_attn.q_norm": shape.head_dim,
        "self_attn.k_norm": shape.head_dim,
    }[module]
    return 0, [(name, 0, length)]


def survey(model: nn.Module, shape: ModelShape, *, rank: int, ranks: int) -> Survey:
    """Look at a rank's live modules.

    Raises ValueError, which lists all of them at once, for parameters and buffers of floating point that no entry
    covers, for those of another shape than the model's, for quantised modules, and for memory that two of them share
    in part.
    """
    check_shape(shape, ranks)
    entries, parameters, reloaded, covered = [], {}, [], set()
    odd = [f"{name} is quantised ({method})" for name, method in _quantised(model)]
    for name, tensor, module in _held(model):
        try:
            axis, parts = _parts(name, shape, rank, ranks)
        except (KeyError, ValueError):
            odd.append(f"{name} {list(tensor.shape)} is no part of the model")
            continue
        behind = [part for part, _, _ in parts if part]
        covered.update(behind)
        if not _writable(module):
            reloaded += behind
            continue
        try:
            entries.append(entry(name, tensor, parts, axis))
        except ValueError as error:
            odd.append(str(error))
        parameters[name] = tensor
    no_rows = {name for name in VOCABULARY if rank * -(-shape.vocab // ranks) >= shape.vocab}
    absent = sorted(name for name in shape.tensors() if name not in covered | no_rows)
    odd += [f"{name} is nowhere in the engine" for name in absent] + _overlaps(parameters)
    if odd:
        raise ValueError(f"refit: {len(odd)} things of the engine fit no refit: {'; '.join(odd)}.")
    return Survey(manifest=manifest(shape.tensors(), entries), parameters=parameters, reloaded=reloaded)


def bindings(model: nn.Module) -> list[tuple]:
    """Where everything lies: a refit never moves anything, or captured CUDA graphs would read the old place."""
    return [(t.data_ptr(), t.shape, t.stride(), t.dtype) for t in (*model.parameters(), *model.buffers())]


def _quantised(model: nn.Module) -> Iterator[tuple[str, str]]:
    """(name, method) of modules whose weights are not a checkpoint's numbers, which a trainer has no scales for."""
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if method is not None and type(method).__name__ != UNQUANTISED:
            yield name, type(method).__name__


def _held(model: nn.Module) -> Iterator[tuple[str, Tensor, nn.Module]]:
    """(name, storage, module) of parameters and buffers of floating point, each storage once.

    Upstream's reload skips aliases too: next_layer_layernorm, a tied lm_head.
    """
    seen = set()
    modules = sorted(model.named_modules(remove_duplicate=False), key=lambda item: item[0].endswith(ALIAS))
    for prefix, module in modules:
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            place = tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.numel()
            if tensor.is_floating_point() and place not in seen:
                seen.add(place)
                yield f"{prefix}.{name}".lstrip("."), tensor.detach(), module


def _writable(module: nn.Module) -> bool:
    """Whether nothing lies between a checkpoint's numbers and the module's memory. Fails closed."""
    if getattr(module, "rebuild_tensor_metadata", None) or getattr(module, "transform_weights", None):
        return False
    return all(t.dtype in DTYPES for t in module.parameters(recurse=False))


def _overlaps(parameters: dict[str, Tensor]) -> list[str]:
    spans = sorted(
        (t.untyped_storage().data_ptr() + t.storage_offset() * t.element_size(), t.numel() * t.element_size(), name)
        for name, t in parameters.items()
    )
    pairs = zip(spans[:-1], spans[1:], strict=True)
    return [f"{a} and {b} share memory" for (at, size, a), (after, _, b) in pairs if at + size > after]
