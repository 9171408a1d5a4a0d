"""What a plan does: check both sides, write, read back."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from aligner import ops
from aligner.models.low_rank import LowRank

TILE = 1 << 19  # elements of a merged tile, 2 MiB: it stays in the cache between the product and the copy


class Written(NamedTuple):
    """What was written to the destinations: boxes as ops.refit_copy takes them, the sums over each."""

    boxes: Tensor
    checksums: Tensor


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
    if base.shape != shape or base.dtype is not getattr(torch, item["dtype"]):
        dtype = str(base.dtype).removeprefix("torch.")
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


def box_table(copies: Sequence, sources: Sequence[str], destinations: Sequence[str]) -> Tensor:
    """Copies (refit.plan.Copy) as ops.refit_copy takes them, tensors numbered by their place in the lists of names."""
    numbers = ({name: i for i, name in enumerate(names)} for names in (sources, destinations))
    source_of, destination_of = numbers
    rows = []
    for c in copies:
        at = (*_matrix(c.source_at, 0), *_matrix(c.destination_at, 0), *_matrix(c.size, 1))
        rows.append([source_of[c.source], destination_of[c.destination], *at])
    return torch.tensor(rows, dtype=torch.int64).view(-1, 8)


def _matrix(place: Sequence[int], row: int) -> tuple[int, int]:
    """A vector is a matrix of one row."""
    return (place[0], place[1]) if len(place) == 2 else (row, place[0])


@torch.no_grad()
def write(boxes: Tensor, sources: Sequence[Tensor | LowRank], destinations: Sequence[Tensor]) -> Written:
    """Execute the copies: those of a weight under an adapter by tiles of it, all others in one call."""
    adapted = [i for i, weight in enumerate(sources) if isinstance(weight, LowRank)]
    if not adapted:
        return Written(boxes, ops.refit_copy(sources, destinations, checksum=True, boxes=boxes))
    merged = torch.isin(boxes[:, 0], torch.tensor(adapted))
    plain = boxes[~merged]
    bases = [weight.base if isinstance(weight, LowRank) else weight for weight in sources]
    written = [Written(plain, ops.refit_copy(bases, destinations, checksum=True, boxes=plain))]
    for i in adapted:
        written += _write_merged(sources[i], boxes[boxes[:, 0] == i].tolist(), destinations)
    return Written(torch.cat([w.boxes for w in written]), torch.cat([w.checksums for w in written]))


def _write_merged(weight: LowRank, boxes: list[list[int]], destinations: Sequence[Tensor]) -> list[Written]:
    rows, columns = weight.base.shape
    step = max(1, TILE // columns)
    tile, written = weight.base.new_empty(min(step, rows), columns), []
    for row in range(0, rows, step):
        merged = tile[: min(step, rows - row)]
        weight.window((row, 0), merged.shape).merged(out=merged)
        pieces = []
        for _, to, source_row, source_column, to_row, to_column, count, width in boxes:
            low, high = max(row, source_row), min(row + len(merged), source_row + count)
            if low < high:
                at = (low - row, source_column, to_row + low - source_row, to_column)
                pieces.append([0, to, *at, high - low, width])
        if pieces:
            table = torch.tensor(pieces)
            into, table_of_into = table[:, 1].unique(return_inverse=True)
            local = table.clone()
            local[:, 1] = table_of_into
            sums = ops.refit_copy([merged], [destinations[i] for i in into], checksum=True, boxes=local)
            written.append(Written(table, sums))
    return written


def checksums(boxes: Tensor, destinations: Sequence[Tensor]) -> Tensor:
    """Of what the destinations hold in the boxes."""
    onto_itself = boxes[:, [1, 1, 4, 5, 4, 5, 6, 7]]  # nothing changes
    return ops.refit_copy(destinations, destinations, checksum=True, boxes=onto_itself)


@torch.no_grad()
def verify(written: Written, destinations: Sequence[Tensor], names: Sequence[str]) -> None:
    """Read everything back. Raises RuntimeError when a piece no longer holds what was written to it."""
    sums = checksums(written.boxes, destinations)
    bad = (sums != written.checksums).nonzero().flatten().tolist()
    if bad:
        raise RuntimeError(
            f"refit: {len(bad)} of {len(sums)} pieces read back other than they were written, the first in "
            f"{names[written.boxes[bad[0], 1]]}"
        )
