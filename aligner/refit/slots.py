"""Weights over a network: trainer ranks pack what an engine rank's plan takes of them into slots, and send these.

    engine rank e                                  trainer rank i
    [version, bytes of a manifest], manifest  ->   compiles the plan, or has it
    refusal, slots, a slot and its checksums  <-   packs slot k + 1 while k is on its way
    unpacks slot k while k + 1 is on its way

Values are cast and adapters merged as they are packed, so that a slot has the bytes that the engine keeps. In round r
engine rank e talks with trainer rank (e + r) mod max(trainer ranks, engine ranks): each with one at a time, and nobody
waits for a cycle. A negative version ends it. Process groups are made by hand, with gloo or NCCL, since the two sides
are no one world.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from aligner import ops
from aligner.models.weights import window
from aligner.refit import execute
from aligner.refit.plan import Copy, Plan, Source, compile_plan

SLOT_BYTES = 64 << 20
END = -1


class Group:
    """Trainer ranks, then engine ranks, of one replica.

    store: rendezvous that all of them reach. rank, trainers, engines: this process's place, and how many of each.
    device: of what is sent; NCCL for CUDA, else gloo. patience: of a message that does not come.
    """

    def __init__(
        self, store: dist.Store, rank: int, trainers: int, engines: int, device: torch.device, patience: timedelta
    ):
        self.rank, self.trainers, self.engines, self.device = rank, trainers, engines, device
        size = trainers + engines
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = patience
            self._group = dist.ProcessGroupNCCL(store, rank, size, options)
        else:
            self._group = dist.ProcessGroupGloo(store, rank, size, patience)
        self._patience = patience

    def partners(self) -> Iterator[int]:
        """Whom this process talks with in one pass, in order; both sides of a pair come to each other's."""
        rounds = max(self.trainers, self.engines)
        mine, theirs = (self.trainers, self.engines) if self.rank < self.trainers else (0, self.trainers)
        for r in range(rounds):
            other = (self.rank - r) % rounds if mine else (self.rank - self.trainers + r) % rounds
            if other < theirs:
                yield mine + other

    def send(self, tensor: Tensor, to: int) -> dist.Work:
        return self._group.send([tensor], to, 0)

    def receive(self, into: Tensor, source: int) -> dist.Work:
        return self._group.recv([into], source, 0)

    def send_numbers(self, numbers: Sequence[int], to: int) -> None:
        self.send(torch.tensor(numbers, dtype=torch.int64, device=self.device), to).wait(self._patience)

    def receive_numbers(self, count: int, source: int) -> list[int]:
        into = torch.empty(count, dtype=torch.int64, device=self.device)
        self.receive(into, source).wait(self._patience)
        return into.tolist()

    def wait(self, work: dist.Work) -> None:
        work.wait(self._patience)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Rows of a copy, and where they stand in their slot. at: elements of `dtype`."""

    copy: Copy
    row: int
    rows: int
    columns: int
    at: int
    dtype: torch.dtype


def slots(plan: Plan, rank: int, slot_bytes: int = SLOT_BYTES) -> list[list[Piece]]:
    """What trainer rank `rank` gives of a plan, in slots of one dtype; both sides find the same."""
    found: list[list[Piece]] = []
    used, last = 0, None
    for c in plan.copies:
        if c.source.partition("/")[0] != str(rank):
            continue
        dtype = getattr(torch, plan.destinations[c.destination]["dtype"])
        (rows, columns), row = c.size if len(c.size) == 2 else (1, *c.size), 0
        room = slot_bytes // dtype.itemsize
        if columns > room:
            raise ValueError(f"refit: a row of {c.destination} has {columns} values, a slot {room}; make slots larger.")
        while row < rows:
            fits = min(rows - row, (room - used) // columns) if dtype == last else 0
            if not fits:
                found.append([])
                used, last = 0, dtype
                continue
            piece = Piece(copy=c, row=row, rows=fits, columns=columns, at=used, dtype=dtype)
            found[-1].append(piece)
            used, row = used + fits * columns, row + fits
    return found


def _views(pieces: list[Piece], buffer: Tensor) -> list[Tensor]:
    flat = buffer.view(pieces[0].dtype)
    return [flat[p.at : p.at + p.rows * p.columns].view(p.rows, p.columns) for p in pieces]


def _size(pieces: list[Piece]) -> int:
    last = pieces[-1]
    return (last.at + last.rows * last.columns) * last.dtype.itemsize


def _places(at: Sequence[int], row: int) -> tuple[int, int]:
    return (at[0] + row, at[1]) if len(at) == 2 else (0, at[0])


class Sender:
    """A trainer rank's side. manifest: of all trainer ranks, joined; source: this rank's own parameters.

    far: engine ranks on other machines. Those on this one read the weights where they lie, and nothing is sent to them:
    with NCCL two ranks that share a GPU could not even talk.
    """

    def __init__(self, group: Group, manifest: dict, source: Source, far: set[int]):
        self._group, self._manifest, self._source, self._far = group, manifest, source, far
        self._plans: dict[str, list[list[Piece]]] = {}
        self._asked: dict[int, str] = {}  # engine rank -> the manifest that it asked with last
        self._buffers = [torch.empty(SLOT_BYTES, dtype=torch.uint8, device=group.device) for _ in range(2)]

    def serve(self, version: int) -> None:
        """Give every engine rank what it asks for, until all have ended. Raises RuntimeError when one goes away."""
        live = {self._group.trainers + engine for engine in self._far}
        while live:
            for engine in self._group.partners():
                if engine in live and not self._answer(engine, version):
                    live.remove(engine)

    def _answer(self, engine: int, version: int) -> bool:
        asked, length = self._group.receive_numbers(2, engine)
        if asked == END:
            return False
        if length:
            text = torch.empty(length, dtype=torch.uint8, device=self._group.device)
            self._group.wait(self._group.receive(text, engine))
            self._asked[engine] = self._known(bytes(text.cpu().numpy()))
        pieces = self._plans[self._asked[engine]]
        if asked != version:
            self._group.send_numbers((version, 0), engine)
            return True
        self._group.send_numbers((version, len(pieces)), engine)
        sending: list[dist.Work] = []
        for number, slot in enumerate(pieces):
            buffer = self._buffers[number % 2]
            for work in sending[:-2]:
                self._group.wait(work)
            sending = sending[-2:]
            sums = self._pack(slot, buffer)
            sending += [self._group.send(buffer[: _size(slot)], engine), self._group.send(sums, engine)]
        for work in sending:
            self._group.wait(work)
        return True

    def _known(self, text: bytes) -> str:
        digest = hashlib.sha256(text).hexdigest()
        if digest not in self._plans:
            plan = compile_plan(self._manifest, json.loads(text))
            self._plans[digest] = slots(plan, self._group.rank)
        return digest

    def _pack(self, slot: list[Piece], buffer: Tensor) -> Tensor:
        """Returns the checksums of the pieces, as the slot has them."""
        views = _views(slot, buffer)
        names = list(dict.fromkeys(p.copy.source for p in slot))
        rows = [
            [names.index(p.copy.source), i, *_places(p.copy.source_at, p.row), 0, 0, p.rows, p.columns]
            for i, p in enumerate(slot)
        ]
        weights = self._source.weights(name.partition("/")[2] for name in names)
        execute.write(torch.tensor(rows), weights, views)
        return ops.refit_copy(views, views, checksum=True).to(self._group.device)


class Receiver:
    """An engine rank's side. near: trainer ranks whose weights it reads where they lie."""

    def __init__(self, group: Group, near: set[int]):
        self._group, self._near, self._told = group, near, ""
        self._next = 0  # place among partners() of who comes next
        self._buffers = [torch.empty(SLOT_BYTES, dtype=torch.uint8, device=group.device) for _ in range(2)]

    def execute(self, plan: Plan, manifest: dict, destination: dict[str, Tensor], version: int) -> None:
        """Fill what trainer ranks give over the network; called by all engine ranks, as often by each.

        manifest: of the destination. Raises RuntimeError where a trainer rank has another version, and where other
        bytes arrive than were sent.
        """
        text = json.dumps(manifest).encode()
        digest = hashlib.sha256(text).hexdigest()
        for place, rank in enumerate(self._partners()):
            self._next = place + 1
            self._group.send_numbers((version, 0 if self._told == digest else len(text)), rank)
            if self._told != digest:
                packed = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(self._group.device)
                self._group.wait(self._group.send(packed, rank))
            self._receive(slots(plan, rank), rank, destination, version)
        self._told = digest

    def _partners(self) -> list[int]:
        return [rank for rank in self._group.partners() if rank not in self._near]

    def end(self) -> None:
        """Let the trainer's ranks go on: first those that a pass which failed has not come to.

        All of them are told, whatever becomes of one; then what it raised is raised.
        """
        partners, lost = self._partners(), None
        for rank in partners[self._next :] + partners[: self._next]:
            try:
                self._group.send_numbers((END, 0), rank)
            except RuntimeError as error:
                lost = error
        self._told, self._next = "", 0
        if lost:
            raise lost

    def _receive(self, pieces: list[list[Piece]], rank: int, destination: dict[str, Tensor], version: int) -> None:
        held, count = self._group.receive_numbers(2, rank)
        if (held, count) != (version, len(pieces)):
            raise RuntimeError(
                f"refit: trainer rank {rank} has version {held} in {count} slots, expected {version} in {len(pieces)}"
            )
        odd: list[str] = []
        coming = [self._begin(slot, number, rank) for number, slot in enumerate(pieces[:2])]
        for number, slot in enumerate(pieces):
            *works, sums = coming.pop(0)
            for work in works:
                self._group.wait(work)
            odd += self._unpack(slot, self._buffers[number % 2], sums, destination)
            if number + 2 < len(pieces):
                coming.append(self._begin(pieces[number + 2], number, rank))
        if odd:  # told once all has come, or the trainer's rank would wait for who takes the rest
            raise RuntimeError(
                f"refit: {len(odd)} pieces from trainer rank {rank} are other than they were sent, the first in "
                f"{odd[0]}"
            )

    def _begin(self, slot: list[Piece], number: int, rank: int) -> tuple[dist.Work, dist.Work, Tensor]:
        sums = torch.empty(len(slot), dtype=torch.int64, device=self._group.device)
        buffer = self._buffers[number % 2]
        return self._group.receive(buffer[: _size(slot)], rank), self._group.receive(sums, rank), sums

    def _unpack(self, slot: list[Piece], buffer: Tensor, sums: Tensor, destination: dict[str, Tensor]) -> list[str]:
        """Names of what reads back other than it was sent."""
        into = [_box(destination[p.copy.destination], p) for p in slot]
        ops.refit_copy(_views(slot, buffer), into)
        bad = ops.refit_copy(into, into, checksum=True).to(sums.device) != sums
        return [slot[i].copy.destination for i in bad.nonzero().flatten().tolist()]


def _box(tensor: Tensor, p: Piece) -> Tensor:
    row, column = _places(p.copy.destination_at, p.row)
    return window(tensor if tensor.dim() == 2 else tensor[None], (row, column), (p.rows, p.columns))
