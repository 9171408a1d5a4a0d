"""Means over sequences, forward and backward, against index_add in PyTorch."""

import harness
import torch

from aligner import ops

LENGTH = 256


def inputs(n):
    def make(small: bool):
        tokens = 4 * LENGTH if small else n
        cu_seqlens = torch.arange(tokens // LENGTH + 1, dtype=torch.int32) * LENGTH
        return torch.randn(tokens).requires_grad_(), cu_seqlens, torch.rand(tokens) < 0.8

    return make


def call(impl):
    def step(x, cu_seqlens, mask):
        return torch.autograd.grad(ops.segment_mean(x, cu_seqlens, mask_N=mask, impl=impl).sum(), x)

    return step


if __name__ == "__main__":
    cases = [
        harness.Case(
            shape=f"N{n} forward+backward",
            dtype="float32",
            inputs=inputs(n),
            subjects={impl: call(impl) for impl in (harness.COMPILED, "reference")},
            bytes=n * (4 + 1 + 4 + 1),
        )
        for n in harness.TOKENS
    ]
    harness.main("segment_sum", cases)
