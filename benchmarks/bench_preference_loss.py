"""DPO-family losses with their statistics, forward and backward, against the same in PyTorch."""

import harness
import torch

from aligner import ops


def inputs(b):
    def make(small: bool):
        policy, reference = -torch.rand(2, 1000 if small else b), -torch.rand(2, 1000 if small else b)
        return policy[0].requires_grad_(), policy[1].requires_grad_(), *reference

    return make


def call(kind, impl):
    def step(chosen, rejected, ref_chosen, ref_rejected):
        loss, stats = ops.preference_loss(
            chosen, rejected, ref_chosen, ref_rejected, 1000.0, kind=kind, beta=0.1, sft_coef=0.1, impl=impl
        )
        return stats, torch.autograd.grad(loss, (chosen, rejected))

    return step


if __name__ == "__main__":
    cases = [
        harness.Case(
            shape=f"B{b} {kind} forward+backward",
            dtype="float32",
            inputs=inputs(b),
            subjects={impl: call(kind, impl) for impl in (harness.COMPILED, "reference")},
            bytes=b * 4 * (4 + 2),
        )
        for kind, b in (*(("dpo", b) for b in harness.TOKENS), ("cdpo", 1 << 20), ("ipo", 1 << 20), ("orpo", 1 << 20))
    ]
    harness.main("preference_loss", cases)
