import pytest
import torch
from three_way import assert_three_way

from aligner import ops
from aligner.ops.kto_loss import STATS

SETTINGS = dict(beta=0.3, desirable_weight=1.2, undesirable_weight=0.7)


def case(n, spread=4.0):
    generator = torch.Generator().manual_seed(n)
    policy = -40 + torch.randn(n, generator=generator)
    ref = policy + spread * torch.randn(n, generator=generator)
    return policy, ref, torch.rand(n, generator=generator) < 0.4, torch.tensor(0.8)


def textbook(policy, ref, desirable, kl, num, *, beta, desirable_weight, undesirable_weight):
    """One response at a time, with exp alone."""
    h = policy - ref.double()
    losses = [
        desirable_weight * (1 - 1 / (1 + torch.exp(-beta * (x - kl.double()))))
        if good
        else undesirable_weight * (1 - 1 / (1 + torch.exp(-beta * (kl.double() - x))))
        for x, good in zip(h, desirable.tolist(), strict=True)
    ]
    loss = torch.stack(losses).sum() if losses else policy.sum()
    rewards = beta * h
    terms = (loss, desirable.double().sum(), rewards[desirable].sum(), rewards[~desirable].sum())
    return loss / num, dict(zip(STATS, (t / num for t in terms), strict=True))


def evaluate(function, policy, dtype):
    policy = policy.detach().to(dtype).requires_grad_()
    loss, stats = function(policy)
    (d_policy,) = torch.autograd.grad(3 * loss, policy)
    return {"loss": loss.detach(), "d_policy": d_policy} | {name: x.detach() for name, x in stats.items()}


@pytest.mark.parametrize("n", [0, 1, 7, 16, 1003])
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_three_way(isa, n, spread):
    policy, ref, desirable, kl = case(n, spread)
    num = 0.5 * n + 1
    truth = evaluate(lambda p: textbook(p, ref, desirable, kl, num, **SETTINGS), policy, torch.float64)
    eager, kernel = (
        evaluate(lambda p, i=impl: ops.kto_loss(p, ref, desirable, kl, num, impl=i, **SETTINGS), policy, torch.float32)
        for impl in ("reference", "cpp")
    )
    for name in truth:
        assert_three_way(truth[name], eager[name], kernel[name], epsilon=5e-7, what=name)


def test_many(isa):
    policy, ref, desirable, kl = case(20011)
    eager, kernel = (
        evaluate(lambda p, i=i: ops.kto_loss(p, ref, desirable, kl, 9.0, impl=i, **SETTINGS), policy, torch.float32)
        for i in ("reference", "cpp")
    )
    for name in eager:
        torch.testing.assert_close(kernel[name], eager[name], rtol=2e-6, atol=1e-6)


def test_far_from_the_reference_point(isa):
    policy = torch.tensor([1e4, -1e4, 1e4, -1e4]).requires_grad_()
    desirable = torch.tensor([True, True, False, False])
    loss, _ = ops.kto_loss(policy, torch.zeros(4), desirable, torch.tensor(0.0), 1.0, beta=1.0, impl="cpp")
    assert loss.item() == 2.0  # one of each kind is certain and wrong
    assert torch.equal(torch.autograd.grad(loss, policy)[0], torch.zeros(4))


def test_gradcheck():
    policy, ref, desirable, kl = (t if t.dtype == torch.bool else t.double() for t in case(6))
    call = lambda p: ops.kto_loss(p, ref, desirable, kl, 6.0, **SETTINGS)[0]  # noqa: E731
    assert torch.autograd.gradcheck(call, (policy.requires_grad_(),))


def test_errors():
    policy, ref, desirable, kl = case(4)
    with pytest.raises(RuntimeError, match=r"kto_loss: desirable must be CPU Bool of shape \[4\], got CPU Long"):
        ops.kto_loss(policy, ref, desirable.long(), kl, 4.0, beta=0.1)
    with pytest.raises(RuntimeError, match=r"kto_loss: kl must be CPU Float of shape \[\], got CPU Float"):
        ops.kto_loss(policy, ref, desirable, policy, 4.0, beta=0.1)
    with pytest.raises(ValueError, match="beta is 0"):
        ops.kto_loss(policy, ref, desirable, kl, 4.0, beta=0)
    with pytest.raises(ValueError, match="num_responses is 0"):
        ops.kto_loss(policy, ref, desirable, kl, 0, beta=0.1)
    with pytest.raises(ValueError, match="weights are -1 and 1.0"):
        ops.kto_loss(policy, ref, desirable, kl, 4.0, beta=0.1, desirable_weight=-1)


def test_opcheck_and_compile():
    policy, ref, desirable, kl = case(19)
    policy.requires_grad_()
    torch.library.opcheck(torch.ops.aligner.kto_loss.default, (policy, ref, desirable, kl, 9.0, 0.1, 1.0, 1.0))
    call = lambda p: ops.kto_loss(p * 2, ref, desirable, kl, 9.0, beta=0.1)[0]  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(torch.autograd.grad(compiled(policy), policy)[0], torch.autograd.grad(call(policy), policy)[0])
