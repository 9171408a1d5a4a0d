"""Before the fast path is trusted: its first refit is held against upstream's own way of loading, bit by bit."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from aligner.models.weights import entry, manifest, window
from aligner.refit import execute
from aligner.refit.plan import Plan, compile_plan
from aligner.refit.pull import Pulled


class GoldenGate:
    """A plan whose first execution must leave what `reload` leaves; afterwards it is the plan.

    manifest: of the destination.
    reload: takes whole Hugging Face tensors by name, those of a layer at a time, and puts them where they belong in the
        destination, with all that upstream does before and after.
    """

    def __init__(self, plan: Plan, manifest: dict, reload: Callable[[Iterable[dict[str, Tensor]]], None]):
        self.plan, self._manifest, self._reload, self.passed = plan, manifest, reload, False

    def preflight(self, source: Pulled, manifest: dict, destination: dict[str, Tensor]) -> None:
        source.near(self.plan).preflight(source, manifest, destination)

    def execute(self, source: Pulled, destination: dict[str, Tensor]) -> int:
        """As of Plan.execute. Raises RuntimeError, which names parameters, where the two ways differ."""
        if self.passed:
            return source.execute(self.plan, self._manifest, destination)
        names, into = list(self.plan.destinations), [destination[name] for name in self.plan.destinations]
        self._reload(layers(source, _behind(self.plan), into[0].device))
        wanted = execute.checksums(self.plan.boxes, into)
        for name, tensor in destination.items():
            tensor.fill_(torch.nan)  # nothing is left of it by accident
            for s in self.plan.destinations[name]["segments"]:
                if not s["tensor"]:
                    window(tensor, s["at"], s["size"]).zero_()
        written = source.execute(self.plan, self._manifest, destination)
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


def layers(source: Pulled, names: list[str], device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Whole Hugging Face tensors of the source, those of a layer at a time: what is fused comes together."""
    at: dict[str, list[str]] = {}
    for name in names:
        at.setdefault(".".join(name.split(".")[:3]) if name.startswith("model.layers.") else "", []).append(name)
    given = source.manifest()
    dtypes = {s["tensor"]: getattr(torch, item["dtype"]) for item in given["tensors"] for s in item["segments"]}
    for some in at.values():
        tensors = {name: torch.empty(given["model"][name], dtype=dtypes[name], device=device) for name in some}
        entries = [entry(name, t, [(name, 0, len(t))]) for name, t in tensors.items()]
        whole = manifest(given["model"], entries)
        source.execute(compile_plan(given, whole), whole, tensors)
        yield tensors
