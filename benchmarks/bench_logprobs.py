"""Log-probabilities from logits, forward and backward, against torch's log_softmax and gather."""

import harness
import torch

from aligner import ops

N, V = 1024, 49152


def inputs(dtype):
    def make(small: bool):
        n, v = (4, 64) if small else (N, V)
        return torch.randn(n, v).to(dtype).requires_grad_(), torch.randint(0, v, (n,))

    return make


def fused(logits, targets):
    logprobs, _ = ops.logprobs(logits, targets, impl="cpp")
    return torch.autograd.grad(logprobs.sum(), logits)


def torch_gather(logits, targets):
    logprobs = torch.log_softmax(logits, dim=-1).gather(1, targets[:, None])
    return torch.autograd.grad(logprobs.sum(), logits)


def torch_with_entropy(logits, targets):
    logprobs, _ = ops.logprobs(logits, targets, impl="reference")
    return torch.autograd.grad(logprobs.sum(), logits)


if __name__ == "__main__":
    cases = [
        harness.Case(
            shape=f"N{N} V{V} forward+backward",
            dtype=str(dtype).removeprefix("torch."),
            inputs=inputs(dtype),
            subjects={"cpp": fused, "torch": torch_gather, "reference": torch_with_entropy},
            bytes=3 * N * V * dtype.itemsize,
        )
        for dtype in (torch.float32, torch.bfloat16)
    ]
    harness.main("logprobs", cases)
