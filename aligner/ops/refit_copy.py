"""Many strided, casting copies in one call."""

from collections.abc import Sequence

import torch
from torch import Tensor

from aligner.ops import library
from aligner.ops.logprobs import DTYPES

PIECE = 1 << 22  # elements whose products are held at once, 32 MiB: an engine's GPU has little memory left


def refit_copy_reference(
    sources: Sequence[Tensor],
    destinations: Sequence[Tensor],
    *,
    add_one: Sequence[bool] | None = None,
    checksum: bool = False,
    boxes: Tensor | None = None,
) -> Tensor:
    """`refit_copy` in plain PyTorch: any device, any float dtype of 2 or 4 bytes."""
    if boxes is not None:
        table = boxes.tolist()
        sources, destinations = (
            [_box(sources[s], sr, sc, rows, columns) for s, _, sr, sc, _, _, rows, columns in table],
            [_box(destinations[d], dr, dc, rows, columns) for _, d, _, _, dr, dc, rows, columns in table],
        )
        if not table:
            return boxes.new_zeros(0)
    sums = []
    for source, destination, one in zip(sources, destinations, add_one or [False] * len(sources), strict=True):
        destination.copy_(source.float() + 1 if one else source)
        if checksum:
            sums.append(_checksum(destination))
    return torch.stack(sums) if sums else sources[0].new_zeros(0, dtype=torch.int64)


def _checksum(tensor: Tensor) -> Tensor:
    flat = tensor.contiguous().flatten()
    small, total = flat.element_size() == 2, torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(flat), PIECE):
        bits = flat[start : start + PIECE].view(torch.int16 if small else torch.int32).long()
        weights = 2 * torch.arange(start, start + len(bits), device=bits.device) + 1
        total += ((bits & (0xFFFF if small else 0xFFFFFFFF)) * (weights & 0xFFFFFFFF)).sum()
    return total


def _box(tensor: Tensor, row: int, column: int, rows: int, columns: int) -> Tensor:
    return (tensor if tensor.dim() == 2 else tensor[None])[row : row + rows, column : column + columns]


@torch.no_grad()
def refit_copy(
    sources: Sequence[Tensor],
    destinations: Sequence[Tensor],
    *,
    add_one: Sequence[bool] | None = None,
    checksum: bool = False,
    boxes: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""Copy every source into its destination, in place, casting on the way.

        destination[r, c] = cast(source[r, c])    or, where add_one, cast(float32(source[r, c]) + 1)
        checksum = sum over elements e in row order of bits_e * ((2 e + 1) mod 2^32), mod 2^64, bits as stored

    Source: IEEE 754-2019, section 4.3.1: casts round to nearest, ties to even.

    sources: float32, bfloat16 or float16 vectors, or matrices whose rows are any distance apart.
    destinations: the same shapes, any of the dtypes. No two may overlap. A destination may be its own source: then
        its checksum is taken, and nothing changes.
    add_one: one per copy, for norms that one side stores centred at zero; None for none.
    checksum: whether to sum up what was written.
    boxes: None for each source whole into its destination. Or (number of copies, 8) int64 on the CPU, a row a copy:
        which source, which destination, row and column in the source, row and column in the destination, rows,
        columns; a vector is one row. Then add_one and the checksums count boxes.
    impl: "auto" | "reference" | "cpp" | "cuda".

    Returns the checksums, (number of copies,) int64, or (0,) without. Raises ValueError for dtypes and devices,
    RuntimeError for shapes and strides, before anything is written.
    """
    if not sources or (boxes is None and len(sources) != len(destinations)):
        raise ValueError(f"refit_copy: got {len(sources)} sources, {len(destinations)} destinations, expected as many.")
    kinds: dict[tuple, tuple[str, Tensor]] = {}  # the first of each: there may be thousands of tensors
    for side, tensors in (("sources", sources), ("destinations", destinations)):
        for i, t in enumerate(tensors):
            kind = t.dtype, t.device
            if kind not in kinds:
                kinds[kind] = f"{side}[{i}]", t
    if not library.use_compiled("refit_copy", impl, dict(kinds.values()), DTYPES):
        return refit_copy_reference(sources, destinations, add_one=add_one, checksum=checksum, boxes=boxes)
    ones = list(add_one) if add_one is not None else []
    return torch.ops.aligner.refit_copy(list(sources), list(destinations), ones, checksum, boxes)


if library.LOADED:

    @torch.library.register_fake("aligner::refit_copy")
    def _(sources, destinations, add_one, checksum, boxes=None):
        copies = len(sources) if boxes is None else boxes.shape[0]
        return sources[0].new_empty(copies if checksum else 0, dtype=torch.int64)
