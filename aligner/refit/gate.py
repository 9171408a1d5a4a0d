"""Before the fast path is trusted: its first refit is held against upstream's own way of loading, bit by bit."""

from collections.abc import Callable

import torch
from torch import Tensor

from aligner.models.weights import entry, manifest, window
from aligner.refit import execute
from aligner.refit.plan import Plan, Source, compile_plan


class GoldenGate:
    """A plan whose first execution must leave what `reload` leaves; afterwards it is the plan.

    reload: takes some whole Hugging Face tensors by name, and puts them where they belong in the destination. It is
        given a layer at a time.
    """

    def __init__(self, plan: Plan, reload: Callable[[dict[str, Tensor]], None]):
        self.plan, self._reload, self.passed = plan, reload, False

    def preflight(self, source: Source, manifest: dict, destination: dict[str, Tensor]) -> None:
        self.plan.preflight(source, manifest, destination)

    def execute(self, source: Source, destination: dict[str, Tensor]) -> int:
        """As of Plan.execute. Raises RuntimeError, which names parameters, where the two ways differ."""
        if self.passed:
            return self.plan.execute(source, destination)
        names, into = list(self.plan.destinations), [destination[name] for name in self.plan.destinations]
        for tensors in layers(source, _behind(self.plan), into[0].device):
            self._reload(tensors)
        wanted = execute.checksums(self.plan.boxes, into)
        for name, tensor in destination.items():
            tensor.fill_(torch.nan)  # nothing is left of it by accident
            for s in self.plan.destinations[name]["segments"]:
                if not s["tensor"]:
                    window(tensor, s["at"], s["size"]).zero_()
        written = self.plan.execute(source, destination)
        odd = (execute.checksums(self.plan.boxes, into) != wanted).nonzero().flatten().tolist()
        if odd:
            differing = sorted({names[self.plan.boxes[i, 1]] for i in odd})
            raise RuntimeError(
                f"refit: {len(differing)} parameters differ from what TensorRT-LLM's own reload makes of the same "
                f"weights, the first is {differing[0]}; this version lays them out otherwise than this refit knows"
            )
        self.passed = True
        return written


def _behind(plan: Plan) -> list[str]:
    """Hugging Face tensors that the plan writes, in the destination's order."""
    found = {s["tensor"]: None for item in plan.destinations.values() for s in item["segments"] if s["tensor"]}
    return list(found)


def layers(source: Source, names: list[str], device: torch.device):
    """Whole Hugging Face tensors of the source, those of a layer at a time: what is fused comes together."""
    at: dict[str, list[str]] = {}
    for name in names:
        at.setdefault(".".join(name.split(".")[:3]) if name.startswith("model.layers.") else "", []).append(name)
    for some in at.values():
        plan, tensors = whole(source.manifest(), some, device)
        plan.execute(source, tensors)
        yield tensors


def whole(source: dict, names: list[str], device: torch.device) -> tuple[Plan, dict[str, Tensor]]:
    """Room for whole Hugging Face tensors, and the plan that fills it from a source of this manifest."""
    dtypes = {s["tensor"]: item["dtype"] for item in source["tensors"] for s in item["segments"]}
    tensors = {n: torch.empty(source["model"][n], dtype=getattr(torch, dtypes[n]), device=device) for n in names}
    entries = [entry(name, t, [(name, 0, len(t))]) for name, t in tensors.items()]
    return compile_plan(source, manifest(source["model"], entries)), tensors
