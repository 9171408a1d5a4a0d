"""PPO's clipped loss with its statistics, forward and backward, against the same in PyTorch."""

import harness
import torch

from aligner import ops


def inputs(n):
    def make(small: bool):
        count = 1000 if small else n
        logprobs = (-torch.rand(count)).requires_grad_()
        entropy = torch.rand(count).requires_grad_()
        return (
            logprobs,
            logprobs.detach() + 0.2 * torch.randn(count),
            torch.randn(count),
            torch.rand(count) < 0.8,
            entropy,
        )

    return make


def call(impl):
    def step(logprobs, old_logprobs, advantages, mask, entropy):
        loss, stats = ops.policy_loss(
            logprobs,
            old_logprobs,
            advantages,
            mask,
            1000.0,
            clip_low=0.2,
            clip_high=0.2,
            dual_clip=3.0,
            entropy_N=entropy,
            entropy_coef=0.01,
            impl=impl,
        )
        return stats, torch.autograd.grad(loss, (logprobs, entropy))

    return step


if __name__ == "__main__":
    cases = [
        harness.Case(
            shape=f"N{n} forward+backward",
            dtype="float32",
            inputs=inputs(n),
            subjects={impl: call(impl) for impl in (harness.COMPILED, "reference")},
            bytes=n * (4 * 4 + 1 + 2 * 4),
        )
        for n in harness.TOKENS
    ]
    harness.main("policy_loss", cases)
