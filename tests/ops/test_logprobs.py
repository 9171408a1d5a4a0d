import pytest
import torch
from three_way import assert_three_way

from aligner import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(0, 5), (1, 1), (3, 7), (5, 16), (17, 1003), (2, 4113), (3, 49157)]


def case(n, v, dtype=torch.float32, kind="normal"):
    generator = torch.Generator().manual_seed(n * v)
    logits = 4 * torch.randn(n, v, generator=generator)
    targets = torch.randint(0, v, (n,), generator=generator)
    if kind == "extreme":
        logits = torch.where(torch.rand(n, v, generator=generator) < 0.5, 1e4, -1e4) + logits
    if kind == "peaked":
        logits[torch.arange(n), targets] = 30.0
    if kind == "masked":  # -inf everywhere but at the target and some others
        hidden = torch.rand(n, v, generator=generator) < 0.9
        hidden[torch.arange(n), targets] = False
        logits = logits.masked_fill(hidden, -torch.inf)
    g = torch.randn(2, n, generator=generator)
    return logits.to(dtype), targets, g


def textbook(logits, targets, temperature):
    """Float64, straight from the definition."""
    z = logits.double() / temperature
    log_p = z - z.logsumexp(1, keepdim=True)
    p = log_p.exp()
    return log_p[torch.arange(len(z)), targets], -(p * log_p.masked_fill(p == 0, 0)).sum(1)


def evaluate(function, logits, g):
    logits = logits.detach().requires_grad_()
    logprobs, entropy = function(logits)
    (gradient,) = torch.autograd.grad((logprobs * g[0]).sum() + (entropy * g[1]).sum(), logits)
    return {"logprobs": logprobs.detach(), "entropy": entropy.detach(), "d_logits": gradient}


def check(logits, targets, g, temperature=1.0, epsilon=2e-6):
    truth = evaluate(lambda x: textbook(x, targets, temperature), logits.double(), g)
    truth["d_logits"] = truth["d_logits"].nan_to_num()  # -inf - (-inf) in the textbook's gradient; p is 0 there
    eager, kernel = (
        evaluate(lambda x, impl=impl: ops.logprobs(x, targets, temperature=temperature, impl=impl), logits, g)
        for impl in ("reference", "cpp")
    )
    for name in truth:
        assert_three_way(
            truth[name], eager[name].nan_to_num(neginf=-torch.inf), kernel[name], epsilon=epsilon, what=name
        )


@pytest.mark.parametrize("n,v", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_three_way(isa, n, v, dtype):
    check(*case(n, v, dtype))


@pytest.mark.parametrize("kind", ["extreme", "peaked", "masked"])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 7.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_hard_logits(isa, kind, temperature, dtype):
    check(*case(9, 1003, dtype, kind), temperature)


def test_masked_target(isa):
    logits, targets, _ = case(3, 40)
    logits[torch.arange(3), targets] = -torch.inf
    logprobs, entropy = ops.logprobs(logits, targets, impl="cpp")
    assert (logprobs == -torch.inf).all() and entropy.isfinite().all()


def test_nan_shows(isa):
    logits, targets, _ = case(3, 40)
    logits[1, 7] = torch.nan
    logprobs, _ = ops.logprobs(logits, targets, impl="cpp")
    assert logprobs.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("part", [0, 1])
def test_one_output_only(isa, part):
    logits, targets, g = case(5, 77)
    truth = torch.autograd.grad(
        (textbook(x := logits.double().requires_grad_(), targets, 1.0)[part] * g[part]).sum(), x
    )
    got = torch.autograd.grad(
        (ops.logprobs(y := logits.requires_grad_(), targets, impl="cpp")[part] * g[part]).sum(), y
    )
    torch.testing.assert_close(got[0].double(), truth[0], rtol=1e-5, atol=1e-6)


def test_strides(isa):
    # Rows apart, rows that begin anywhere (vector loads need 16 bytes), columns apart.
    for dtype in DTYPES:
        logits, targets, g = case(6, 50, dtype)
        padded = torch.full((6, 67), torch.nan, dtype=dtype)
        padded[:, 3:53] = logits
        for view in (padded[:, 3:53], logits.T.contiguous().T):
            check(view, targets, g)


@pytest.mark.parametrize("dtype", DTYPES)
def test_inplace_backward(isa, dtype):
    logits, targets, g = case(6, 50, dtype)

    def gradients(inplace):
        leaf = logits.clone().requires_grad_()
        computed = leaf * 2
        logprobs, entropy = ops.logprobs(computed, targets, inplace_backward=inplace, impl="cpp")
        ((logprobs * g[0]).sum() + (entropy * g[1]).sum()).backward()
        return leaf.grad, computed

    (plain, _), (inplace, overwritten) = gradients(False), gradients(True)
    assert torch.equal(plain, inplace)
    assert torch.equal(overwritten * 2, inplace)
    with pytest.raises(ValueError, match="leaf tensor"):
        ops.logprobs(logits.requires_grad_(), targets, inplace_backward=True)
    with pytest.raises(ValueError, match="inplace_backward needs impl cpp"):
        ops.logprobs(logits, targets, inplace_backward=True, impl="reference")


def test_same_result_every_time(isa):
    logits, targets, g = case(40, 1003)
    first, second = (evaluate(lambda x: ops.logprobs(x, targets, impl="cpp"), logits, g) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_errors():
    logits, targets, _ = case(4, 9)
    with pytest.raises(RuntimeError, match=r"logprobs: targets must be in \[0, 9\), got 9 at index 0"):
        ops.logprobs(logits, torch.full((4,), 9))
    with pytest.raises(RuntimeError, match=r"logprobs: targets must be CPU Long of shape \[4\], got CPU Int"):
        ops.logprobs(logits, targets.int())
    with pytest.raises(RuntimeError, match="logprobs: logits must have 2 dimensions, got 1"):
        ops.logprobs(logits[0], targets)
    with pytest.raises(ValueError, match="temperature is 0"):
        ops.logprobs(logits, targets, temperature=0)
    with pytest.raises(ValueError, match="logits is float64 on cpu, impl cpp takes float32 or bfloat16 or float16 on"):
        ops.logprobs(logits.double(), targets, impl="cpp")
    with pytest.raises(ValueError, match="logits is float32 on cpu, impl cuda takes float32 or .* on cuda"):
        ops.logprobs(logits, targets, impl="cuda")


def test_every_half_number(isa):
    # Through a row of two equal logits and back: the gradient of one is half of what goes in, rounded to half.
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    numbers = numbers[numbers.isfinite()]
    logits, targets = torch.stack([numbers, numbers], 1).requires_grad_(), torch.zeros(len(numbers), dtype=torch.int64)
    logprobs, _ = ops.logprobs(logits, targets, impl="cpp")
    torch.testing.assert_close(logprobs, torch.full_like(logprobs, -0.6931471805599453))
    (gradient,) = torch.autograd.grad((logprobs * numbers.float()).sum(), logits)
    assert torch.equal(gradient[:, 0], (numbers.float() * 0.5).half())


def test_opcheck_and_compile():
    logits, targets, g = case(4, 35)
    logits.requires_grad_()
    torch.library.opcheck(torch.ops.aligner.logprobs.default, (logits, targets, 0.7, 0, 35))
    statistics = [x.detach() for x in torch.ops.aligner.logprobs(logits, targets, 0.7, 0, 35)]
    arguments = (targets, 0.7, 0, 35, statistics[2], statistics[3], statistics[1], g[0], g[1])
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.aligner.logprobs_backward.default, (logits.detach(), *arguments), test_utils=tests)
    torch.library.opcheck(
        torch.ops.aligner.logprobs_backward_.default, (logits.detach().clone(), *arguments), test_utils=tests
    )

    def call(logits):
        logprobs, entropy = ops.logprobs(logits * 2, targets, temperature=0.7)
        return (logprobs * g[0]).sum() + (entropy * g[1]).sum()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(torch.autograd.grad(compiled(logits), logits)[0], torch.autograd.grad(call(logits), logits)[0])
