"""Refit: move the policy's weights into the sampler, in place, by a plan that is compiled once.

Both sides publish a manifest (models.weights): their parameters, cut into boxes of the Hugging Face checkpoint. The
planner intersects the boxes. A source is any object with `manifest()` and `weights(names)`.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from aligner.models.boxes import box_of, cover, move, size_of, volume, without, words
from aligner.models.low_rank import LowRank
from aligner.refit import execute


class Source(Protocol):
    """The side that weights come from. `weights` raises when one of them is gone or not of the step that is meant."""

    def manifest(self) -> dict: ...

    def weights(self, names: Iterable[str]) -> list[Tensor | LowRank]: ...


@dataclass(frozen=True, kw_only=True)
class Copy:
    """The box of `size` at `source_at` of `source` goes to `destination_at` of `destination`."""

    source: str
    source_at: tuple[int, ...]
    destination: str
    destination_at: tuple[int, ...]
    size: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Copies that fill every element of the destination but its padding exactly once.

    digest: names the pair of manifests that the plan was compiled from.
    sources, destinations: their entries by name, of parameters that the copies touch.
    boxes: the copies as ops.refit_copy takes them.
    """

    copies: tuple[Copy, ...]
    digest: str
    sources: dict[str, dict] = field(repr=False)
    destinations: dict[str, dict] = field(repr=False)
    boxes: Tensor = field(repr=False, compare=False)

    def preflight(self, source: Source, manifest: dict, destination: dict[str, Tensor]) -> None:
        """Raise ValueError, before anything is written, unless both sides are what the plan was compiled for.

        manifest, destination: the sampler's manifest, and its live storage by name.
        """
        if pair_digest(source.manifest(), manifest) != self.digest:
            raise ValueError(
                f"refit: the plan {self.digest[:12]} was compiled from other manifests than the two sides have now; "
                "compile it again."
            )
        for item, weight in zip(self.sources.values(), source.weights(self.sources), strict=True):
            execute.check(item, weight, "source")
        for name, item in self.destinations.items():
            execute.check(item, destination.get(name), "destination")

    def execute(self, source: Source, destination: dict[str, Tensor]) -> int:
        """Copy, casting to the destination's dtype and merging adapters, then read back what was written.

        Returns the bytes written. Raises RuntimeError when other bytes are read back; then, and when the source
        raises, the destination holds a mixture.
        """
        if not self.copies:
            return 0
        into = [destination[name] for name in self.destinations]
        written = execute.write(self.boxes, source.weights(self.sources), into)
        execute.verify(written, into, list(self.destinations))
        source.weights(self.sources)  # a rank that went away or moved on while it was read says so now
        return self.num_bytes()

    def num_bytes(self) -> int:
        """Of what is written."""
        widths = torch.tensor([getattr(torch, item["dtype"]).itemsize for item in self.destinations.values()])
        return int((widths[self.boxes[:, 1]] * self.boxes[:, 6] * self.boxes[:, 7]).sum())

    def only(self, wanted: Callable[[str], bool]) -> "Plan":
        """The copies of some sources, by name; of the same pair of manifests."""
        copies = tuple(c for c in self.copies if wanted(c.source))
        used = {c.source for c in copies}
        sources = {name: item for name, item in self.sources.items() if name in used}
        return Plan(
            copies=copies,
            digest=self.digest,
            sources=sources,
            destinations=self.destinations,
            boxes=execute.box_table(copies, list(sources), list(self.destinations)),
        )


def pair_digest(source: dict, destination: dict) -> str:
    return hashlib.sha256(f"{source['digest']} {destination['digest']}".encode()).hexdigest()


def compile_plan(source: dict, destination: dict) -> Plan:
    """Intersect two manifests into a plan. Where several sources hold the same rows, the first in the manifest gives.

    Raises ValueError when the manifests are of different models, when a destination element has no source, or when
    the segments of a destination overlap or leave a gap.
    """
    if source["model"] != destination["model"]:
        ours, theirs = source["model"], destination["model"]
        odd = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
        raise ValueError(
            f"refit: {len(odd)} tensors differ between the two models, the first is {odd[0]}, "
            f"{ours.get(odd[0])} in the source and {theirs.get(odd[0])} in the destination; "
            "both sides must hold the same model."
        )
    homes: dict[str, list[tuple[dict, dict]]] = {}
    for item in source["tensors"]:
        for segment in item["segments"]:
            homes.setdefault(segment["tensor"], []).append((item, segment))
    copies = []
    for item in destination["tensors"]:
        _check_cover(item)
        for segment in item["segments"]:
            if segment["tensor"]:
                copies += _fill_segment(item, segment, homes.get(segment["tensor"], []))
    used = {c.source for c in copies}
    sources = {item["name"]: item for item in source["tensors"] if item["name"] in used}
    destinations = {item["name"]: item for item in destination["tensors"]}
    return Plan(
        copies=tuple(copies),
        digest=pair_digest(source, destination),
        sources=sources,
        destinations=destinations,
        boxes=execute.box_table(copies, list(sources), list(destinations)),
    )


def _fill_segment(item: dict, segment: dict, homes: list[tuple[dict, dict]]) -> list[Copy]:
    """Copies that fill one destination segment, each of its elements from exactly one source."""
    held = (((home["name"], s), box_of(s["start"], s["size"])) for home, s in homes)
    found, missing = cover(box_of(segment["start"], segment["size"]), held)
    if missing:
        raise ValueError(f"refit: {words(missing[0])} of {segment['tensor']}, for {item['name']}, has no source.")
    copies = []
    for (source, s), part in found:
        first = [low for low, _ in part]
        copies.append(
            Copy(
                source=source,
                source_at=move(first, s["start"], s["at"]),
                destination=item["name"],
                destination_at=move(first, segment["start"], segment["at"]),
                size=size_of(part),
            )
        )
    return copies


def _check_cover(item: dict) -> None:
    """The segments of an entry, padding among them, tile its parameter."""
    free = [box_of([0] * len(item["shape"]), item["shape"])]
    for s in item["segments"]:
        box = box_of(s["at"], s["size"])
        before, free = volume(free), [rest for f in free for rest in without(f, box)]
        if before - volume(free) != volume([box]):
            raise ValueError(f"refit: {words(box)} of {item['name']} is placed twice, or lies outside of it.")
    if free:
        raise ValueError(f"refit: {words(free[0])} of {item['name']} is placed by no segment.")
