"""The engine's side of a refit: mixed into each worker of TensorRT-LLM, where it pulls the weights into live memory.

    AsyncLLM(..., orchestrator_type="ray", ray_worker_extension_cls="aligner.refit.extension.RefitExtension")

It imports torch and this package's operators, never Megatron-core, and knows of the worker what tests/contracts pins:
`engine.control_action()`, `engine.reset_prefix_cache()`, `engine.model_engine.model` and its `mapping`, `model_loader`.
What it is told and what it answers is plain JSON.
"""

import time
from contextlib import contextmanager

import torch

from aligner.models.refitted import Refitted
from aligner.models.rope import Rope
from aligner.models.shape import ModelShape
from aligner.models.weights import entry, manifest
from aligner.refit.plan import Plan, compile_plan
from aligner.refit.shared import SharedSource
from aligner.refit.trtllm_layout import Survey, survey


class RefitExtension:
    """Methods of a worker, one a tensor rank. All ranks are called, and each answers for itself.

    Names begin with refit_ lest they clash with the worker's own.
    """

    def refit_attach(self, shape: dict, names: list[str], timeout_s: float = 60.0) -> dict:
        """Look at the live model, open what the trainer's ranks publish under `names`, and compile the plan.

        shape: fields of models.shape.ModelShape, of the trainer's model.
        Returns rank, plan (its digest), copies, bytes, and the Hugging Face tensors that go by upstream's reload.
        """
        mapping = self.engine.model_engine.mapping
        self._refit_rank, ranks = mapping.tp_rank, mapping.tp_size
        found = survey(self._refit_model(), _shape(shape), rank=self._refit_rank, ranks=ranks)
        self._refit_found, self._refit_source = found, SharedSource(names, timeout_s)
        self._refit_plan: Plan = compile_plan(self._refit_source.manifest(), found.manifest)
        self._refit_bindings = _bindings(found)
        self._refit_state = Refitted()
        self._refit_staged = self._refit_staging(found.reloaded)
        written = sum(t.numel() * t.element_size() for t in found.parameters.values())
        return {
            "rank": self._refit_rank,
            "plan": self._refit_plan.digest,
            "copies": len(self._refit_plan.copies),
            "bytes": written,
            "reloaded": found.reloaded,
        }

    def refit_ready(self, version: int, plans: list[str], *, again: bool = False) -> dict:
        """All that can be known before requests are stopped. Raises ValueError; nothing was changed then.

        plans: the digests that the ranks gave in refit_attach().
        """
        plan = plans[self._refit_rank]
        if plan != self._refit_plan.digest:
            raise ValueError(f"refit: asked for the plan {plan[:12]}, this rank has {self._refit_plan.digest[:12]}.")
        if _bindings(self._refit_found) != self._refit_bindings:
            raise ValueError("refit: the engine's weights lie elsewhere than when the plan was compiled; attach again.")
        if not again:
            self._refit_state.expect_newer(version)
        self._refit_source.wait(version)
        return self.refit_tell()

    def refit(self, version: int, plans: list[str], *, deadline: float, again: bool = False) -> dict:
        """Stop between requests, copy, read back, forget cached prefixes. Returns as of refit_tell(), and `bytes`.

        deadline: by time.time(); requests that have not ended by then make it raise TimeoutError with nothing changed.
        again: repeat a version that not all ranks have.
        """
        self.refit_ready(version, plans, again=again)
        state, began = self._refit_state, time.time()
        if again:
            state.version = min(state.version, version - 1)
        shared = {"quiet": self._refit_quiet(deadline), "finish": self._refit_finish}
        found = self._refit_found
        written = state.refit(
            self._refit_plan, self._refit_source, version, found.manifest, lambda: found.parameters, **shared
        )
        return self.refit_tell() | {"bytes": written, "seconds": time.time() - began}

    def refit_tell(self) -> dict:
        state = self._refit_state
        told = {"rank": self._refit_rank, "version": state.version, "state": state.state.value}
        return told | {"refusal": state.refusal, "plan": self._refit_plan.digest}

    @contextmanager
    def _refit_quiet(self, deadline: float):
        with self.engine.control_action():
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # a forward of the overlap scheduler may be in flight
            if time.time() > deadline:
                raise TimeoutError("refit: requests did not end in time; stop taking them and try again.")
            yield

    def _refit_finish(self, _storage: dict) -> None:
        if self._refit_staged:
            plan, tensors = self._refit_staged
            plan.execute(self._refit_source, tensors)
            loader = self.engine.model_engine.model_loader
            loader.reload(self._refit_model(), dict(tensors), allow_partial_loading=True)
        self.engine.reset_prefix_cache()

    def _refit_model(self) -> torch.nn.Module:
        return self.engine.model_engine.model

    def _refit_staging(self, reloaded: list[str]) -> tuple[Plan, dict[str, torch.Tensor]] | None:
        """Whole Hugging Face tensors, for upstream's reload, and the plan that fills them."""
        if not reloaded:
            return None
        source = self._refit_source.manifest()
        dtypes = {s["tensor"]: item["dtype"] for item in source["tensors"] for s in item["segments"]}
        tensors = {name: torch.empty(source["model"][name], dtype=getattr(torch, dtypes[name])) for name in reloaded}
        entries = [entry(name, t, [(name, 0, len(t))]) for name, t in tensors.items()]
        return compile_plan(source, manifest(source["model"], entries)), tensors


def _shape(fields: dict) -> ModelShape:
    return ModelShape(**fields | {"rope": Rope(**fields["rope"])})


def _bindings(found: Survey) -> dict[str, tuple]:
    """Where each parameter lies: a refit never moves one, or captured CUDA graphs would read the old place."""
    return {name: (t.data_ptr(), t.shape, t.stride(), t.dtype) for name, t in found.parameters.items()}
