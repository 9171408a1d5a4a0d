r"""Low-rank adapters on Megatron-core's parallel linear layers.

    y = W x + (alpha / rank) B A x,   A: rank x in, B: out x rank, B = 0 at the start

Source: Hu et al. 2021, arXiv:2106.09685, section 4.1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from aligner.models.weights import window

LINEARS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    rank: int = 16
    """Rank of the adapters; 0 trains the full weights."""
    alpha: float = 32.0
    """Scale: the adapter's output is multiplied by alpha / rank."""
    targets: tuple[str, ...] = LINEARS
    """Linear layers that get an adapter: linear_qkv, linear_proj, linear_fc1, linear_fc2."""

    def __post_init__(self):
        if self.rank < 0:
            raise ValueError(f"lora.rank is {self.rank}, expected 0 (full weights) or more.")
        unknown = sorted(set(self.targets) - set(LINEARS))
        if unknown or not self.targets:
            raise ValueError(f"lora.targets has {unknown or 'nothing'}, expected names out of {', '.join(LINEARS)}.")


class LowRank(NamedTuple):
    """A weight under its adapter, not computed yet: base + scale * b @ a."""

    base: Tensor
    b: Tensor
    a: Tensor
    scale: float

    def window(self, at: Sequence[int], size: Sequence[int]) -> "LowRank":
        """The box of `size` at `at`, as views."""
        b, a = self.b.narrow(0, at[0], size[0]), self.a.narrow(1, at[1], size[1])
        return LowRank(window(self.base, at, size), b, a, self.scale)

    def merged(self, out: Tensor | None = None) -> Tensor:
        return torch.addmm(self.base, self.b, self.a, alpha=self.scale, out=out)


class LoRA(nn.Module):
    """The two factors of one adapter; attached to its linear layer as the submodule `lora`."""

    def __init__(self, linear: nn.Module, rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        out_features, in_features = linear.weight.shape
        bound = 1 / math.sqrt(in_features)
        a = torch.empty(rank, in_features, dtype=linear.weight.dtype)
        self.a = nn.Parameter(a.uniform_(-bound, bound, generator=generator))
        self.b = nn.Parameter(torch.zeros(out_features, rank, dtype=linear.weight.dtype))
        self.scale = alpha / rank
        self.enabled = True

    def add(self, _linear: nn.Module, inputs: tuple, output: tuple[Tensor, Tensor | None]):
        """Forward hook of the linear layer, whose output is (y, bias)."""
        if not self.enabled:
            return output
        y, bias = output
        down = nn.functional.linear(inputs[0], self.a).flatten(0, -2)
        return torch.addmm(y.flatten(0, -2), down, self.b.T, alpha=self.scale).view_as(y), bias

    def over(self, weight: Tensor) -> LowRank:
        """W + (alpha / rank) B A."""
        return LowRank(weight, self.b.detach(), self.a.detach(), self.scale)


def attach(model: nn.Module, config: LoRAConfig, generator: torch.Generator) -> dict[str, LoRA]:
    """Freeze the model and give every target linear layer an adapter. Returns adapters by name of the layer."""
    model.requires_grad_(False)
    adapters = {}
    for name, module in list(model.named_modules()):
        if name.rsplit(".", 1)[-1] in config.targets:
            module.lora = adapters[name] = LoRA(module, config.rank, config.alpha, generator)
            module.register_forward_hook(module.lora.add)
    return adapters
