"""The critic's clipped loss with its statistics, forward and backward, against the same in PyTorch."""

import harness
import torch

from aligner import ops

N = 1 << 17


def inputs(small: bool):
    n = 1000 if small else N
    return torch.randn(n).requires_grad_(), torch.randn(n), torch.randn(n), torch.rand(n) < 0.8


def call(impl):
    def step(values, old_values, returns, mask):
        loss, stats = ops.value_loss(values, old_values, returns, mask, 1000.0, clip=0.2, impl=impl)
        return stats, torch.autograd.grad(loss, values)

    return step


if __name__ == "__main__":
    case = harness.Case(
        shape=f"N{N} forward+backward",
        dtype="float32",
        inputs=inputs,
        subjects={impl: call(impl) for impl in ("cpp", "reference")},
        bytes=N * (3 * 4 + 1 + 4),
    )
    harness.main("value_loss", [case])
