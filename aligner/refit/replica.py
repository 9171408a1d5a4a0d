"""The weights of one copy of the model, spread over ranks, as one source of a refit."""

import os
import socket

from torch import Tensor

from aligner.models.lora import LowRank
from aligner.refit.plan import Source
from aligner.refit.shared import SharedSource, SharedWeights
from aligner.run import distributed
from aligner.run.distributed import gather


class Replica:
    """What the ranks of a replica hold, read by the one of them that leads it and samples.

    A rank that is the whole replica is read as it is; more of them publish through shared memory, so they must be on
    one machine. All ranks make it and call its methods together.
    """

    def __init__(self, policy: Source):
        here = distributed.place()
        everyone = gather(lambda: (here, socket.gethostname(), os.getpid()))
        # Context-parallel ranks hold the same weights: the first of them gives.
        ours = [(p, host, pid) for p, host, pid in everyone if p.data == here.data and p.context == 0]
        self.leads, self._source, self._shared = here.leads, policy, None
        if len(ours) == 1:
            return
        if hosts := sorted({host for _, host, _ in ours} - {socket.gethostname()}):
            raise ValueError(
                f"the ranks of a replica are on {', '.join(hosts)} too, but the embedded sampler reads their weights "
                "through shared memory; lower parallel.tensor x parallel.pipeline to what one machine holds."
            )
        if here.context == 0:
            self._shared = SharedWeights(_name(here, os.getpid()), policy)
        gather(lambda: None)  # all of them are there
        self._source = SharedSource([_name(p, pid) for p, _, pid in ours]) if here.leads else None

    def publish(self, version: int) -> None:
        """Make the weights as they are now readable as `version`; training may go on once the refit is done."""
        if self._shared is not None:
            self._shared.publish(version)
        if isinstance(self._source, SharedSource):
            self._source.wait(version)

    def manifest(self) -> dict:
        """Of the whole replica; on the rank that leads."""
        return self._source.manifest()

    def weight(self, name: str) -> Tensor | LowRank:
        return self._source.weight(name)


def _name(here: distributed.Place, pid: int) -> str:
    return f"{pid}-{here.data}-{here.pipeline}-{here.tensor}"
