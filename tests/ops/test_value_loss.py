import pytest
import torch
from three_way import assert_three_way

from aligner import ops

STATS = ("value_loss", "value_clip_fraction", "value", "return")


def case(n, weights="bool", kept=0.7):
    generator = torch.Generator().manual_seed(n)
    values, old, returns = (torch.randn(n, generator=generator) for _ in range(3))
    mask = torch.rand(n, generator=generator) < kept
    for x in (values, old, returns):
        x[~mask] = torch.nan
    if weights == "float":
        mask = mask * torch.rand(n, generator=generator)
    return values, old, returns, mask


def textbook(values, old, returns, mask, num_tokens, clip, huber=None):
    at = mask != 0
    w, v, old, target = mask[at].double(), values[at], old[at].double(), returns[at].double()
    delta = 1e9 if huber is None else huber
    rho = lambda error: torch.nn.functional.huber_loss(error, torch.zeros_like(error), reduction="none", delta=delta)  # noqa: E731
    plain = rho(v - target)
    clipped = plain if clip is None else rho(old + (v - old).clamp(-clip, clip) - target)
    # In range the two are one number, but not to the last bit.
    outside = torch.zeros_like(plain, dtype=torch.bool) if clip is None else (v - old).abs() > clip
    active = outside & (clipped > plain)
    token = torch.where(active, clipped, plain)
    means = [(w * x).sum() / num_tokens for x in (token, active.double(), v, target)]
    return means[0], dict(zip(STATS, means, strict=True))


def evaluate(function, values, dtype):
    values = values.detach().to(dtype).requires_grad_()
    loss, stats = function(values)
    (gradient,) = torch.autograd.grad(3 * loss, values)
    return {"loss": loss.detach(), "d_values": gradient} | {k: v.detach() for k, v in stats.items()}


@pytest.mark.parametrize("n", [0, 1, 7, 8, 1003, 20011])
@pytest.mark.parametrize("weights", ["bool", "float"])
@pytest.mark.parametrize("clip", [None, 0.2, 0.0])
@pytest.mark.parametrize("huber", [None, 0.7])
def test_three_way(isa, n, weights, clip, huber):
    values, old, returns, mask = case(n, weights)
    tokens = 0.5 * n + 1
    truth = evaluate(lambda v: textbook(v, old, returns, mask, tokens, clip, huber), values, torch.float64)
    eager, kernel = (
        evaluate(
            lambda v, impl=impl: ops.value_loss(v, old, returns, mask, tokens, clip=clip, huber=huber, impl=impl),
            values,
            torch.float32,
        )
        for impl in ("reference", "cpp")
    )
    for name in truth:
        assert_three_way(truth[name], eager[name], kernel[name], epsilon=2e-7, what=name)


def test_reference_in_float64():
    values, old, returns, mask = case(300)
    truth = evaluate(lambda v: textbook(v, old, returns, mask, 99.0, 0.3), values, torch.float64)
    got = evaluate(
        lambda v: ops.value_loss(v, old.double(), returns.double(), mask, 99.0, clip=0.3), values, torch.float64
    )
    for name in truth:
        torch.testing.assert_close(got[name], truth[name], rtol=1e-12, atol=1e-12)


def test_by_hand(isa):
    # v = 1 moved by 1 from old = 0 towards R = 2 (clipped branch 0.5 is worse) and past R = 0.25 (unclipped is worse).
    values = torch.tensor([1.0, 1.0]).requires_grad_()
    loss, stats = ops.value_loss(
        values, torch.zeros(2), torch.tensor([2.0, 0.25]), torch.ones(2, dtype=torch.bool), 2, clip=0.5, impl="cpp"
    )
    torch.testing.assert_close(loss, torch.tensor(0.5 * (1.5**2 + 0.75**2) / 2))
    torch.testing.assert_close(torch.autograd.grad(loss, values)[0], torch.tensor([0.0, 0.375]))
    torch.testing.assert_close(stats["value_clip_fraction"], torch.tensor(0.5))


def test_non_finite_input_shows(isa):
    values, old, returns, mask = case(40, kept=1.0)
    values[3] = torch.nan
    assert ops.value_loss(values, old, returns, mask, 1.0, clip=0.2, impl="cpp")[0].isnan()


def test_errors():
    values, old, returns, mask = case(4)
    with pytest.raises(RuntimeError, match=r"value_loss: returns must be CPU Float of shape \[4\], got CPU Float of"):
        ops.value_loss(values, old, returns[:2], mask, 1.0, clip=None)
    with pytest.raises(ValueError, match="clip is -1"):
        ops.value_loss(values, old, returns, mask, 1.0, clip=-1)
    with pytest.raises(ValueError, match="huber is 0, expected > 0"):
        ops.value_loss(values, old, returns, mask, 1.0, clip=None, huber=0)
    with pytest.raises(ValueError, match="num_tokens is -2"):
        ops.value_loss(values, old, returns, mask, -2, clip=None)
    with pytest.raises(ValueError, match="values is bfloat16"):
        ops.value_loss(values.bfloat16(), old, returns, mask, 1.0, clip=None, impl="cpp")


def test_opcheck_and_compile():
    values, old, returns, mask = case(19)
    values.requires_grad_()
    torch.library.opcheck(torch.ops.aligner.value_loss.default, (values, old, returns, mask, 9.0, 0.2, None))
    torch.library.opcheck(torch.ops.aligner.value_loss.default, (values, old, returns, mask.float(), 9.0, None, 0.5))

    def call(values):
        return ops.value_loss(values * 2, old, returns, mask, 9.0, clip=0.2)[0]

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(values), call(values))
    assert torch.equal(torch.autograd.grad(compiled(values), values)[0], torch.autograd.grad(call(values), values)[0])
