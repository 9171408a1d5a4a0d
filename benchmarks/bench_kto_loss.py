"""KTO's loss with its statistics, forward and backward, against the same in PyTorch."""

import harness
import torch

from aligner import ops


def inputs(b):
    def make(small: bool):
        policy, reference = -torch.rand(2, 1000 if small else b)
        return policy.requires_grad_(), reference, torch.rand(len(policy)) < 0.5, torch.tensor(0.1)

    return make


def call(impl):
    def step(policy, reference, desirable, kl):
        loss, stats = ops.kto_loss(policy, reference, desirable, kl, 1000.0, beta=0.1, impl=impl)
        return stats, torch.autograd.grad(loss, policy)

    return step


if __name__ == "__main__":
    cases = [
        harness.Case(
            shape=f"B{b} forward+backward",
            dtype="float32",
            inputs=inputs(b),
            subjects={impl: call(impl) for impl in (harness.COMPILED, "reference")},
            bytes=b * (4 + 4 + 1 + 4),
        )
        for b in harness.TOKENS
    ]
    harness.main("kto_loss", cases)
