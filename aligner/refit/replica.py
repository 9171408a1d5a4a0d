"""One copy of the model, spread over ranks: the rank that leads it samples, with weights that all of them give."""

import os
import socket
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from aligner.models.low_rank import LowRank
from aligner.models.weights import join
from aligner.refit.plan import Plan, Source, compile_plan
from aligner.refit.shared import SharedSource, SharedWeights
from aligner.run import distributed
from aligner.run.distributed import agree, gather


class Refitted(Protocol):
    """A sampler: rollout.sampling.Sampler."""

    def manifest(self) -> dict: ...

    def refit(self, plan: Plan, source: Source, version: int) -> None: ...


class Replica:
    """The sampler of a replica, None on ranks that do not lead it, and the way of the weights into it.

    Where one rank is the whole replica the sampler reads its weights as they are; several on one machine publish theirs
    in shared memory, on several machines they send them. All ranks make it and call refit() together.

    policy: this rank's part of the weights.
    make_sampler: called on the rank that leads.
    """

    def __init__(self, policy: Source, make_sampler: Callable[[], Refitted]):
        here = distributed.place()
        everyone = gather(lambda: (here, socket.gethostname(), os.getpid()))
        # Context-parallel ranks hold the same weights: the first of them gives.
        ours = [
            (rank, place, host, pid)
            for rank, (place, host, pid) in enumerate(everyone)
            if place.data == here.data and place.context == 0
        ]
        ranks, self.sampler, self._source = [rank for rank, *_ in ours], None, policy
        if len(ours) > 1 and len({host for *_, host, _ in ours}) > 1:
            self._source = _SentWeights(policy, ranks)
        elif len(ours) > 1:
            self._source = _SharedWeights(policy, here, [replica_name(place, pid) for _, place, _, pid in ours])
        if here.leads:
            self.sampler = make_sampler()
            self._plan = compile_plan(self._source.manifest(), self.sampler.manifest())

    def refit(self, version: int) -> None:
        """The weights as they are now go into the sampler, as `version`. Returns when all samplers have them."""
        if isinstance(self._source, _SentWeights | _SharedWeights):
            self._source.publish(version)
        if self.sampler is None:
            agree(lambda: None)
        else:
            agree(lambda: self.sampler.refit(self._plan, self._source, version=version))

    def sleep(self) -> None:
        """Nothing is sampled until the next refit; this one's sampler has nothing to give back."""


class _SharedWeights:
    """Every rank of a replica copies its weights into shared memory, where the leading one reads them."""

    def __init__(self, policy: Source, here: distributed.Place, names: list[str]):
        self._own = SharedWeights(replica_name(here, os.getpid()), policy) if here.context == 0 else None
        agree(lambda: None)  # all of them are there
        self._all = SharedSource(names) if here.leads else None

    def publish(self, version: int) -> None:
        if self._own is not None:
            self._own.publish(version)
        if self._all is not None:
            self._all.wait(version)

    def manifest(self) -> dict:
        return self._all.manifest()

    def weights(self, names: Iterable[str]) -> list[Tensor | LowRank]:
        return self._all.weights(names)


class _SentWeights:
    """Every rank of a replica sends its weights, adapters merged, to the leading one, which keeps a copy of them."""

    def __init__(self, policy: Source, ranks: Sequence[int]):
        self._policy, self._ranks, self._rank = policy, ranks, dist.get_rank()
        everyone = gather(policy.manifest)
        self._manifests = {rank: everyone[rank] for rank in ranks}
        self._copies: dict[str, Tensor] = {}

    def publish(self, _version: int) -> None:
        leader, others = self._ranks[0], self._ranks[1:]
        if self._rank in others:
            for weight in self._policy.weights(item["name"] for item in self._manifests[self._rank]["tensors"]):
                dist.send((weight.merged() if isinstance(weight, LowRank) else weight).contiguous(), leader)
        if self._rank == leader:
            device = "cuda" if dist.get_backend() == "nccl" else "cpu"
            for number, rank in enumerate(others, start=1):
                for item in self._manifests[rank]["tensors"]:
                    received = torch.empty(item["shape"], dtype=getattr(torch, item["dtype"]), device=device)
                    dist.recv(received, rank)
                    self._copies[f"{number}/{item['name']}"] = received.cpu()

    def manifest(self) -> dict:
        return join(list(self._manifests.values()))

    def weights(self, names: Iterable[str]) -> list[Tensor | LowRank]:
        names = list(names)
        own = iter(self._policy.weights(name[2:] for name in names if name.startswith("0/")))
        return [next(own) if name.startswith("0/") else self._copies[name] for name in names]


def replica_name(here: distributed.Place, pid: int) -> str:
    """What a rank publishes its weights under."""
    return f"{pid}-{here.data}-{here.pipeline}-{here.tensor}"
