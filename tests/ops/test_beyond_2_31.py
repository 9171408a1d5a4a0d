"""Offsets beyond 2^31 elements: rows far apart in a file with holes, of which only the rows take memory."""

import pytest
import torch

from aligner import ops

FAR = 2**31 + 7  # elements between rows; the last row begins beyond 2^32


@pytest.fixture
def far_rows(tmp_path):
    """far_rows(matrix) -> the same numbers, rows FAR apart."""

    def place(matrix, name="storage"):
        rows, columns = matrix.shape
        size = (rows - 1) * FAR + columns
        storage = torch.from_file(str(tmp_path / name), shared=True, size=size, dtype=matrix.dtype)
        return storage.as_strided((rows, columns), (FAR, 1)).copy_(matrix)

    return place


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs(isa, far_rows, dtype):
    logits, targets = torch.randn(3, 501).to(dtype), torch.tensor([0, 250, 500])
    far = far_rows(logits)
    for got, want in zip(ops.logprobs(far, targets, impl="cpp"), ops.logprobs(logits, targets), strict=True):
        torch.testing.assert_close(got, want)
    n, g = torch.zeros(3), torch.ones(3)
    arguments = (targets, 1.0, 0, 501, n, n + 6, n + 1, g, None)
    want = torch.ops.aligner.logprobs_backward(logits, *arguments)
    torch.testing.assert_close(torch.ops.aligner.logprobs_backward(far, *arguments), want)
    torch.ops.aligner.logprobs_backward_(far, *arguments)  # written where it was read
    torch.testing.assert_close(far, want)


def test_linear_logprobs(cpu_isa, far_rows):
    hidden, weight, targets = torch.randn(3, 33), torch.randn(3, 33), torch.tensor([0, 1, 2])
    far = [far_rows(hidden, "hidden").requires_grad_(), far_rows(weight, "weight").requires_grad_()]
    near = [hidden.requires_grad_(), weight.requires_grad_()]
    outputs = [ops.linear_logprobs(*inputs, targets, impl="cpp")[0] for inputs in (far, near)]
    torch.testing.assert_close(*outputs)
    gradients = [torch.autograd.grad(o.sum(), i) for o, i in zip(outputs, (far, near), strict=True)]
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want)


def test_topk_distillation_loss(isa, far_rows):
    logits = torch.randn(3, 501)
    top = torch.randn(3, 501).topk(5, dim=1)
    far, near = far_rows(logits).requires_grad_(), logits.requires_grad_()
    losses = [ops.topk_distillation_loss(x, top.indices, top.values, None, 3.0, impl="cpp")[0] for x in (far, near)]
    torch.testing.assert_close(*losses)
    gradients = [torch.autograd.grad(loss, x)[0] for loss, x in zip(losses, (far, near), strict=True)]
    torch.testing.assert_close(*gradients)


def test_refit_copy(isa, far_rows):
    matrix = torch.randn(3, 77)
    into = far_rows(torch.zeros(3, 77), "into")
    ops.refit_copy([far_rows(matrix, "from")], [into], impl="cpp")
    assert torch.equal(into, matrix)
