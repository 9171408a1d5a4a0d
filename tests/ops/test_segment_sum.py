import pytest
import torch
from three_way import assert_three_way

from aligner import ops

LENGTHS = [[], [0], [1], [3, 0, 5], [8, 16, 17, 0, 0, 1], [1003, 7], [2] * 300]
OPS = {False: ops.segment_sum, True: ops.segment_mean}


def case(lengths, kept=0.6):
    generator = torch.Generator().manual_seed(sum(lengths))
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    x = torch.randn(sum(lengths), generator=generator)
    mask = None
    if kept is not None:
        mask = torch.rand(sum(lengths), generator=generator) < kept
        x[~mask] = torch.nan
    return x, cu_seqlens, mask, torch.randn(len(lengths), generator=generator)


def textbook(x, cu_seqlens, mask, mean):
    rows = []
    for begin, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        kept = x[begin:end] if mask is None else x[begin:end][mask[begin:end]]
        rows.append(kept.sum() / max(1, len(kept)) if mean else kept.sum())
    return torch.stack(rows) if rows else x.sum() * x.new_zeros(0)


def evaluate(function, x, g, dtype):
    x = x.detach().to(dtype).requires_grad_()
    result = function(x)
    return {"result": result.detach(), "d_x": torch.autograd.grad((result * g).sum(), x)[0]}


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("kept", [None, 0.6, 0.0])
@pytest.mark.parametrize("mean", [False, True])
def test_three_way(isa, lengths, kept, mean):
    x, cu_seqlens, mask, g = case(lengths, kept)
    truth = evaluate(lambda x: textbook(x, cu_seqlens, mask, mean), x, g, torch.float64)
    eager, kernel = (
        evaluate(lambda x, impl=impl: OPS[mean](x, cu_seqlens, mask_N=mask, impl=impl), x, g, torch.float32)
        for impl in ("reference", "cpp")
    )
    for name in truth:
        assert_three_way(truth[name], eager[name], kernel[name], epsilon=1e-6, what=name)


def test_reference_gradient():
    x, cu_seqlens, mask, _ = case([3, 0, 5], 0.6)
    x = x.nan_to_num().double().requires_grad_()
    for mean in (False, True):
        assert torch.autograd.gradcheck(
            lambda x, mean=mean: OPS[mean](x, cu_seqlens, mask_N=mask, impl="reference"), (x,)
        )


def test_non_contiguous(isa):
    x, cu_seqlens, mask, _ = case([5, 11])
    wide = torch.stack([x, x], 1)[:, 0]
    assert torch.equal(ops.segment_sum(wide, cu_seqlens, mask_N=mask), ops.segment_sum(x, cu_seqlens, mask_N=mask))


def test_errors():
    x, cu_seqlens, mask, _ = case([3, 0, 5])
    with pytest.raises(RuntimeError, match="segment_sum: cu_seqlens must start with 0 and end with 8"):
        ops.segment_sum(x, torch.tensor([0, 5], dtype=torch.int32))
    with pytest.raises(RuntimeError, match="segment_sum: cu_seqlens must never decrease, got 6 then 3 at index 1"):
        ops.segment_sum(x, torch.tensor([0, 6, 3, 8], dtype=torch.int32))
    with pytest.raises(RuntimeError, match=r"segment_sum: mask must be CPU Bool of shape \[8\], got CPU Long"):
        ops.segment_mean(x, cu_seqlens, mask_N=mask.long())
    with pytest.raises(ValueError, match="segment_mean: x is float64 on cpu, impl cpp takes float32 on cpu"):
        ops.segment_mean(x.double(), cu_seqlens, impl="cpp")


def test_opcheck_and_compile():
    x, cu_seqlens, mask, g = case([3, 0, 5])
    x = x.nan_to_num().requires_grad_()
    torch.library.opcheck(torch.ops.aligner.segment_sum.default, (x, mask, cu_seqlens, True))

    def call(x):
        return (ops.segment_mean(x * 2, cu_seqlens, mask_N=mask) * g).sum()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(torch.autograd.grad(compiled(x), x)[0], torch.autograd.grad(call(x), x)[0])
