"""Distillation over the teacher's top k and what remains, forward and backward, against the same in PyTorch."""

import harness
import torch

from aligner import ops

V, K = 49152, 64


def inputs(n, dtype):
    def make(small: bool):
        rows, columns = (4, 200) if small else (n, V)
        logits = torch.randn(rows, columns)
        top = (logits + torch.randn(rows, columns)).topk(K, dim=1)
        log_sum = logits.logsumexp(1) + 0.5
        return logits.to(dtype).requires_grad_(), top.indices, top.values, log_sum

    return make


def call(impl):
    def step(logits, ids, values, log_sum):
        loss, _ = ops.topk_distillation_loss(logits, ids, values, None, 100.0, teacher_log_sum_N=log_sum, impl=impl)
        return torch.autograd.grad(loss, logits)

    return step


if __name__ == "__main__":
    cases = [
        harness.Case(
            shape=f"N{n} V{V} K{K} forward+backward",
            dtype=str(dtype).removeprefix("torch."),
            inputs=inputs(n, dtype),
            subjects={impl: call(impl) for impl in (harness.COMPILED, "reference")},
            bytes=3 * n * V * dtype.itemsize,
        )
        for n, dtype in ((256, torch.float32), (512, torch.float32), (1024, torch.float32), (1024, torch.bfloat16))
    ]
    harness.main("topk_distillation_loss", cases)
