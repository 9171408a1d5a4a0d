import pytest
import torch
from three_way import assert_three_way

from aligner import ops
from aligner.ops.policy_loss import STATS

SETTINGS = [
    dict(clip_low=0.2, clip_high=0.2),
    dict(clip_low=0.1, clip_high=0.4, dual_clip=3.0, entropy_coef=0.02),
    dict(clip_low=0.0, clip_high=0.0, entropy_coef=-0.5),
    dict(clip_low=0.2, clip_high=0.2, kl="k1", kl_coef=0.1),
    dict(clip_low=0.2, clip_high=0.2, kl="k2", kl_coef=0.3),
    dict(clip_low=0.2, clip_high=0.28, dual_clip=3.0, entropy_coef=0.02, kl="k3", kl_coef=0.2),
]


def case(n, weights="bool", kept=0.7, spread=0.5):
    generator = torch.Generator().manual_seed(n)
    random = [torch.randn(n, generator=generator) for _ in range(4)]
    logprobs, old, advantages = -2 + spread * random[0], -2 + spread * random[1], random[2]
    entropy, importance = torch.rand(n, generator=generator), 2 * torch.rand(n, generator=generator)
    reference = -2 + spread * random[3]
    mask = torch.rand(n, generator=generator) < kept
    for x in (logprobs, old, advantages, entropy, importance, reference):
        x[~mask] = torch.nan
    if weights == "float":
        mask = mask * torch.rand(n, generator=generator)
    return logprobs, old, advantages, mask, entropy, importance, reference


def textbook(
    logprobs,
    old,
    advantages,
    mask,
    num_tokens,
    *,
    entropy_N,
    importance_N,
    ref_logprobs_N,
    clip_low,
    clip_high,
    dual_clip=None,
    entropy_coef=0,
    kl="k3",
    kl_coef=0,
):
    """The formula on the tokens that count, through autograd's own max, min and clamp."""
    at = mask != 0
    w, logp, a, c = mask[at].double(), logprobs[at], advantages[at].double(), importance_N[at].double()
    d = logp - old[at].double()
    x = logp - ref_logprobs_N[at].double()
    ratio, clamped = d.exp(), d.exp().clamp(1 - clip_low, 1 + clip_high)
    token = torch.maximum(-a * ratio, -a * clamped)
    active = -a * clamped > -a * ratio
    if dual_clip is not None:
        active = active | ((a < 0) & (-a * dual_clip < token))
        token = torch.where(a < 0, torch.minimum(token, -a * dual_clip), token)
    estimate = {"k1": x, "k2": x * x / 2, "k3": (-x).exp() - 1 + x}[kl]
    terms = (c * token, active.double(), d.exp() - 1 - d, ratio, clamped, entropy_N[at], estimate, c)
    means = [(w * term).sum() / num_tokens for term in terms]
    loss = means[0] - entropy_coef * means[5] + kl_coef * means[6]
    return loss, dict(zip(STATS, means, strict=True))


def evaluate(function, logprobs, entropy, dtype):
    logprobs, entropy = (x.detach().to(dtype).requires_grad_() for x in (logprobs, entropy))
    loss, stats = function(logprobs, entropy)
    d_logprobs, d_entropy = torch.autograd.grad(3 * loss, (logprobs, entropy), allow_unused=True)
    d_entropy = torch.zeros_like(logprobs) if d_entropy is None else d_entropy
    return {"loss": loss.detach(), "d_logprobs": d_logprobs, "d_entropy": d_entropy} | {
        name: value.detach() for name, value in stats.items()
    }


@pytest.mark.parametrize("n", [0, 1, 7, 8, 1003, 20011])
@pytest.mark.parametrize("weights", ["bool", "float"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_three_way(isa, n, weights, setting):
    logprobs, old, advantages, mask, entropy, importance, reference = case(n, weights)
    given = dict(importance_N=importance, ref_logprobs_N=reference, **setting)
    tokens = 0.5 * n + 1

    def call(impl):
        return lambda lp, h: ops.policy_loss(lp, old, advantages, mask, tokens, entropy_N=h, impl=impl, **given)

    truth = evaluate(
        lambda lp, h: textbook(lp, old, advantages, mask, tokens, entropy_N=h, **given),
        logprobs,
        entropy,
        torch.float64,
    )
    eager = evaluate(call("reference"), logprobs, entropy, torch.float32)
    kernel = evaluate(call("cpp"), logprobs, entropy, torch.float32)
    assert truth.keys() == eager.keys() == kernel.keys()
    for name in truth:
        assert_three_way(truth[name], eager[name], kernel[name], epsilon=2e-7, what=name)


def test_reference_in_float64():
    logprobs, old, advantages, mask, entropy, importance, reference = case(300)
    for setting in SETTINGS:
        given = dict(importance_N=importance.double(), ref_logprobs_N=reference.double(), **setting)

        def call(function, given=given):
            return lambda lp, h: function(lp, old.double(), advantages.double(), mask, 100.0, entropy_N=h, **given)

        truth, got = (evaluate(call(f), logprobs, entropy, torch.float64) for f in (textbook, ops.policy_loss))
        for name in truth:
            torch.testing.assert_close(got[name], truth[name], rtol=1e-12, atol=1e-12)


def test_by_hand(isa):
    # Ratios 1.5 and 0.5 with advantage 1: the first is clipped to 1.2 and has no gradient, the second is not.
    logprobs = torch.tensor([1.5, 0.5]).log().requires_grad_()
    loss, stats = ops.policy_loss(
        logprobs,
        torch.zeros(2),
        torch.ones(2),
        torch.ones(2, dtype=torch.bool),
        2,
        clip_low=0.2,
        clip_high=0.2,
        impl="cpp",
    )
    torch.testing.assert_close(loss, torch.tensor(-(1.2 + 0.5) / 2))
    torch.testing.assert_close(torch.autograd.grad(loss, logprobs)[0], torch.tensor([0.0, -0.25]))
    torch.testing.assert_close(stats["clip_fraction"], torch.tensor(0.5))
    assert "entropy" not in stats and not stats["ratio"].requires_grad


def test_small_kl_keeps_its_digits(isa):
    # e^d - 1 - d in float32 is 0 or noise at d = 1e-4, where the estimate is d^2 / 2.
    d = torch.full((100,), 1e-4)
    _, stats = ops.policy_loss(
        d, torch.zeros(100), d, torch.ones(100, dtype=torch.bool), 100, clip_low=0.2, clip_high=0.2, impl="cpp"
    )
    torch.testing.assert_close(stats["approx_kl"].item(), 5.00016667e-9, rtol=1e-4, atol=0)


def test_micro_batches_add_up(isa):
    logprobs, old, advantages, mask = case(501)[:4]

    def call(at):
        return ops.policy_loss(
            logprobs[at], old[at], advantages[at], mask[at], 333.0, clip_low=0.2, clip_high=0.2, impl="cpp"
        )

    whole, parts = call(slice(None)), [call(slice(0, 100)), call(slice(100, None))]
    torch.testing.assert_close(sum(p[0] for p in parts), whole[0])
    for name in whole[1]:
        torch.testing.assert_close(sum(p[1][name] for p in parts), whole[1][name])


def test_non_finite_input_shows(isa):
    logprobs, old, advantages, mask = case(40, kept=1.0)[:4]
    logprobs[3] = torch.nan
    loss, _ = ops.policy_loss(logprobs, old, advantages, mask, 1.0, clip_low=0.2, clip_high=0.2, impl="cpp")
    assert loss.isnan()


def test_errors():
    logprobs, old, advantages, mask = case(4)[:4]

    def call(old=old, mask=mask, num_tokens=1.0, clip_low=0.2, clip_high=0.2, **more):
        return ops.policy_loss(
            logprobs, old, advantages, mask, num_tokens, clip_low=clip_low, clip_high=clip_high, **more
        )

    with pytest.raises(RuntimeError, match=r"policy_loss: old_logprobs must be CPU Float of shape \[4\], got"):
        call(old=old[:2])
    with pytest.raises(RuntimeError, match=r"policy_loss: mask must be CPU Float of shape \[4\], got CPU Long"):
        call(mask=mask.long())
    with pytest.raises(ValueError, match="num_tokens is 0"):
        call(num_tokens=0)
    with pytest.raises(ValueError, match="clip_low is -0.1"):
        call(clip_low=-0.1)
    with pytest.raises(ValueError, match="dual_clip is 0.5, expected more than 1"):
        call(dual_clip=0.5)
    with pytest.raises(ValueError, match="entropy_N is None"):
        call(entropy_coef=0.1)
    with pytest.raises(ValueError, match="ref_logprobs_N is None"):
        call(kl_coef=0.1)
    with pytest.raises(ValueError, match="kl is 'k4', expected k1, k2 or k3"):
        call(kl="k4")
    with pytest.raises(ValueError, match="old_logprobs is float64"):
        call(old=old.double(), impl="cpp")


def test_opcheck_and_compile():
    logprobs, old, advantages, mask, entropy, importance, reference = case(19)
    tensors = (logprobs.requires_grad_(), old, advantages, mask, importance, reference, entropy.requires_grad_())
    torch.library.opcheck(torch.ops.aligner.policy_loss.default, (*tensors, 9.0, 0.2, 0.3, None, 0.1, 0.2, "k3"))

    def call(logprobs):
        loss, stats = ops.policy_loss(logprobs * 2, old, advantages, mask, 9.0, clip_low=0.2, clip_high=0.2)
        return loss + stats["ratio"]

    compiled = torch.compile(call, fullgraph=True, backend="inductor")
    for got, want in zip(
        (compiled(logprobs), *torch.autograd.grad(compiled(logprobs), logprobs)),
        (call(logprobs), *torch.autograd.grad(call(logprobs), logprobs)),
        strict=True,
    ):
        torch.testing.assert_close(got, want)
