import pytest
import torch
from three_way import assert_three_way

from aligner import ops


def case(n, kept=0.6, offset=0.0):
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, generator=generator) + offset
    mask = torch.rand(n, generator=generator) < kept
    x[~mask] = torch.nan
    return x, mask


def by_definition(x, mask):
    y = torch.zeros(len(x), dtype=torch.float64)
    if mask.any():
        kept = x[mask].double()
        y[mask] = (kept - kept.mean()) / (kept.var(correction=0) + 1e-8).sqrt()
    return y


@pytest.mark.parametrize("n", [0, 1, 2, 7, 1000, 70001])
@pytest.mark.parametrize("kept", [0.0, 0.6, 1.0])
def test_three_way(isa, n, kept):
    x, mask = case(n, kept)
    eager, kernel = (ops.whiten(x, mask, impl=impl) for impl in ("reference", "cpp"))
    assert_three_way(by_definition(x, mask), eager, kernel, epsilon=1e-6)


def test_far_from_zero(isa):
    # mean 1e4, deviation 1: sums of squares in float32 would lose the variance altogether.
    x, mask = case(50000, offset=1e4)
    torch.testing.assert_close(ops.whiten(x, mask, impl="cpp").double(), by_definition(x, mask), rtol=1e-6, atol=1e-6)


def test_reference_in_float64():
    x, mask = case(101)
    torch.testing.assert_close(ops.whiten(x.double(), mask), by_definition(x, mask), rtol=1e-12, atol=1e-12)


def test_constant_gives_zero(isa):
    y = ops.whiten(torch.full((999,), 0.1), torch.ones(999, dtype=torch.bool), impl="cpp")
    assert y.abs().max() < 1e-6


def test_same_result_every_time(isa):
    x, mask = case(70001)
    assert torch.equal(ops.whiten(x, mask, impl="cpp"), ops.whiten(x, mask, impl="cpp"))


def test_no_gradient():
    x, mask = case(50, kept=1.0)
    assert not ops.whiten(x.requires_grad_(), mask, impl="cpp").requires_grad


def test_errors():
    x, mask = case(4)
    with pytest.raises(
        RuntimeError, match=r"whiten: mask must be CPU Bool of shape \[4\], got CPU Bool of shape \[3\]"
    ):
        ops.whiten(x, mask[:3])
    with pytest.raises(ValueError, match="x is float64"):
        ops.whiten(x.double(), mask, impl="cpp")


def test_opcheck_and_compile():
    x, mask = case(33)
    torch.library.opcheck(torch.ops.aligner.whiten_moments.default, (x, mask))
    torch.library.opcheck(
        torch.ops.aligner.whiten_apply.default, (x, mask, torch.tensor([20.0, 0.5, 3.0], dtype=torch.float64))
    )
    compiled = torch.compile(lambda x: ops.whiten(x + 1, mask), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), ops.whiten(x + 1, mask))
