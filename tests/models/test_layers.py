"""Layers with backward passes of their own against what autograd makes of their formulas."""

import pytest
import torch
from torch.nn import functional as F

from aligner.models import attention, layers, linear


def gradients(function, *inputs):
    inputs = [x.detach().requires_grad_() for x in inputs]
    y = function(*inputs)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return y, *torch.autograd.grad((y * weights).sum(), inputs)


def close(got, expected):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=2e-5, atol=2e-5)


def test_rms_norm_and_swiglu():
    g = torch.Generator().manual_seed(0)
    for rows in (1, 7, 64):
        x, w = torch.randn(rows, 1, 48, generator=g), torch.randn(48, generator=g)
        norm = gradients(lambda x, w: layers._RMSNorm.apply(x, w, 1e-5), x, w)
        close(norm, gradients(lambda x, w: F.rms_norm(x, (48,), w, 1e-5), x.double(), w.double()))
        swiglu = gradients(layers._SwiGLU.apply, x)
        close(swiglu, gradients(lambda x: F.silu(x[..., :24]) * x[..., 24:], x.double()))


def test_rotation_of_a_strided_view():
    g = torch.Generator().manual_seed(0)
    x, angles = torch.randn(9, 5, 16, generator=g), torch.randn(9, 1, 4, generator=g)

    def rotated(x):
        x1, x2 = x[:, 1:4, :8].chunk(2, dim=-1)
        cos, sin = angles.to(x.dtype).cos(), angles.to(x.dtype).sin()
        return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)

    got = gradients(lambda x: attention._Rotate.apply(x[:, 1:4, :8], angles.cos(), angles.sin()), x)
    close(got, gradients(rotated, x.double()))


@pytest.mark.skipif(not linear.ONEDNN, reason="this build of torch has no oneDNN")
@pytest.mark.parametrize(("rows", "width", "out"), [(1, 3, 5), (7, 16, 4), (33, 4, 64), (128, 48, 96)])
def test_onednn_products(rows, width, out):
    """(33, 4, 64) is thin enough for the other order of factors in the weight's gradient."""
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(rows, 1, width, generator=g), torch.randn(out, width, generator=g)
    assert linear.fits(x, w)
    close(gradients(linear.linear, x, w), gradients(F.linear, x.double(), w.double()))
    frozen = linear.linear(x.clone().requires_grad_(), w)
    assert [saved is None for saved in frozen.grad_fn.saved_tensors] == [True, False]
    assert not linear.fits(x.to(torch.bfloat16), w.to(torch.bfloat16)) and not linear.fits(x[:0], w)
