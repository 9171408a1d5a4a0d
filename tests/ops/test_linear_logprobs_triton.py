"""The Triton kernels: on the GPU where there is one, else in Triton's interpreter on the CPU."""

import interpreter_bf16  # noqa: F401
import pytest
import torch
from aligner_kernels import linear_logprobs as kernels
from aligner_kernels import tiles
from test_linear_logprobs import case, evaluate, textbook
from three_way import assert_three_way
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from aligner import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Around the interpreter's tile (32 rows x 64 columns, 32 of H at a time), N and V of one tile and of many; (N, H, V).
SHAPES = [(0, 8, 5), (1, 1, 1), (3, 5, 7), (32, 32, 64), (33, 16, 65), (37, 67, 300)]


def call(impl, targets, mask=None, temperature=1.0):
    return lambda h, w: ops.linear_logprobs(h, w, targets, mask_N=mask, temperature=temperature, impl=impl)


def d_logits_rounding(hidden, weight, targets, mask, g, temperature):
    """What rounding d_logits to the dtype of hidden may cost each gradient, at worst."""
    at = torch.arange(len(hidden), device=hidden.device) if mask is None else mask.nonzero().squeeze(1)
    x, w = hidden[at].double(), weight.double()
    z = (x @ w.T / temperature).requires_grad_()
    log_p = z.log_softmax(1)
    logprobs, entropy = log_p.gather(1, targets[at, None]).squeeze(1), -(log_p.exp() * log_p).sum(1)
    (d_z,) = torch.autograd.grad((logprobs * g[0, at]).sum() + (entropy * g[1, at]).sum(), z)
    d_logits = torch.finfo(hidden.dtype).eps / 2 * d_z.abs() / temperature
    d_hidden = torch.zeros_like(hidden, dtype=torch.float64).index_copy(0, at, d_logits @ w.abs())
    return {"d_hidden": d_hidden, "d_weight": d_logits.T @ x.abs()}


def check(hidden, weight, targets, mask, g, temperature=1.0, epsilon=2e-5):
    hidden, weight, targets, g = (x.to(DEVICE) for x in (hidden, weight, targets, g))
    mask = mask if mask is None else mask.to(DEVICE)
    truth = evaluate(lambda h, w: textbook(h, w, targets, mask, temperature), hidden.double(), weight.double(), g)
    eager, kernel = (
        evaluate(call(impl, targets, mask, temperature), hidden, weight, g) for impl in ("reference", "triton")
    )
    epsilons = dict.fromkeys(truth, epsilon)
    if hidden.dtype == torch.bfloat16:
        rounding = d_logits_rounding(hidden, weight, targets, mask, g, temperature)
        epsilons |= {name: epsilon + rounding[name] for name in rounding}
    for name in truth:
        assert_three_way(truth[name], eager[name], kernel[name], epsilon=epsilons[name], what=name)


@pytest.mark.parametrize("n,h,v", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [None, 0.6, 0.0])
def test_three_way(n, h, v, dtype, kept):
    check(*case(n, h, v, dtype, kept))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_of_the_vocabulary(monkeypatch, dtype):
    monkeypatch.setattr(kernels, "SCRATCH", 1)
    monkeypatch.setattr(kernels, "MIN_COLUMNS", 128)
    check(*case(37, 33, 300, dtype, 0.6))


@pytest.mark.parametrize("temperature", [0.3, 7.0])
def test_temperature(temperature):
    check(*case(20, 33, 100), temperature)


def test_extreme_logits():
    # Logits around +-1e4: their own rounding, 1e-3, is what eager and kernel share.
    check(*case(31, 33, 200, scale=1e3), epsilon=1e-2)


def test_columns_that_are_masked_out():
    # Rows of weight that make -inf logits, as where a tokenizer's padding is masked out; a whole tile of them.
    hidden, weight, targets, _, g = case(5, 4, 200)
    hidden[:, 0], weight[:, 0] = 1, 0
    weight[64:, 0] = -torch.inf
    targets %= 64
    got = call("triton", targets.to(DEVICE))(hidden.to(DEVICE), weight.to(DEVICE))
    want = textbook(hidden, weight[:64], targets, None, 1.0)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_only_what_is_asked_for(part, frozen):
    hidden, weight, targets, _, g = (x if x is None else x.to(DEVICE) for x in case(20, 33, 100))
    wanted = {"hidden": weight, "weight": hidden}[frozen].requires_grad_()
    got, want = (
        torch.autograd.grad((f(hidden, weight)[part] * g[part]).sum(), wanted)[0]
        for f in (call("triton", targets), lambda h, w: textbook(h, w, targets, None, 1.0))
    )
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_no_upstream_gradient_costs_nothing():
    hidden, weight, targets, _, g = (x if x is None else x.to(DEVICE) for x in case(20, 33, 100))
    g[:, 5:] = 0
    want = evaluate(call("triton", targets[:5]), hidden[:5], weight, g[:, :5])
    got = evaluate(call("triton", targets), hidden, weight, g)
    assert torch.equal(got["d_weight"], want["d_weight"])
    assert torch.equal(got["d_hidden"][:5], want["d_hidden"]) and not got["d_hidden"][5:].any()


def test_strides():
    hidden, weight, targets, _, g = (x if x is None else x.to(DEVICE) for x in case(20, 33, 100))
    want = evaluate(call("triton", targets), hidden, weight, g)
    wide_hidden, wide_weight = (torch.full(shape, torch.nan, device=DEVICE) for shape in ((20, 50), (100, 41)))
    wide_hidden[:, :33], wide_weight[:, :33] = hidden, weight
    for h, w in ((wide_hidden[:, :33], wide_weight[:, :33]), (hidden.T.contiguous().T, weight.T.contiguous().T)):
        got = evaluate(call("triton", targets), h, w, g)
        assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("vocab_start", [0, 40, 100])
def test_shard(vocab_start):
    # Targets of other shards lie before, between and after the shard's own, and where its last tile is padded.
    hidden, weight, targets, _, g = case(150, 16, 50)
    targets = torch.arange(150)
    arguments = (hidden, weight, targets, None, 0.7, vocab_start, 150)
    want = torch.ops.aligner.linear_logprobs(*arguments)
    statistics = (*want[2:], want[1], *g, True, True)
    want += torch.ops.aligner.linear_logprobs_backward(*arguments, *statistics)
    arguments, statistics = (
        [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in values] for values in (arguments, statistics)
    )
    got = torch.ops.aligner.linear_logprobs_triton(*arguments)
    got += torch.ops.aligner.linear_logprobs_triton_backward(*arguments, *statistics)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-5)


def test_offsets_beyond_32_bits():
    hidden, weight, targets, mask, g = case(3, 33, 3, torch.bfloat16)
    far_hidden, far_weight = (
        torch.empty((3, 2**30 + 64), dtype=torch.bfloat16, device=DEVICE)[:, :33].copy_(x) for x in (hidden, weight)
    )
    check(far_hidden, far_weight, targets, mask, g)


def test_same_result_every_time():
    hidden, weight, targets, _, g = (x if x is None else x.to(DEVICE) for x in case(37, 33, 300))
    first, second = (evaluate(call("triton", targets), hidden, weight, g) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_errors(monkeypatch):
    hidden, weight, targets, _, _ = (x if x is None else x.to(DEVICE) for x in case(4, 8, 9))
    with pytest.raises(RuntimeError, match=r"hidden is \[4, 8\] but weight is \[9, 7\]"):
        call("triton", targets)(hidden, weight[:, :7])
    with pytest.raises(RuntimeError, match="hidden and weight must have one dtype"):
        call("triton", targets)(hidden, weight.bfloat16())
    with pytest.raises(RuntimeError, match=r"mask must be bool of shape \[4\]"):
        call("triton", targets, torch.ones(4, device=DEVICE))(hidden, weight)
    with pytest.raises(ValueError, match="hidden is float64 on"):
        call("triton", targets)(hidden.double(), weight)
    monkeypatch.setattr(tiles, "INTERPRETED", False)
    with pytest.raises(ValueError, match="hidden is float32 on cpu, impl triton takes"):
        call("triton", targets.cpu())(hidden.cpu(), weight.cpu())


def test_targets_out_of_range():
    hidden, weight, _, _, _ = (x if x is None else x.to(DEVICE) for x in case(4, 8, 9))
    logprobs, entropy = call("triton", torch.tensor([1, -100, 9, 3], device=DEVICE))(hidden, weight)
    assert logprobs.isnan().tolist() == [False, True, True, False] and entropy.isfinite().all()


def test_auto_on_cuda():
    # Fake tensors say which operators would run, on a machine without CUDA too.
    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, arguments=(), options=None):
            ran.append(str(operator))
            return operator(*arguments, **(options or {}))

    ran = []
    with FakeTensorMode(), Record(), torch.no_grad():
        hidden, weight = (torch.empty(n, 8, dtype=torch.bfloat16, device="cuda") for n in (4, 9))
        logprobs, _ = ops.linear_logprobs(hidden, weight, torch.empty(4, dtype=torch.int64, device="cuda"))
    assert logprobs.is_cuda and logprobs.shape == (4,)
    assert "aligner.linear_logprobs_triton.default" in ran


def test_opcheck_and_compile():
    hidden, weight, targets, mask, g = (x.to(DEVICE) for x in case(14, 20, 35, kept=0.6))
    hidden.requires_grad_(), weight.requires_grad_()
    arguments = (hidden.detach().nan_to_num().requires_grad_(), weight, targets, mask, 0.7, 0, 35)
    torch.library.opcheck(torch.ops.aligner.linear_logprobs_triton.default, arguments)

    def loss(hidden, weight):
        logprobs, entropy = call("triton", targets, mask, 0.7)(hidden * 2, weight)
        return (logprobs * g[0]).sum() + (entropy * g[1]).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(f(hidden, weight), (hidden, weight)) for f in (compiled, loss))
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(got, want, strict=True))
