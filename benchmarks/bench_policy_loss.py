"""PPO's clipped loss with its statistics, forward and backward, against the same in PyTorch."""

import harness
import torch

from aligner import ops

N = 1 << 17


def inputs(small: bool):
    n = 1000 if small else N
    logprobs = (-torch.rand(n)).requires_grad_()
    entropy = torch.rand(n).requires_grad_()
    return logprobs, logprobs.detach() + 0.2 * torch.randn(n), torch.randn(n), torch.rand(n) < 0.8, entropy


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
    case = harness.Case(
        shape=f"N{N} forward+backward",
        dtype="float32",
        inputs=inputs,
        subjects={impl: call(impl) for impl in ("cpp", "reference")},
        bytes=N * (4 * 4 + 1 + 2 * 4),
    )
    harness.main("policy_loss", [case])
