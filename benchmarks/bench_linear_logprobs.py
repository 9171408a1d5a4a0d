"""Log-probabilities from hidden states against materialised logits, log_softmax and gather in torch."""

import harness
import torch

from aligner import ops

N, H, V = 2048, 576, 49152


def inputs(train_weight: bool):
    def make(small: bool):
        n, v = (8, 128) if small else (N, V)
        hidden, weight = torch.randn(n, H), torch.randn(v, H) * 0.05
        return hidden.requires_grad_(), weight.requires_grad_(train_weight), torch.randint(0, v, (n,))

    return make


def backward(logprobs, hidden, weight):
    return torch.autograd.grad(logprobs.sum(), [x for x in (hidden, weight) if x.requires_grad])


def fused(hidden, weight, targets):
    return backward(ops.linear_logprobs(hidden, weight, targets, impl="cpp")[0], hidden, weight)


def fused_avx2(hidden, weight, targets):
    best = ops.cpu_isa()
    ops.cpu_isa("avx2")
    try:
        return fused(hidden, weight, targets)
    finally:
        ops.cpu_isa(best)


def materialised(hidden, weight, targets):
    logprobs = (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None])
    return backward(logprobs, hidden, weight)


@torch.no_grad()
def fused_forward(hidden, weight, targets):
    return ops.linear_logprobs(hidden, weight, targets, impl="cpp")[0]


@torch.no_grad()
def materialised_forward(hidden, weight, targets):
    return (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None])


if __name__ == "__main__":
    both = {"cpp": fused, "cpp-avx2": fused_avx2, "torch": materialised}
    smallest = 4 * (N * H + V * H)  # hidden and weight, read once
    cases = [
        harness.Case(
            shape=f"N{N} H{H} V{V} {what}",
            dtype="float32",
            inputs=inputs(train_weight),
            subjects=subjects,
            bytes=smallest * passes,
        )
        for what, train_weight, subjects, passes in (
            ("forward+backward", True, both, 3),
            ("forward+backward frozen-weight", False, both, 2),
            ("forward", False, {"cpp": fused_forward, "torch": materialised_forward}, 1),
        )
    ]
    harness.main("linear_logprobs", cases)
