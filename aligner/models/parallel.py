"""Which layouts a model fits, and what each rank of one holds."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from aligner.models.lora import ROW_PARALLEL, LoRAConfig
from aligner.models.shape import ModelShape
from aligner.run.distributed import ParallelConfig


def check(parallel: ParallelConfig, shape: ModelShape, what: str = "the model") -> None:
    """Raise ValueError, one sentence, when `shape` cannot be dealt to the ranks of the layout."""
    split = {
        "attention heads": shape.heads,
        "key-value heads": shape.kv_heads,
        "inner MLP columns": shape.ffn,
        "vocabulary entries": shape.vocab,
    }
    for name, count in split.items():
        if count % parallel.tensor:
            fits = [n for n in range(1, count + 1) if all(x % n == 0 for x in split.values())]
            raise ValueError(
                f"parallel.tensor is {parallel.tensor}, which does not divide the {count} {name} of {what}; "
                f"expected one of {', '.join(map(str, fits))}."
            )
    stages = parallel.pipeline * parallel.virtual_pipeline
    if shape.num_layers % stages:
        virtual = f" x parallel.virtual-pipeline {parallel.virtual_pipeline}" if parallel.virtual_pipeline > 1 else ""
        fits = [n for n in range(1, shape.num_layers + 1) if shape.num_layers % n == 0]
        raise ValueError(
            f"parallel.pipeline {parallel.pipeline}{virtual} makes {stages} stages, which do not divide the "
            f"{shape.num_layers} layers of {what}; expected a divisor of it, {', '.join(map(str, fits))}."
        )


@dataclass(frozen=True, kw_only=True)
class NetworkPlan:
    """A network of a run.

    shape: with the layers that it has. value_head: entries of the head in place of an output layer; 0 for none.
    trained: False for one that only answers.
    """

    name: str
    shape: ModelShape
    lora: LoRAConfig
    value_head: int = 0
    trained: bool = True


@dataclass(frozen=True, kw_only=True)
class Held:
    """What one rank of a pipeline stage holds of a network.

    layers: first and last of each chunk. weights, trained: entries of all its tensors, and of those that are trained.
    """

    layers: list[tuple[int, int]]
    weights: int
    trained: int


def held(plan: NetworkPlan, parallel: ParallelConfig, stage: int) -> Held:
    """Of a rank of the pipeline stage `stage`; all ranks of a stage hold as much."""
    shape, t, chunks = plan.shape, parallel.tensor, parallel.virtual_pipeline
    each = shape.num_layers // (parallel.pipeline * chunks)
    starts = [(c * parallel.pipeline + stage) * each for c in range(chunks)]
    first, last = stage == 0, stage == parallel.pipeline - 1
    query, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    norms = 2 * shape.hidden + 2 * shape.head_dim * shape.qk_norm
    layer = shape.layer_weights() // t + norms + (query + 2 * kv) * shape.qkv_bias // t
    embedding = shape.vocab * shape.hidden // t
    base = each * chunks * layer + first * embedding + last * shape.hidden
    if last and not plan.value_head and not (shape.tied and first):  # the last stage has a copy of a tied embedding
        base += embedding
    head = plan.value_head if last else 0
    adapters = each * chunks * _adapter(plan, t) if plan.lora.rank and plan.trained else 0
    return Held(
        layers=[(a, a + each - 1) for a in starts],
        weights=base + adapters + head,
        trained=(adapters or base) + head if plan.trained else 0,
    )


def _adapter(plan: NetworkPlan, tensor: int) -> int:
    """Entries of one layer's adapters on one of `tensor` ranks."""
    shape, query = plan.shape, plan.shape.heads * plan.shape.head_dim
    sizes = {
        "linear_qkv": (query + 2 * shape.kv_heads * shape.head_dim, shape.hidden),
        "linear_proj": (shape.hidden, query),
        "linear_fc1": (2 * shape.ffn, shape.hidden),
        "linear_fc2": (shape.hidden, shape.ffn),
    }
    return plan.lora.rank * sum(
        out + into // tensor if kind in ROW_PARALLEL else out // tensor + into
        for kind, (out, into) in sizes.items()
        if kind in plan.lora.targets
    )


def describe(parallel: ParallelConfig, plans: Sequence[NetworkPlan], world: int, dtype: torch.dtype) -> str:
    """Which rank holds what, and its bytes, as text; nothing is loaded. Activations are not counted."""
    data = parallel.data(world)
    lines = [
        f"{world} processes: {parallel.tensor} tensor x {parallel.context} context x {data} data x "
        f"{parallel.pipeline} pipeline ranks; the tensor rank changes fastest, the pipeline stage slowest",
    ]
    wide = parallel.tensor * parallel.context
    for stage in range(parallel.pipeline):
        first = stage * wide * data
        lines.append(f"pipeline stage {stage}: ranks {_span(first, first + wide * data - 1)}")
        total = 0
        for plan in plans:
            h = held(plan, parallel, stage)
            size = _bytes(h, parallel, data, dtype)
            total += sum(size.values())
            parts = ["embedding"] if stage == 0 else []
            parts += ["layers " + ", ".join(_span(*span) for span in h.layers)]
            if stage == parallel.pipeline - 1:
                parts += ["value head" if plan.value_head else "output layer"]
            lines.append(f"  {plan.name}: {', '.join(parts)}")
            lines.append("    " + ", ".join(f"{what} {_gb(n)}" for what, n in size.items()) + " a rank")
        lines.append(f"  together {_gb(total)} a rank, without activations")
    lines.append(f"one rank of each replica also samples and asks for rewards: {_few([wide * d for d in range(data)])}")
    return "\n".join(lines)


def _bytes(h: Held, parallel: ParallelConfig, data: int, dtype: torch.dtype) -> dict[str, int]:
    masters = 4 if dtype == torch.bfloat16 else 0
    shares = data * parallel.context if parallel.distributed_optimizer else 1
    return {
        "weights": h.weights * dtype.itemsize,
        "gradients": 4 * h.trained,
        "optimizer": -(-(8 + masters) * h.trained // shares),
    }


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"


def _span(first: int, last: int) -> str:
    return f"{first}" if first == last else f"{first}-{last}"


def _few(ranks: list[int]) -> str:
    shown = ranks if len(ranks) <= 8 else [*ranks[:3], "...", ranks[-1]]
    return ", ".join(map(str, shown))
