"""What a plan does: check both sides, write, read back."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from aligner import ops
from aligner.models.lora import LowRank
from aligner.models.weights import window

TILE = 1 << 19  # elements of a merged tile, 2 MiB: it stays in the cache between the product and the copy


class Written(NamedTuple):
    """One piece of the destination, and the checksum of what was written to it."""

    name: str
    view: Tensor
    checksum: int


def check(item: dict, weight: Tensor | LowRank | None, side: str) -> None:
    """Raise ValueError unless `weight` is what the manifest entry `item` says, down to the bytes behind it."""
    what = f"refit: {side} {item['name']}"
    if weight is None:
        raise ValueError(f"{what} is missing; the {side} must hold what its manifest lists.")
    shape = tuple(item["shape"])
    if isinstance(weight, LowRank):
        base, rank = weight.base, weight.b.shape[-1]
        if weight.b.shape != (shape[0], rank) or weight.a.shape != (rank, shape[-1]):
            got = f"{list(weight.b.shape)} x {list(weight.a.shape)}"
            raise ValueError(f"{what} has an adapter of {got}, expected factors of {list(shape)}.")
        tensors = [base, weight.b, weight.a]
    else:
        base, tensors = weight, [weight]
    dtype = str(base.dtype).removeprefix("torch.")
    if base.shape != shape or dtype != item["dtype"]:
        raise ValueError(
            f"{what} is {dtype} {list(base.shape)}, its manifest says {item['dtype']} {list(shape)}; "
            "publish the manifest again and compile a new plan."
        )
    for t in tensors:
        if t.is_contiguous():
            last = t.storage_offset() + t.numel() - 1
        else:
            last = t.storage_offset() + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
        needed = (last + 1) * t.element_size() if t.numel() else 0
        if t.untyped_storage().nbytes() < needed:
            raise ValueError(
                f"{what} is cut short: {t.untyped_storage().nbytes()} bytes are behind it, its shape needs {needed}."
            )


@torch.no_grad()
def write(copies: Sequence, weight: Callable[[str], Tensor | LowRank], destination: dict[str, Tensor]) -> list[Written]:
    """Execute copies (refit.plan.Copy): plain ones in one call, those of a weight under an adapter by tiles of it."""
    sources, into, adapted = [], [], {}
    for copy in copies:
        held = weight(copy.source)
        if isinstance(held, LowRank):
            adapted.setdefault(copy.source, (held, []))[1].append(copy)
        else:
            sources.append(window(held, copy.source_at, copy.size))
            into.append((copy.destination, window(destination[copy.destination], copy.destination_at, copy.size)))
    written = _copy(sources, into)
    for held, its_copies in adapted.values():
        written += _write_merged(held, its_copies, destination)
    return written


def _copy(sources: Sequence[Tensor], into: Sequence[tuple[str, Tensor]]) -> list[Written]:
    if not sources:
        return []
    sums = ops.refit_copy(sources, [view for _, view in into], checksum=True).tolist()
    return [Written(name, view, checksum) for (name, view), checksum in zip(into, sums, strict=True)]


def _write_merged(weight: LowRank, copies: Sequence, destination: dict[str, Tensor]) -> list[Written]:
    rows, columns = weight.base.shape
    step = max(1, TILE // columns)
    tile, written = weight.base.new_empty(min(step, rows), columns), []
    for row in range(0, rows, step):
        merged = tile[: min(step, rows - row)]
        weight.window((row, 0), merged.shape).merged(out=merged)
        sources, into = [], []
        for c in copies:
            low, high = max(row, c.source_at[0]), min(row + len(merged), c.source_at[0] + c.size[0])
            if low < high:
                size = (high - low, c.size[1])
                at = (c.destination_at[0] + low - c.source_at[0], c.destination_at[1])
                sources.append(window(merged, (low - row, c.source_at[1]), size))
                into.append((c.destination, window(destination[c.destination], at, size)))
        written += _copy(sources, into)
    return written


@torch.no_grad()
def verify(written: Sequence[Written]) -> None:
    """Read everything back. Raises RuntimeError when a piece no longer holds what was written to it."""
    views = [piece.view for piece in written]
    sums = ops.refit_copy(views, views, checksum=True).tolist()  # onto itself: only the checksum is taken
    bad = [piece.name for piece, now in zip(written, sums, strict=True) if piece.checksum != now]
    if bad:
        raise RuntimeError(
            f"refit: {len(bad)} of {len(written)} pieces read back other than they were written, the first in {bad[0]}"
        )
