"""The engine's side of a refit: mixed into each worker of TensorRT-LLM, where it pulls the weights into live memory.

    AsyncLLM(..., orchestrator_type="ray", ray_worker_extension_cls="aligner.refit.extension.RefitExtension")

It imports torch and this package's operators, never Megatron-core, and knows of the worker what tests/contracts pins:
`engine.control_action()`, `engine.reset_prefix_cache()`, `engine.model_engine.model` and its `mapping`, `model_loader`.
What it is told and what it answers is plain JSON.
"""

import socket
import time
from collections.abc import Iterable
from contextlib import contextmanager

import torch

from aligner.models.refitted import Refitted
from aligner.models.rope import Rope
from aligner.models.shape import ModelShape
from aligner.refit.gate import GoldenGate, layers
from aligner.refit.plan import compile_plan
from aligner.refit.pull import Pulled
from aligner.refit.trtllm_layout import bindings, survey

AFTER = ("process_weights_after_loading", "post_load_weights")  # hooks of modules, in upstream's order


class RefitExtension:
    """Methods of a worker, one a tensor rank. All ranks are called, and each answers for itself.

    Names begin with refit_ lest they clash with the worker's own.
    """

    def refit_where(self) -> dict:
        """The machine that this rank is on."""
        mapping = self.engine.model_engine.mapping
        return {"rank": mapping.tp_rank, "host": socket.gethostname()}

    def refit_attach(
        self, shape: dict, ranks: list[dict], meeting: dict | None = None, timeout_s: float = 60.0
    ) -> dict:
        """Look at the live model, find the trainer's ranks, and compile the plan.

        shape: fields of models.shape.ModelShape, of the trainer's model. ranks, meeting: as of refit.pull.Pulled.
        Returns rank, plan (its digest), copies, bytes, and the Hugging Face tensors that go by upstream's reload.
        """
        mapping = self.engine.model_engine.mapping
        self._refit_rank, tp = mapping.tp_rank, mapping.tp_size
        found = survey(self._refit_model(), _shape(shape), rank=self._refit_rank, ranks=tp)
        self._refit_source = Pulled(ranks, meeting, self._refit_rank, self._refit_device(), timeout_s)
        plan = compile_plan(self._refit_source.manifest(), found.manifest)
        self._refit_found, self._refit_plan = found, GoldenGate(plan, found.manifest, self._refit_as_upstream)
        self._refit_bindings = bindings(self._refit_model())
        self._refit_state, self._refit_asleep = Refitted(), False
        written = sum(t.numel() * t.element_size() for t in found.parameters.values())
        return {
            "rank": self._refit_rank,
            "plan": plan.digest,
            "copies": len(plan.copies),
            "bytes": written,
            "reloaded": found.reloaded,
        }

    def refit_ready(self, version: int, plans: list[str], *, again: bool = False) -> dict:
        """All that can be known before requests are stopped. Raises ValueError; nothing was changed then.

        plans: the digests that the ranks gave in refit_attach().
        """
        asked, has = plans[self._refit_rank], self._refit_plan.plan.digest
        if asked != has:
            raise ValueError(f"refit: asked for the plan {asked[:12]}, this rank has {has[:12]}.")
        if bindings(self._refit_model()) != self._refit_bindings:
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
        with self._refit_quiet(deadline):  # before all else: a rank that never came would leave the others in it
            self.refit_ready(version, plans, again=again)
            if self._refit_asleep:
                raise ValueError("refit: the engine's weights are released; wake them first.")
            state, found, began = self._refit_state, self._refit_found, time.time()
            if again:
                state.version = min(state.version, version - 1)
            given = self._refit_source, version, found.manifest, lambda: found.parameters
            written = state.refit(self._refit_plan, *given, finish=self._refit_finish)
            return self.refit_tell() | {"bytes": written, "seconds": time.time() - began}

    def refit_end(self) -> dict:
        """Whatever became of a refit: ranks that give over the network may go on."""
        self._refit_source.end()
        return self.refit_tell()

    def refit_tell(self) -> dict:
        state = self._refit_state
        told = {"rank": self._refit_rank, "version": state.version, "state": state.state.value}
        return told | {"refusal": state.refusal, "plan": self._refit_plan.plan.digest}

    def refit_sleep(self) -> dict:
        """The weights are about to be released: forget cached prefixes, and take no refit until refit_awake()."""
        with self.engine.control_action():
            self.engine.reset_prefix_cache()
        self._refit_asleep, self._refit_state.refusal = True, "its weights were released"
        return self.refit_tell()

    def refit_awake(self) -> dict:
        self._refit_asleep = False
        return self.refit_tell()

    @contextmanager
    def _refit_quiet(self, deadline: float):
        with self.engine.control_action():
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # a forward of the overlap scheduler may be in flight
            if time.time() > deadline:
                raise TimeoutError("refit: requests did not end in time; stop taking them and try again.")
            yield

    def _refit_finish(self, _storage: dict) -> None:
        reloaded = self._refit_found.reloaded
        if reloaded:
            self._refit_as_upstream(layers(self._refit_source, reloaded, self._refit_device()))
        else:
            finish(self._refit_model())
        if bindings(self._refit_model()) != self._refit_bindings:
            raise RuntimeError(
                "refit: the engine's own hooks have put weights elsewhere, where no captured graph reads"
            )
        self.engine.reset_prefix_cache()

    def _refit_as_upstream(self, layers: Iterable[dict[str, torch.Tensor]]) -> None:
        """Load tensors upstream's own way, with what its modules do before and after."""
        model, loader = self._refit_model(), [self.engine.model_engine.model_loader]
        _call(loader, "begin_update_weights")  # of newer versions
        try:
            _call(model.modules(), "pre_reload_weights")
            for tensors in layers:
                self.engine.model_engine.model_loader.reload(model, tensors, allow_partial_loading=True)
            _call(loader, "finalize_update_weights")
        except Exception:
            _call(loader, "abort_update_weights")
            raise
        finish(model)

    def _refit_device(self) -> torch.device:
        return next(self._refit_model().parameters()).device

    def _refit_model(self) -> torch.nn.Module:
        return self.engine.model_engine.model


def finish(model: torch.nn.Module) -> None:
    """Let modules derive what they keep beside their weights; it stays where captured graphs read it."""
    for module in model.modules():
        hooks = [name for name in AFTER if _has(module, name)]
        if not hooks or vars(module).get("_weights_removed", False):
            continue
        kept = {name: value for name, value in vars(module).items() if isinstance(value, torch.Tensor)}
        for name in hooks:
            getattr(module, name)()
        for name, tensor in kept.items():
            derived = getattr(module, name, None)
            if isinstance(derived, torch.Tensor) and derived.data_ptr() != tensor.data_ptr():
                tensor.copy_(derived)
                setattr(module, name, tensor)


def _call(holders: Iterable, name: str) -> None:
    for holder in holders:
        if _has(holder, name):
            getattr(holder, name)()


def _has(holder: object, name: str) -> bool:
    """Neither all versions nor all modules have a hook; hasattr() would search a module's parameters too, slowly."""
    return name in vars(holder) or hasattr(type(holder), name)


def _shape(fields: dict) -> ModelShape:
    return ModelShape(**fields | {"rope": Rope(**fields["rope"])})
