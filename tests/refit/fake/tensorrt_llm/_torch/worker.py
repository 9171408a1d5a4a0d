"""A rank's worker, and how an extension comes into it."""

import importlib

import torch

from tests.refit.standin import BaseWorker


class RayGPUWorker(BaseWorker):
    """It sleeps and wakes as upstream's: in a control action, which waits for requests to end."""

    def sleep(self, sleep_tags: list[str]) -> None:
        with self.engine.control_action():
            if "model_weights" in sleep_tags:
                for p in self.model.parameters():
                    p.data.fill_(torch.nan)  # contents are lost, addresses stay

    def wakeup(self, wakeup_tags: list[str]) -> None:
        with self.engine.control_action():
            pass  # what was lost stays lost


def inject(worker: type, extension: str | None) -> type:
    """A worker with the extension of this dotted path. Raises ValueError where their names clash."""
    if extension is None:
        return worker
    package, _, name = extension.rpartition(".")
    mixed = getattr(importlib.import_module(package), name)
    clashes = [attribute for attribute in dir(mixed) if not attribute.startswith("__") and hasattr(worker, attribute)]
    if clashes:
        raise ValueError(f"{worker.__name__} already defines {', '.join(clashes)}, which {extension} would hide.")
    return type(f"{worker.__name__}With{name}", (worker, mixed), {})
