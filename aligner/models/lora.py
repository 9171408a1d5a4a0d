r"""Low-rank adapters on Megatron-core's parallel linear layers.

    y = W x + (alpha / rank) B A x,   A: rank x in, B: out x rank, B = 0 at the start

Source: Hu et al. 2021, arXiv:2106.09685, section 4.1.
"""

import math
import zlib
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn

from aligner.models.linear import linear
from aligner.models.low_rank import LowRank

LINEARS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
ROW_PARALLEL = ("linear_proj", "linear_fc2")


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


class LoRA(nn.Module):
    """The two factors of one adapter; attached to its linear layer as the submodule `lora`.

    A column-parallel layer splits the rows of W and so of B, and every rank has all of A; a row-parallel one splits the
    columns of W and of A. Only `rank` numbers a token cross between the ranks, between A and B.

    weight: of the linear layer, this rank's part.
    generator: of A's initial values. Every rank draws the whole A and keeps its part, so that A is the same on any
        layout.
    """

    def __init__(self, weight: Tensor, config: LoRAConfig, *, row_parallel: bool, sequence: bool, generator):
        super().__init__()
        self.row_parallel, self.sequence = row_parallel, sequence
        group = parallel_state.get_tensor_model_parallel_group()
        out_features, in_features = weight.shape
        whole = in_features * (group.size() if row_parallel else 1)
        bound = 1 / math.sqrt(whole)
        a = torch.empty(config.rank, whole).uniform_(-bound, bound, generator=generator)
        if row_parallel:
            a = a.narrow(1, group.rank() * in_features, in_features).clone()
        self.a = nn.Parameter(a.to(weight))
        self.b = nn.Parameter(weight.new_zeros(out_features, config.rank))
        split, copied = (self.a, self.b) if row_parallel else (self.b, self.a)
        set_tensor_model_parallel_attributes(split, True, 1 if row_parallel else 0, 1)
        copied.sequence_parallel = sequence  # a rank's gradient comes from its own tokens; Megatron adds them up
        self.scale = config.alpha / config.rank
        self.enabled = True

    def add(self, _layer: nn.Module, inputs: tuple, output: tuple[Tensor, Tensor | None]):
        """Forward hook of the linear layer, whose output is (y, bias)."""
        if not self.enabled:
            return output
        y, bias = output
        up = linear(self._across(linear(inputs[0], self.a)), self.b)
        return torch.add(y, up, alpha=self.scale), bias

    def _across(self, down: Tensor) -> Tensor:
        """A x of what this rank has of x -> what it needs for its part of B."""
        if self.row_parallel:
            if self.sequence:
                return reduce_scatter_to_sequence_parallel_region(down)
            return reduce_from_tensor_model_parallel_region(down)
        if self.sequence:
            return gather_from_sequence_parallel_region(down, tensor_parallel_output_grad=True)
        return copy_to_tensor_model_parallel_region(down)

    def over(self, weight: Tensor) -> LowRank:
        """W + (alpha / rank) B A."""
        return LowRank(weight, self.b.detach(), self.a.detach(), self.scale)


def attach(linears: dict[str, nn.Module], config: LoRAConfig, *, sequence: bool, seed: int) -> dict[str, LoRA]:
    """Give every target an adapter. Returns adapters by name of the layer.

    linears: linear layers by a name that is the same on any layout.
    sequence: the layout is sequence-parallel.
    """
    adapters = {}
    for name, layer in linears.items():
        kind = name.rsplit(".", 1)[-1]
        if kind in config.targets:
            generator = torch.Generator().manual_seed(seed * 2**32 + zlib.crc32(name.encode()))
            layer.lora = adapters[name] = LoRA(
                layer.weight, config, row_parallel=kind in ROW_PARALLEL, sequence=sequence, generator=generator
            )
            layer.register_forward_hook(layer.lora.add)
    return adapters
