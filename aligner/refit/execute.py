"""What a plan does: check both sides, write, read back."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from aligner import ops
from aligner.models.lora import LowRank
from aligner.models.weights import window

TILE = 1 << 18  # elements of a merged tile, 1 MiB: it stays in the cache between the product and the copy


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
        last = t.storage_offset() + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
        needed = (last + 1) * t.element_size() if t.numel() else 0
        if t.untyped_storage().nbytes() < needed:
            raise ValueError(
                f"{what} is cut short: {t.untyped_storage().nbytes()} bytes are behind it, its shape needs {needed}."
            )


@torch.no_grad()
def write(copies: Sequence, weight: Callable[[str], Tensor | LowRank], destination: dict[str, Tensor]) -> list[Written]:
    """Execute copies (refit.plan.Copy): plain ones in one call, adapters merged tile by tile."""
    sources, views, names, written = [], [], [], []
    for copy in copies:
        from_, into = weight(copy.source), window(destination[copy.destination], copy.destination_at, copy.size)
        if isinstance(from_, LowRank):
            written += _write_merged(from_.window(copy.source_at, copy.size), into, copy.destination)
        else:
            sources.append(window(from_, copy.source_at, copy.size))
            views.append(into)
            names.append(copy.destination)
    if views:
        sums = ops.refit_copy(sources, views, checksum=True).tolist()
        written += [Written(*row) for row in zip(names, views, sums, strict=True)]
    return written


def _write_merged(weight: LowRank, into: Tensor, name: str) -> list[Written]:
    rows, columns = into.shape
    step = max(1, TILE // columns)
    tile = torch.empty(min(step, rows), columns, dtype=weight.base.dtype)
    written = []
    for row in range(0, rows, step):
        size = (min(step, rows - row), columns)
        merged, view = tile[: size[0]], into.narrow(0, row, size[0])
        weight.window((row, 0), size).merged(out=merged)
        written.append(Written(name, view, ops.refit_copy([merged], [view], checksum=True).item()))
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
