"""Refit: move the policy's weights into the sampler, in place, by a plan that is compiled once.

Both sides publish a manifest: entries {"name", "shape", "dtype", "segments"} whose segments
{"tensor", "start", "at", "rows"} place rows of a parameter in the Hugging Face checkpoint. The planner intersects them.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from aligner import ops


@dataclass(frozen=True, kw_only=True)
class Copy:
    """Rows [source_at, source_at + rows) of `source` go to rows [destination_at, ...) of `destination`."""

    source: str
    source_at: int
    destination: str
    destination_at: int
    rows: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Copies that fill every destination row exactly once, grouped by source. `digest` names the plan."""

    copies: tuple[Copy, ...]
    digest: str

    @torch.no_grad()
    def execute(self, source: Callable[[str], Tensor], destination: dict[str, Tensor]) -> int:
        """Copy, casting to the destination's dtype. Returns the bytes written."""
        written = 0
        for name, group in groupby(self.copies, key=lambda c: c.source):
            tensor, copies = source(name), list(group)
            into = [destination[c.destination][c.destination_at : c.destination_at + c.rows] for c in copies]
            ops.refit_copy([tensor[c.source_at : c.source_at + c.rows] for c in copies], into)
            written += sum(rows.nbytes for rows in into)
        return written


def compile_plan(source: list[dict], destination: list[dict]) -> Plan:
    """Intersect two manifests into a plan.

    Raises ValueError when a destination row has no source, or two; when shapes of a row differ; or when a destination
    tensor is not fully covered by its own segments.
    """
    homes: dict[str, list[tuple[dict, dict]]] = {}
    for item in source:
        for segment in item["segments"]:
            homes.setdefault(segment["tensor"], []).append((item, segment))
    copies = []
    for item in destination:
        filled = 0
        for segment in sorted(item["segments"], key=lambda s: s["at"]):
            if segment["at"] != filled:
                raise ValueError(f"refit: rows {filled}..{segment['at']} of {item['name']} are not placed once.")
            copies += _fill_segment(item, segment, homes.get(segment["tensor"], []))
            filled += segment["rows"]
        if filled != item["shape"][0]:
            raise ValueError(f"refit: {item['name']} has {item['shape'][0]} rows, its segments place {filled}.")
    copies.sort(key=lambda c: (c.source, c.source_at, c.destination, c.destination_at))
    digest = hashlib.sha256(json.dumps([vars(c) for c in copies]).encode()).hexdigest()
    return Plan(copies=tuple(copies), digest=digest)


def _fill_segment(item: dict, segment: dict, homes: list[tuple[dict, dict]]) -> list[Copy]:
    """Copies that fill one destination segment, each of its rows from exactly one source row."""
    begin, end, covered, copies = segment["start"], segment["start"] + segment["rows"], segment["start"], []
    for home, s in sorted(homes, key=lambda pair: pair[1]["start"]):
        low, high = max(begin, s["start"]), min(end, s["start"] + s["rows"])
        if low >= high:
            continue
        if home["shape"][1:] != item["shape"][1:]:
            raise ValueError(
                f"refit: {item['name']} has rows of shape {item['shape'][1:]}, its source {home['name']} of "
                f"{home['shape'][1:]}; both sides must hold the same model."
            )
        if low != covered:
            raise ValueError(f"refit: row {min(low, covered)} of {segment['tensor']} has two sources or none.")
        copies.append(
            Copy(
                source=home["name"],
                source_at=s["at"] + low - s["start"],
                destination=item["name"],
                destination_at=segment["at"] + low - begin,
                rows=high - low,
            )
        )
        covered = high
    if covered != end:
        raise ValueError(f"refit: rows {covered}..{end} of {segment['tensor']}, for {item['name']}, have no source.")
    return copies
