"""The trainer's side of a refit that an engine's workers pull, in processes and, maybe, on machines of their own."""

import os
import socket
import threading
from collections.abc import Callable
from dataclasses import asdict
from typing import Protocol

import torch
import torch.distributed as dist

from aligner.models.low_rank import LowRank
from aligner.models.shape import ModelShape
from aligner.models.weights import join
from aligner.refit.plan import Source
from aligner.refit.replica import replica_name
from aligner.refit.shared import ExportedWeights, SharedWeights
from aligner.refit.slots import Group, Sender
from aligner.run import distributed
from aligner.run.distributed import agree, gather


class Pulling(Protocol):
    """An engine whose workers pull the weights: rollout.wire.EngineSampler."""

    def where(self) -> list[str]: ...

    def attach(self, shape: dict, ranks: list[dict], meeting: dict | None) -> list[dict]: ...

    def pull(self, version: int) -> list[dict]: ...

    def sleep(self) -> None: ...


class PulledReplica:
    """The sampler of a replica, None on ranks that do not lead it, whose weights come from all of them.

    Ranks with an engine's worker on their machine publish there what they hold; those without send it. All ranks make
    it and call its methods together.

    policy: this rank's part of the weights. shape: of the policy.
    open_engine: called on the rank that leads, with the replica's GPUs on its machine, none without CUDA.
    shares: whether the engine is on those, and has to sleep while the trainer trains.
    """

    def __init__(self, policy: Source, shape: ModelShape, open_engine: Callable[[list[int]], Pulling], *, shares: bool):
        here, host, self._shares, self._sender = distributed.place(), socket.gethostname(), shares, None
        device = torch.cuda.current_device() if torch.cuda.is_available() else None
        everyone = gather(lambda: (here.data, here.context, host, device))
        devices = [d for data, _, at, d in everyone if (data, at) == (here.data, host) and d is not None]
        self.sampler = agree(lambda: open_engine(devices) if here.leads else None)
        engines = next(w for data, w in gather(lambda: (here.data, self.sampler and self.sampler.where()))
                       if data == here.data and w)  # fmt: skip
        gives = here.context == 0  # context-parallel ranks hold the same weights
        near = gives and host in engines
        self._own = agree(lambda: _publisher(replica_name(here, os.getpid()), policy) if near else None)
        told = {"host": host, "name": replica_name(here, os.getpid()), "manifest": None}
        ranks = [(r, t) for r, (data, g, t) in enumerate(gather(lambda: (here.data, gives, told)))
                 if data == here.data and g]  # fmt: skip
        if any(at != t["host"] for at in engines for _, t in ranks):
            self._meet(policy, shape, [r for r, _ in ranks], [t for _, t in ranks], len(engines), gives)
        else:
            agree(lambda: self.sampler and self.sampler.attach(asdict(shape), [t for _, t in ranks], None))

    def _meet(self, policy: Source, shape: ModelShape, ranks: list[int], told: list[dict], engines: int, gives: bool):
        """Make a group with the engine's ranks, which attach at the same time."""
        here, patience, store = distributed.place(), distributed.PATIENCE, None
        if here.leads:
            store = dist.TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False, timeout=patience)
        place = {"host": socket.gethostname(), "port": store.port, "engines": engines} if store else None
        meeting = next(m for data, m in gather(lambda: (here.data, place)) if data == here.data and m)
        manifests = gather(policy.manifest)
        told = [t | {"manifest": manifests[rank]} for rank, t in zip(ranks, told, strict=True)]
        attaching = _Meanwhile(lambda: self.sampler and self.sampler.attach(asdict(shape), told, meeting))

        def make() -> Sender | None:
            if not gives:
                return None
            mine = store or dist.TCPStore(meeting["host"], meeting["port"], is_master=False, timeout=patience)
            group = Group(mine, ranks.index(dist.get_rank()), len(ranks), engines, _device(policy), patience)
            return Sender(group, join([manifests[rank] for rank in ranks]), policy)

        self._sender, self._store = agree(make), store
        agree(attaching.result)

    def refit(self, version: int) -> None:
        """The weights as they are now go into the engine, as `version`. Returns when all engines have them."""
        agree(lambda: self._own and self._own.publish(version))
        pulling = _Meanwhile(lambda: self.sampler and self.sampler.pull(version))
        agree(lambda: self._sender and self._sender.serve(version))
        agree(pulling.result)

    def sleep(self) -> None:
        """Nothing is sampled until the next refit."""
        if self._shares:
            agree(lambda: self.sampler and self.sampler.sleep())


class _Meanwhile:
    """A call in a thread of its own."""

    def __init__(self, call: Callable[[], object]):
        self._call, self._error = call, None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._call()
        except Exception as error:
            self._error = error

    def result(self) -> None:
        """Wait for it; raises what it raised."""
        self._thread.join()
        if self._error:
            raise self._error


def _device(policy: Source) -> torch.device:
    (first,) = policy.weights([policy.manifest()["tensors"][0]["name"]])
    return (first.base if isinstance(first, LowRank) else first).device


def _publisher(name: str, policy: Source) -> SharedWeights | ExportedWeights:
    """By handle where the weights are on a GPU, else as a copy in shared memory."""
    return ExportedWeights(name, policy) if _device(policy).type == "cuda" else SharedWeights(name, policy)
