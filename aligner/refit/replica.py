"""One copy of the model, spread over ranks: the rank that leads it samples, with weights that all of them give."""

import os
import socket
from collections.abc import Callable
from typing import Protocol

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

    Where one rank is the whole replica the sampler reads its weights as they are; several publish theirs through shared
    memory, so they must be on one machine. All ranks make it and call refit() together.

    policy: this rank's part of the weights.
    make_sampler: called on the rank that leads.
    Raises ValueError when the ranks of a replica are on several machines.
    """

    def __init__(self, policy: Source, make_sampler: Callable[[], Refitted]):
        here = distributed.place()
        everyone = gather(lambda: (here, socket.gethostname(), os.getpid()))
        # Context-parallel ranks hold the same weights: the first of them gives.
        ours = [(place, host, pid) for place, host, pid in everyone if place.data == here.data and place.context == 0]
        if hosts := sorted({host for _, host, _ in ours} - {socket.gethostname()}):
            raise ValueError(
                f"the ranks of a replica are on {', '.join(hosts)} too, but the embedded sampler reads their weights "
                "through shared memory; lower parallel.tensor x parallel.pipeline to what one machine holds."
            )
        self.sampler, self._source, self._shared = None, policy, None
        if len(ours) > 1 and here.context == 0:
            self._shared = SharedWeights(_name(here, os.getpid()), policy)
        agree(lambda: None)  # all of them are there
        if here.leads:
            if len(ours) > 1:
                self._source = SharedSource([_name(place, pid) for place, _, pid in ours])
            self.sampler = make_sampler()
            self._plan = compile_plan(self._source.manifest(), self.sampler.manifest())

    def refit(self, version: int) -> None:
        """The weights as they are now go into the sampler, as `version`. Returns when all samplers have them."""
        if self._shared is not None:
            self._shared.publish(version)
        agree(lambda: self._refit(version) if self.sampler is not None else None)

    def _refit(self, version: int) -> None:
        if isinstance(self._source, SharedSource):
            self._source.wait(version)
        self.sampler.refit(self._plan, self._source, version=version)


def _name(here: distributed.Place, pid: int) -> str:
    return f"{pid}-{here.data}-{here.pipeline}-{here.tensor}"
