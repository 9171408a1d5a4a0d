"""What an engine's rank pulls from: trainer ranks of its machine where their weights lie, others over the network."""

import socket
from collections.abc import Iterable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from aligner.models.low_rank import LowRank
from aligner.models.weights import join
from aligner.refit.plan import Plan
from aligner.refit.shared import SharedSource
from aligner.refit.slots import Group, Receiver


class Pulled:
    """The source of an engine rank's refits; rank i's parameters are called i/….

    ranks: of the trainer, each with its `host`, the `name` that it publishes under, and its `manifest` where some
        engine rank is on another host. meeting: `host` and `port` of the store where both sides meet, and `engines`;
        None where all are on one host.
    rank: of this engine's. device: of its weights.
    """

    def __init__(self, ranks: list[dict], meeting: dict | None, rank: int, device: torch.device, timeout_s: float):
        here = socket.gethostname()
        self._here = {i: number for number, i in enumerate(i for i, r in enumerate(ranks) if r["host"] == here)}
        names = [r["name"] for r in ranks if r["host"] == here]
        self._shared, self._version = SharedSource(names, timeout_s, device), -1
        self._told = [r["manifest"] for r in ranks]
        self._receiver, self._near = None, {}  # of plans by digest
        if meeting:
            patience = timedelta(seconds=timeout_s)
            store = dist.TCPStore(meeting["host"], meeting["port"], is_master=False, timeout=patience)
            group = Group(store, len(ranks) + rank, len(ranks), meeting["engines"], device, patience)
            self._receiver = Receiver(group, set(self._here))
        elif len(names) < len(ranks):
            raise ValueError("refit: trainer ranks are on other machines, and there is no place to meet them.")
        self._manifest = self._joined()

    def _joined(self) -> dict:
        shared = self._shared.manifests()
        return join([shared[self._here[i]] if i in self._here else told for i, told in enumerate(self._told)])

    def manifest(self) -> dict:
        return self._manifest

    def wait(self, version: int) -> None:
        """As of SharedSource; ranks elsewhere are asked for the version when they give."""
        if self._shared.wait(version):
            self._manifest = self._joined()
        self._version = version

    def weights(self, names: Iterable[str]) -> list[Tensor | LowRank]:
        """Of ranks that are here."""
        apart = (name.partition("/") for name in names)
        return self._shared.weights(f"{self._here[int(rank)]}/{own}" for rank, _, own in apart)

    def near(self, plan: Plan) -> Plan:
        """What of a plan comes from ranks that are here."""
        if self._receiver is None:
            return plan
        if plan.digest not in self._near:
            self._near[plan.digest] = plan.only(lambda name: int(name.partition("/")[0]) in self._here)
        return self._near[plan.digest]

    def execute(self, plan: Plan, manifest: dict, destination: dict[str, Tensor]) -> int:
        """As of Plan.execute, from all ranks. manifest: of the destination."""
        near = self.near(plan)
        near.execute(self, destination)
        if self._receiver:
            self._receiver.execute(plan, manifest, destination, self._version)
        return plan.num_bytes()

    def end(self) -> None:
        """Ranks that give over the network may go on."""
        if self._receiver:
            self._receiver.end()
