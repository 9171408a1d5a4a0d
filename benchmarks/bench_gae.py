"""GAE over packed sequences against the loop in Python."""

import harness
import torch

from aligner import ops

B, LENGTH = 256, 512


def inputs(small: bool):
    length = 8 if small else LENGTH
    n = B * length
    cu_seqlens = torch.arange(B + 1, dtype=torch.int32) * length
    return torch.randn(n), torch.randn(n), torch.rand(n) < 0.8, cu_seqlens


def call(impl):
    return lambda *inputs: ops.gae(*inputs, gamma=0.99, lam=0.95, impl=impl)


if __name__ == "__main__":
    case = harness.Case(
        shape=f"B{B} T{LENGTH}",
        dtype="float32",
        inputs=inputs,
        subjects={impl: call(impl) for impl in (harness.COMPILED, "reference")},
        bytes=B * LENGTH * (4 * 4 + 1),
    )
    harness.main("gae", [case])
