"""A weight under an adapter that is merged where it is needed. Without Megatron-core: samplers import it too."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from aligner.models.weights import window


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
