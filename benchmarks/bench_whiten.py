"""Masked whitening against the same in PyTorch."""

import harness
import torch

from aligner import ops


def inputs(n):
    def make(small: bool):
        count = 1000 if small else n
        return torch.randn(count), torch.rand(count) < 0.8

    return make


if __name__ == "__main__":
    cases = [
        harness.Case(
            shape=f"N{n}",
            dtype="float32",
            inputs=inputs(n),
            subjects={
                impl: lambda *inputs, impl=impl: ops.whiten(*inputs, impl=impl)
                for impl in (harness.COMPILED, "reference")
            },
            bytes=n * (3 * (4 + 1) + 4),  # the mean, the deviations and the result each read everything
        )
        for n in harness.TOKENS
    ]
    harness.main("whiten", cases)
