"""Optimizer state and gradients leave the device for host memory, while others need it: responses are being sampled."""

from collections.abc import Iterable

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor


class Offload:
    """Moves what only an optimizer step reads. Megatron's own offload_to_cpu moves float32 weights along with it.

    chunks: the network's chunks in their gradient buffers, which are dropped: a step starts from zero.
    optimizer: AdamW; its moments are moved, and masters that are not the weights themselves.
    """

    def __init__(self, chunks: list[DistributedDataParallel], optimizer: MegatronOptimizer):
        self._chunks, self._optimizer = chunks, optimizer
        self._away: list[tuple[Tensor, Tensor]] = []  # tensor without memory, its values on the host

    def leave(self) -> None:
        """Free the device's memory. Nothing may train until come_back()."""
        if self._away:
            return
        weights = {p.untyped_storage().data_ptr() for chunk in self._chunks for p in chunk.parameters()}
        for tensor in self._tensors():
            if tensor.untyped_storage().data_ptr() not in weights:
                host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
                self._away.append((tensor, host.copy_(tensor)))
                tensor.untyped_storage().resize_(0)
        cuda = torch.cuda.is_available()
        for chunk in self._chunks:
            chunk.offload_grad_buffers(synchronize=cuda, empty_cache=cuda)

    def come_back(self) -> None:
        """Everything is where it was."""
        for tensor, host in self._away:
            tensor.untyped_storage().resize_(host.untyped_storage().nbytes())
            tensor.copy_(host)
        if self._away:
            for chunk in self._chunks:
                chunk.restore_grad_buffers(synchronize=torch.cuda.is_available())
        self._away.clear()

    def _tensors(self) -> Iterable[Tensor]:
        for single in getattr(self._optimizer, "chained_optimizers", [self._optimizer]):
            for group in single.optimizer.param_groups:
                yield from (p.data for p in group["params"])
            for state in single.optimizer.state.values():
                yield from (x for x in state.values() if isinstance(x, Tensor) and x.dim())
