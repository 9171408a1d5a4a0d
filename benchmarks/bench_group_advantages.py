"""GRPO's advantages, against the same with index_add in PyTorch."""

import harness
import torch

from aligner import ops

SAMPLES = 16


def inputs(b):
    def make(small: bool):
        count = 4 * SAMPLES if small else b
        return torch.randn(count), torch.arange(count) // SAMPLES

    return make


if __name__ == "__main__":
    cases = [
        harness.Case(
            shape=f"B{b}",
            dtype="float32",
            inputs=inputs(b),
            subjects={
                impl: lambda r, g, impl=impl: ops.group_advantages(r, g, kind="grpo", impl=impl)
                for impl in (harness.COMPILED, "reference")
            },
            bytes=b * (4 + 8 + 4),
        )
        for b in (1 << 12, 1 << 14, 1 << 16)
    ]
    harness.main("group_advantages", cases)
