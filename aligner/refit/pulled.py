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
    open_engine: called on the rank that leads, with the replica's GPUs on its machine as CUDA_VISIBLE_DEVICES names
        them, none without CUDA.
    shares: whether the engine is on those, and has to sleep while the trainer trains.
    """

    def __init__(self, policy: Source, shape: ModelShape, open_engine: Callable[[list[str]], Pulling], *, shares: bool):
        here, host, self._shares, self._sender = distributed.place(), socket.gethostname(), shares, None
        everyone = gather(lambda: (here.data, host, distributed.gpu()))
        devices = [gpu for data, at, gpu in everyone if (data, at) == (here.data, host) and gpu is not None]
        self.sampler = agree(lambda: open_engine(devices) if here.leads else None)
        engines = {data: at for data, at in gather(lambda: (here.data, self.sampler and self.sampler.where())) if at}
        gives = here.context == 0  # context-parallel ranks hold the same weights
        near = gives and host in engines[here.data]
        self._own = agree(lambda: _publisher(replica_name(here, os.getpid()), policy) if near else None)
        told = {"host": host, "name": replica_name(here, os.getpid()), "manifest": None}
        everyone = list(enumerate(gather(lambda: (here.data, gives, told))))
        ranks = {rank: t for rank, (data, g, t) in everyone if data == here.data and g}
        # Of any replica: all ranks take part in what is gathered then.
        if any(at != t["host"] for _, (data, g, t) in everyone if g for at in engines[data]):
            self._meet(policy, shape, list(ranks), list(ranks.values()), engines[here.data], gives)
        else:
            agree(lambda: self.sampler and self.sampler.attach(asdict(shape), list(ranks.values()), None))

    def _meet(
        self, policy: Source, shape: ModelShape, ranks: list[int], told: list[dict], engines: list[str], gives: bool
    ) -> None:
        """Make a group with the engine's ranks, which attach at the same time, where any is on another machine."""
        here, host, patience, store = distributed.place(), socket.gethostname(), distributed.PATIENCE, None
        if here.leads and any(at != t["host"] for at in engines for t in told):
            store = dist.TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False, timeout=patience)
        place = {"host": host, "port": store.port, "engines": len(engines)} if store else None
        meetings = gather(lambda: (here.data, place))
        meeting = next((m for data, m in meetings if data == here.data and m), None)
        manifests = gather(policy.manifest)
        told = [t | {"manifest": manifests[rank]} for rank, t in zip(ranks, told, strict=True)]
        attaching = _Meanwhile(lambda: self.sampler and self.sampler.attach(asdict(shape), told, meeting))

        def make() -> Sender | None:
            if not gives or not meeting:
                return None
            mine = store or dist.TCPStore(meeting["host"], meeting["port"], is_master=False, timeout=patience)
            group = Group(mine, ranks.index(dist.get_rank()), len(ranks), len(engines), _device(policy), patience)
            far = {number for number, at in enumerate(engines) if at != host}
            return Sender(group, join([manifests[rank] for rank in ranks]), policy, far)

        self._sender, self._store = agree(make), store
        agree(attaching.result)

    def refit(self, version: int) -> None:
        """The weights as they are now go into the engine, as `version`. Returns when all engines have them."""
        agree(lambda: self._publish(version))
        pulling = _Meanwhile(lambda: self.sampler and self.sampler.pull(version))
        agree(lambda: self._sender and self._sender.serve(version))
        agree(pulling.result)

    def _publish(self, version: int) -> None:
        if self._own:
            self._own.publish(version)
        if self._shares and torch.cuda.is_available():
            torch.cuda.empty_cache()  # what torch keeps for the next step, the engine needs to wake up in

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
