"""Arithmetic of boxes: rectangular parts of a tensor, each axis a range (first, one past the last)."""

import math
from collections.abc import Iterable, Sequence
from typing import TypeVar

Box = tuple[tuple[int, int], ...]
Holder = TypeVar("Holder")


def box_of(at: Sequence[int], size: Sequence[int]) -> Box:
    return tuple((a, a + n) for a, n in zip(at, size, strict=True))


def size_of(box: Box) -> tuple[int, ...]:
    return tuple(high - low for low, high in box)


def move(point: Sequence[int], origin: Sequence[int], to: Sequence[int]) -> tuple[int, ...]:
    """Where `point` comes to lie when `origin` is moved to `to`."""
    return tuple(p - o + t for p, o, t in zip(point, origin, to, strict=True))


def common(a: Box, b: Box) -> Box | None:
    box = tuple((max(x[0], y[0]), min(x[1], y[1])) for x, y in zip(a, b, strict=True))
    return box if all(low < high for low, high in box) else None


def without(box: Box, hole: Box) -> list[Box]:
    """Disjoint boxes that make up `box` outside of `hole`: slabs, one axis after the other."""
    inside = common(box, hole)
    if inside is None:
        return [box]
    rest = []
    for axis, ((low, high), (first, last)) in enumerate(zip(box, inside, strict=True)):
        for part in ((low, first), (last, high)):
            if part[0] < part[1]:
                rest.append((*inside[:axis], part, *box[axis + 1 :]))
    return rest


def cover(box: Box, held: Iterable[tuple[Holder, Box]]) -> tuple[list[tuple[Holder, Box]], list[Box]]:
    """Parts that fill `box`, each from the first holder that has it, and the parts that nobody has."""
    missing, found = [box], []
    for holder, theirs in held:
        if not missing:
            break
        found += [(holder, part) for part in (common(m, theirs) for m in missing) if part]
        missing = [rest for m in missing for rest in without(m, theirs)]
    return found, missing


def volume(boxes: Iterable[Box]) -> int:
    return sum(math.prod(size_of(box)) for box in boxes)


def words(box: Box) -> str:
    return " x ".join(f"{low}..{high}" for low, high in box)
