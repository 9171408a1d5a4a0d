"""Runs Megatron-core on a machine without CUDA: the name `torch` inside megatron.core.* is replaced by a proxy in which
"cuda" means the CPU. No arithmetic changes and torch itself stays untouched.

Each line below is needed by a call that Megatron makes with a hard-coded CUDA device; tests/models/test_cpu.py takes
them out one by one and fails when Megatron no longer needs one.
"""

import functools
import sys
import types

import torch

_FACTORIES = ("tensor", "zeros")
_CPU = torch.device("cpu")


def install() -> None:
    """Let Megatron-core use the CPU where it would use CUDA. Call once, after torch and before building a model.

    Raises RuntimeError on a machine with CUDA, where Megatron must not be redirected.
    """
    if torch.cuda.is_available():
        raise RuntimeError("models.cpu.install() redirects CUDA to the CPU, but this machine has CUDA; do not call it.")
    import megatron.core.models.gpt
    import megatron.core.optimizer
    import megatron.core.optimizer_param_scheduler
    import megatron.core.pipeline_parallel  # noqa: F401

    cuda = _Proxy(torch.cuda, {"current_device": lambda: _CPU})
    proxy = _Proxy(torch, {name: _on_cpu(getattr(torch, name)) for name in _FACTORIES} | {"cuda": cuda})
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = proxy
    _accept_cpu_gradients()


class _Proxy(types.ModuleType):
    def __init__(self, target: types.ModuleType, overrides: dict):
        super().__init__(target.__name__)
        self.__dict__["_target"] = target
        self.__dict__.update(overrides)

    def __getattr__(self, name):
        return getattr(self._target, name)


def _on_cpu(factory):
    """`torch.zeros(..., device="cuda")` in the schedules, the gradient norm and the optimizers."""

    @functools.wraps(factory)
    def wrapped(*args, **kwargs):
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return wrapped


def _accept_cpu_gradients() -> None:
    """clip_grad_by_total_norm_fp32 asserts that Tensor.type() is literally 'torch.cuda.FloatTensor'."""
    from megatron.core.optimizer import clip_grads, optimizer

    original_clip, original_type = clip_grads.clip_grad_by_total_norm_fp32, torch.Tensor.type
    if getattr(original_clip, "on_cpu", False):
        return

    def cuda_named_type(self, *args, **kwargs):
        result = original_type(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    @functools.wraps(original_clip)
    def clip(*args, **kwargs):
        torch.Tensor.type = cuda_named_type
        try:
            return original_clip(*args, **kwargs)
        finally:
            torch.Tensor.type = original_type

    clip.on_cpu = True
    clip_grads.clip_grad_by_total_norm_fp32 = optimizer.clip_grad_by_total_norm_fp32 = clip
