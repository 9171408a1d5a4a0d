"""Log-probabilities from hidden states against materialised logits and the chunked forms that others publish.

chunked: gradients made chunk by chunk within the forward pass, as Liger's fused linear cross-entropy does; it fits
losses that are a sum over tokens. checkpointed: each chunk's logits made again in the backward pass.
"""

import harness
import torch
from torch.utils.checkpoint import checkpoint

from aligner import ops

H, V, CHUNK = 576, 49152, 512
FUSED = "triton" if harness.DEVICE == "cuda" else "cpp"


def inputs(n, train_weight):
    def make(small: bool):
        rows, columns = (8, 128) if small else (n, V)
        hidden, weight = torch.randn(rows, H), torch.randn(columns, H) * 0.05
        return hidden.requires_grad_(), weight.requires_grad_(train_weight), torch.randint(0, columns, (rows,))

    return make


def backward(logprobs, hidden, weight):
    return torch.autograd.grad(logprobs.sum(), [x for x in (hidden, weight) if x.requires_grad])


def fused(hidden, weight, targets):
    return backward(ops.linear_logprobs(hidden, weight, targets, impl=FUSED)[0], hidden, weight)


def fused_avx2(hidden, weight, targets):
    best = ops.cpu_isa()
    ops.cpu_isa("avx2")
    try:
        return fused(hidden, weight, targets)
    finally:
        ops.cpu_isa(best)


def logprobs_of(hidden, weight, targets):
    return (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None])


def materialised(hidden, weight, targets):
    return backward(logprobs_of(hidden, weight, targets), hidden, weight)


def checkpointed(hidden, weight, targets):
    parts = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    logprobs = [checkpoint(logprobs_of, h, weight, t, use_reentrant=False) for h, t in parts]
    return backward(torch.cat(logprobs), hidden, weight)


@torch.no_grad()
def chunked(hidden, weight, targets):
    d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)
    for at in range(0, len(hidden), CHUNK):
        h, t = hidden[at : at + CHUNK], targets[at : at + CHUNK, None]
        d_logits = (h @ weight.T).softmax(-1).neg_()
        d_logits.scatter_add_(1, t, torch.ones_like(t, dtype=h.dtype))
        d_hidden[at : at + CHUNK] = d_logits @ weight
        if weight.requires_grad:
            d_weight.addmm_(d_logits.T, h)
    return d_hidden, d_weight


@torch.no_grad()
def fused_forward(hidden, weight, targets):
    return ops.linear_logprobs(hidden, weight, targets, impl=FUSED)[0]


@torch.no_grad()
def materialised_forward(hidden, weight, targets):
    return logprobs_of(hidden, weight, targets)


if __name__ == "__main__":
    rivals = {"torch": materialised, "torch-chunked": chunked, "torch-checkpointed": checkpointed}
    both = {FUSED: fused, **({"cpp-avx2": fused_avx2} if FUSED == "cpp" else {}), **rivals}
    forward = {FUSED: fused_forward, "torch": materialised_forward}
    cases = [
        harness.Case(
            shape=f"N{n} H{H} V{V} {what}",
            dtype="float32",
            inputs=inputs(n, train_weight),
            subjects=subjects,
            bytes=4 * (n * H + V * H) * passes,  # hidden and weight read once, and once more for each gradient
            flops=2 * n * H * V * passes,
        )
        for n in (1024, 2048, 4096)
        for what, train_weight, subjects, passes in (
            ("forward+backward", True, both, 3),
            ("forward+backward frozen-weight", False, both, 2),
            ("forward", False, forward, 1),
        )
    ]
    harness.main("linear_logprobs", cases)
