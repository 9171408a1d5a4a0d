"""Masked whitening against the same in PyTorch."""

import harness
import torch

from aligner import ops

N = 1 << 20


def inputs(small: bool):
    n = 1000 if small else N
    return torch.randn(n), torch.rand(n) < 0.8


if __name__ == "__main__":
    case = harness.Case(
        shape=f"N{N}",
        dtype="float32",
        inputs=inputs,
        subjects={impl: lambda *inputs, impl=impl: ops.whiten(*inputs, impl=impl) for impl in ("cpp", "reference")},
        bytes=N * (3 * (4 + 1) + 4),  # the mean, the deviations and the result each read everything
    )
    harness.main("whiten", [case])
