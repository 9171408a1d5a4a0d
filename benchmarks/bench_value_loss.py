"""The critic's clipped loss with its statistics, forward and backward, against the same in PyTorch."""

import harness
import torch

from aligner import ops


def inputs(n):
    def make(small: bool):
        count = 1000 if small else n
        return torch.randn(count).requires_grad_(), torch.randn(count), torch.randn(count), torch.rand(count) < 0.8

    return make


def call(impl):
    def step(values, old_values, returns, mask):
        loss, stats = ops.value_loss(values, old_values, returns, mask, 1000.0, clip=0.2, impl=impl)
        return stats, torch.autograd.grad(loss, values)

    return step


if __name__ == "__main__":
    cases = [
        harness.Case(
            shape=f"N{n} forward+backward",
            dtype="float32",
            inputs=inputs(n),
            subjects={impl: call(impl) for impl in (harness.COMPILED, "reference")},
            bytes=n * (3 * 4 + 1 + 4),
        )
        for n in harness.TOKENS
    ]
    harness.main("value_loss", cases)
