"""A network's memory leaves the device for the host's, while others need it: responses are sampled, or another network
works."""

from collections.abc import Iterable

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor, nn


class Offload:
    """Moves what only an optimizer step reads, or the weights too. Megatron's own offload_to_cpu moves float32 weights.

    chunks: the network's; those of a trained one in their gradient buffers, which are dropped: a step starts from zero.
    optimizer: AdamW; its moments are moved, and masters that are not the weights themselves. None when nothing trains.
    """

    def __init__(self, chunks: list[nn.Module], optimizer: MegatronOptimizer | None):
        self._chunks, self._optimizer = chunks, optimizer
        self._away: list[tuple[Tensor, Tensor]] = []  # tensor without memory, its values on the host
        self._weights_away: list[tuple[Tensor, Tensor]] = []
        self._kept: list[tuple[Tensor, Tensor]] = []  # of weights that never change, which go only once

    def leave(self, *, weights: bool = False) -> None:
        """Free the device's memory. Nothing may train until come_back(), nor anything run once the weights are away."""
        if self._optimizer and not self._away:
            held = {storage.data_ptr() for storage in self._storages()}
            self._away = _moved(x for x in self._tensors() if x.untyped_storage().data_ptr() not in held)
            cuda = torch.cuda.is_available()
            for chunk in self._chunks:
                chunk.offload_grad_buffers(synchronize=cuda, empty_cache=cuda)
        if weights and not self._weights_away:
            if self._kept:
                self._weights_away = self._kept
                for tensor, _ in self._kept:
                    tensor.untyped_storage().resize_(0)
            else:
                self._weights_away = _moved(map(_whole, self._storages()))
            self._kept = [] if self._optimizer else self._weights_away

    def weights_come_back(self) -> None:
        """The network runs again."""
        _return(self._weights_away)
        self._weights_away = []

    def come_back(self) -> None:
        """Everything is where it was."""
        self.weights_come_back()
        _return(self._away)
        if self._away:
            for chunk in self._chunks:
                chunk.restore_grad_buffers(synchronize=torch.cuda.is_available())
        self._away = []

    def _tensors(self) -> Iterable[Tensor]:
        for single in getattr(self._optimizer, "chained_optimizers", [self._optimizer]):
            for group in single.optimizer.param_groups:
                yield from (p.data for p in group["params"])
            for state in single.optimizer.state.values():
                yield from (x for x in state.values() if isinstance(x, Tensor) and x.dim())

    def _storages(self) -> list[torch.UntypedStorage]:
        """Of the weights; several may share one."""
        storages = [p.untyped_storage() for chunk in self._chunks for p in chunk.parameters()]
        return list({storage.data_ptr(): storage for storage in storages}.values())


def _whole(storage: torch.UntypedStorage) -> Tensor:
    """All bytes of a storage."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _moved(tensors: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Each with its values on the host, its own memory freed."""
    away = []
    for tensor in tensors:
        host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        away.append((tensor, host.copy_(tensor)))
        tensor.untyped_storage().resize_(0)
    return away


def _return(away: list[tuple[Tensor, Tensor]]) -> None:
    for tensor, host in away:
        tensor.untyped_storage().resize_(host.untyped_storage().nbytes())
        tensor.copy_(host, non_blocking=True)  # from pinned memory, ahead of whatever this stream does next
    if away and torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()  # the host's memory may be freed now
