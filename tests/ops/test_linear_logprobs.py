import pytest
import torch
from three_way import assert_three_way

from aligner import ops

# Around the kernel's tile sizes (6 x 16, 96 and 132 rows, 288 rows of weight) and far from them; (N, H, V).
SHAPES = [(0, 8, 5), (1, 1, 1), (3, 5, 7), (7, 16, 288), (13, 33, 289), (97, 40, 577), (133, 67, 1003), (270, 700, 300)]


def case(n, h, v, dtype=torch.float32, kept=None, scale=1.0):
    generator = torch.Generator().manual_seed(n + h + v)
    hidden = scale * torch.randn(n, h, generator=generator)
    weight = torch.randn(v, h, generator=generator) / h**0.5 * 3
    targets = torch.randint(0, v, (n,), generator=generator)
    g = torch.randn(2, n, generator=generator)
    mask = None
    if kept is not None:
        mask = torch.rand(n, generator=generator) < kept
        hidden[~mask] = torch.nan
        targets[~mask] = -100
    return hidden.to(dtype), weight.to(dtype), targets, mask, g


def textbook(hidden, weight, targets, mask, temperature):
    """Float64, straight from the definition, on the rows that count alone."""
    at = torch.arange(len(hidden)) if mask is None else mask.nonzero().squeeze(1)
    z = hidden[at].double() @ weight.double().T / temperature
    log_p = z - z.logsumexp(1, keepdim=True)
    zero = torch.zeros(len(hidden), dtype=torch.float64)
    entropy = -(log_p.exp() * log_p).sum(1)
    return zero.index_put((at,), log_p[torch.arange(len(at)), targets[at]]), zero.index_put((at,), entropy)


def evaluate(function, hidden, weight, g):
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    logprobs, entropy = function(hidden, weight)
    gradients = torch.autograd.grad((logprobs * g[0]).sum() + (entropy * g[1]).sum(), (hidden, weight))
    return dict(logprobs=logprobs.detach(), entropy=entropy.detach(), d_hidden=gradients[0], d_weight=gradients[1])


def check(hidden, weight, targets, mask, g, temperature=1.0, epsilon=2e-5):
    truth = evaluate(lambda h, w: textbook(h, w, targets, mask, temperature), hidden.double(), weight.double(), g)
    eager, kernel = (
        evaluate(
            lambda h, w, impl=impl: ops.linear_logprobs(h, w, targets, mask_N=mask, temperature=temperature, impl=impl),
            hidden,
            weight,
            g,
        )
        for impl in ("reference", "cpp")
    )
    for name in truth:
        assert_three_way(truth[name], eager[name], kernel[name], epsilon=epsilon, what=name)


@pytest.mark.parametrize("n,h,v", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kept", [None, 0.6, 0.0])
def test_three_way(cpu_isa, n, h, v, dtype, kept):
    check(*case(n, h, v, dtype, kept))


@pytest.mark.parametrize("temperature", [0.3, 7.0])
def test_temperature(cpu_isa, temperature):
    check(*case(50, 33, 600), temperature)


def test_extreme_logits(cpu_isa):
    # Logits around +-1e4: their own rounding, 1e-3, is what eager and kernel share.
    check(*case(31, 33, 600, scale=1e3), epsilon=1e-2)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads(cpu_isa, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for n in (1, 3, 200):
            check(*case(n, 20, 900))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_only_what_is_asked_for(cpu_isa, part, frozen):
    hidden, weight, targets, _, g = case(50, 33, 600)
    wanted = {"hidden": weight, "weight": hidden}[frozen].requires_grad_()
    got = torch.autograd.grad((ops.linear_logprobs(hidden, weight, targets, impl="cpp")[part] * g[part]).sum(), wanted)
    truth = torch.autograd.grad((textbook(hidden, weight, targets, None, 1.0)[part] * g[part]).sum(), wanted)
    torch.testing.assert_close(got[0], truth[0], rtol=1e-4, atol=1e-5)


def test_no_upstream_gradient_costs_nothing(cpu_isa):
    # A row whose loss is clipped: no gradient, and nothing of it reaches the weight.
    hidden, weight, targets, _, g = case(20, 33, 100)
    g[:, 5:] = 0
    want = evaluate(lambda h, w: ops.linear_logprobs(h[:5], w, targets[:5], impl="cpp"), hidden, weight, g[:, :5])
    got = evaluate(lambda h, w: ops.linear_logprobs(h, w, targets, impl="cpp"), hidden, weight, g)
    torch.testing.assert_close(got["d_weight"], want["d_weight"])
    torch.testing.assert_close(got["d_hidden"], want["d_hidden"])


def test_strides(cpu_isa):
    hidden, weight, targets, mask, g = case(20, 33, 100)
    want = evaluate(lambda h, w: ops.linear_logprobs(h, w, targets, impl="cpp"), hidden, weight, g)
    wide_hidden, wide_weight = torch.full((20, 50), torch.nan), torch.full((100, 41), torch.nan)
    wide_hidden[:, :33], wide_weight[:, :33] = hidden, weight
    for h, w in ((wide_hidden[:, :33], wide_weight[:, :33]), (hidden.T.contiguous().T, weight.T.contiguous().T)):
        got = evaluate(lambda h, w: ops.linear_logprobs(h, w, targets, impl="cpp"), h, w, g)
        assert all(torch.equal(got[name], want[name]) for name in want)


def test_same_result_every_time(cpu_isa):
    hidden, weight, targets, mask, g = case(133, 67, 1003)
    first, second = (
        evaluate(lambda h, w: ops.linear_logprobs(h, w, targets, impl="cpp"), hidden, weight, g) for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_errors():
    hidden, weight, targets, mask, _ = case(4, 8, 9)
    with pytest.raises(RuntimeError, match=r"linear_logprobs: targets must be in \[0, 9\), got -100 at index 0"):
        ops.linear_logprobs(hidden, weight, torch.full((4,), -100))
    with pytest.raises(RuntimeError, match=r"linear_logprobs: weight must be CPU Float of shape \[9, 8\], got"):
        ops.linear_logprobs(hidden, weight[:, :7], targets)
    with pytest.raises(RuntimeError, match="hidden and weight must have one dtype, got Float and BFloat16"):
        ops.linear_logprobs(hidden, weight.bfloat16(), targets)
    with pytest.raises(RuntimeError, match=r"linear_logprobs: mask must be CPU Bool of shape \[4\]"):
        ops.linear_logprobs(hidden, weight, targets, mask_N=torch.ones(4))
    with pytest.raises(ValueError, match="temperature is -1"):
        ops.linear_logprobs(hidden, weight, targets, temperature=-1)
    with pytest.raises(ValueError, match="hidden is float64"):
        ops.linear_logprobs(hidden.double(), weight, targets, impl="cpp")


def test_opcheck_and_compile():
    hidden, weight, targets, mask, g = case(14, 20, 35, kept=0.6)
    hidden.requires_grad_(), weight.requires_grad_()
    torch.library.opcheck(
        torch.ops.aligner.linear_logprobs.default,
        (hidden.detach().nan_to_num().requires_grad_(), weight, targets, mask, 0.7, 0, 35),
    )

    def call(hidden, weight):
        logprobs, entropy = ops.linear_logprobs(hidden * 2, weight, targets, mask_N=mask, temperature=0.7)
        return (logprobs * g[0]).sum() + (entropy * g[1]).sum()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(f(hidden, weight), (hidden, weight)) for f in (compiled, call))
    # hidden * 2 turns the zero gradient of a NaN row into zero: nothing of it may come out as NaN.
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(got, want, strict=True))
