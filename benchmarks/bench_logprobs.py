"""Log-probabilities from logits, forward and backward, against torch's log_softmax and gather and its cross-entropy.

Two more subjects say what the memory allows: a plain reading of the logits, and reading and writing them in place.
"""

import harness
import torch

from aligner import ops

V = 49152


def inputs(n, v, dtype):
    def make(small: bool):
        rows, columns = (4, 64) if small else (n, v)
        logits = torch.empty(rows, columns, dtype=dtype)
        for row in logits:
            row.copy_(torch.randn(columns))
        return logits.requires_grad_(), torch.randint(0, columns, (rows,))

    return make


def fused(logits, targets):
    logprobs, _ = ops.logprobs(logits, targets, impl=harness.COMPILED)
    return torch.autograd.grad(logprobs.sum(), logits)


def fused_in_place(logits, targets):
    """As a model does whose logits nobody needs afterwards: no memory for their gradient."""
    logprobs, _ = ops.logprobs(logits.view_as(logits), targets, inplace_backward=True, impl=harness.COMPILED)
    return torch.autograd.grad(logprobs.sum(), logits)


def torch_gather(logits, targets):
    logprobs = torch.log_softmax(logits, dim=-1).gather(1, targets[:, None])
    return torch.autograd.grad(logprobs.sum(), logits)


def cross_entropy(logits, targets):
    loss = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    return torch.autograd.grad(loss.sum(), logits)


@torch.no_grad()
def forward(logits, targets):
    return ops.logprobs(logits, targets, impl=harness.COMPILED)


@torch.no_grad()
def read(logits, targets):
    """The largest number of each row's halves, seen as int32: torch's quickest reading of every byte."""
    return logits.view(torch.int32).amax()


@torch.no_grad()
def backward_in_place(logits, targets):
    n = torch.zeros(len(logits), device=logits.device)
    arguments = (1.0, 0, logits.shape[1], n, n, n, n + 1, None)
    return torch.ops.aligner.logprobs_backward_(logits.detach(), targets, *arguments)


@torch.no_grad()
def read_and_write(logits, targets):
    return logits.detach().view(torch.int32).bitwise_not_()


if __name__ == "__main__":
    cases = []
    for dtype in (torch.float32, torch.bfloat16):
        # The cost grows linearly in N and in V.
        for n, v in ((1024, V // 4), (1024, V // 2), (1024, V), (2048, V), (4096, V)):
            fields = dict(dtype=str(dtype).removeprefix("torch."), inputs=inputs(n, v, dtype))
            both = {harness.COMPILED: fused, harness.COMPILED + "-in-place": fused_in_place}
            both |= {"torch-log_softmax": torch_gather, "torch-cross_entropy": cross_entropy}
            size = n * v * dtype.itemsize
            cases += [
                harness.Case(shape=f"N{n} V{v} forward+backward", subjects=both, bytes=3 * size, **fields),
                harness.Case(
                    shape=f"N{n} V{v} forward", subjects={harness.COMPILED: forward, "read": read}, bytes=size, **fields
                ),
                harness.Case(
                    shape=f"N{n} V{v} backward in place",
                    subjects={harness.COMPILED: backward_in_place, "read-write": read_and_write},
                    bytes=2 * size,
                    **fields,
                ),
            ]
    harness.main("logprobs", cases)
