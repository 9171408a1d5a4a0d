"""Runs Megatron-core on a machine without CUDA: the name `torch` inside megatron.core.* is replaced by a proxy in which
"cuda" means the CPU. No arithmetic changes and torch itself stays untouched.

Each line below is needed by a call that Megatron makes with a hard-coded CUDA device; tests/models/test_cpu.py takes
them out one by one and fails when Megatron no longer needs one.
"""

import functools
import sys
import types
from collections.abc import Callable

import torch

_FACTORIES = ("tensor", "zeros")
_CPU = torch.device("cpu")


def install() -> None:
    """Let Megatron-core use the CPU where it would use CUDA. Call after torch and before building a model.

    Raises RuntimeError on a machine with CUDA, where Megatron must not be redirected.
    """
    if torch.cuda.is_available():
        raise RuntimeError("models.cpu.install() redirects CUDA to the CPU, but this machine has CUDA; do not call it.")
    import megatron.core.models.gpt
    import megatron.core.optimizer
    import megatron.core.optimizer_param_scheduler
    import megatron.core.pipeline_parallel
    import megatron.core.tensor_parallel  # noqa: F401

    overrides = {
        "current_device": lambda: _CPU,  # Megatron gives it to device= everywhere
        "synchronize": lambda: None,  # pipeline stages, after they exchanged activations
        "get_rng_state": torch.get_rng_state,  # Megatron's tracker of random states
        "manual_seed": torch.manual_seed,
    }
    factories = {name: _on_cpu(getattr(torch, name)) for name in _FACTORIES}
    proxy = _Proxy(torch, factories | {"cuda": _Proxy(torch.cuda, overrides)})
    for module in _megatron_modules():
        if getattr(module, "torch", None) is torch:
            module.torch = proxy
    _redirect_random_state()
    _redirect_methods()


class _Proxy(types.ModuleType):
    def __init__(self, target: types.ModuleType, overrides: dict):
        super().__init__(target.__name__)
        self.__dict__["_target"] = target
        self.__dict__.update(overrides)

    def __getattr__(self, name):
        return getattr(self._target, name)


def _megatron_modules() -> list[types.ModuleType]:
    return [module for name, module in list(sys.modules.items()) if name.startswith("megatron.core")]


def _on_cpu(factory: Callable) -> Callable:
    """`torch.zeros(..., device="cuda")` in schedules, gradient norm and optimizers; pinned memory in the embeddings."""

    @functools.wraps(factory)
    def wrapped(*args, **kwargs):
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return wrapped


def _redirect_random_state() -> None:
    """What recomputed layers restore: Megatron reads and sets the state of a CUDA generator."""
    from megatron.core.tensor_parallel import random

    _redirect(random, "_get_cuda_rng_state", lambda *_args, **_kwargs: torch.get_rng_state())
    _redirect(random, "_set_cuda_rng_state", lambda state, *_args, **_kwargs: torch.set_rng_state(state))


def _redirect_methods() -> None:
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.models.common.language_module.language_module import LanguageModule
    from megatron.core.optimizer import clip_grads
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

    # These compare Tensor.type() with names like "torch.cuda.FloatTensor".
    _redirect_method(clip_grads, "clip_grad_by_total_norm_fp32", "type", _cuda_named_type)
    _redirect_method(DistributedOptimizer, "__init__", "type", _cuda_named_type)
    _redirect_method(Float16OptimizerWithFloat16Params, "__init__", "type", _cuda_named_type)
    # Tied embeddings over pipeline stages, and positions over context-parallel ranks, call Tensor.cuda().
    _redirect_method(LanguageModule, "setup_embeddings_and_output_layer", "cuda", lambda tensor, **_: tensor)
    _redirect_method(rope_utils, "get_pos_emb_on_this_cp_rank", "cuda", lambda tensor, **_: tensor)


def _redirect_method(owner: type | types.ModuleType, name: str, method: str, replacement: Callable) -> None:
    """Replace `method` of torch.Tensor as long as Megatron's function `owner.name` runs."""
    function = getattr(owner, name)

    def redirected(*args, **kwargs):
        original = getattr(torch.Tensor, method)
        setattr(torch.Tensor, method, replacement)
        try:
            return function(*args, **kwargs)
        finally:
            setattr(torch.Tensor, method, original)

    _redirect(owner, name, redirected)


def _redirect(owner: type | types.ModuleType, name: str, redirected: Callable) -> None:
    """Put `redirected` in the place of Megatron's function `owner.name`, once, and wherever it is imported by name."""
    function = getattr(owner, name)
    if getattr(function, "on_cpu", False):
        return
    redirected = functools.wraps(function)(redirected)
    redirected.on_cpu = True
    for holder in [owner] if isinstance(owner, type) else _megatron_modules():
        if getattr(holder, name, None) is function:
            setattr(holder, name, redirected)


_type = torch.Tensor.type


def _cuda_named_type(self: torch.Tensor, *args, **kwargs):
    result = _type(self, *args, **kwargs)
    return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result
