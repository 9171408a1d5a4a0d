import pytest
import torch
from three_way import assert_three_way

from aligner import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(0, 5, 2), (1, 1, 1), (3, 7, 7), (5, 16, 3), (17, 1003, 20), (3, 4113, 64)]


def case(n, v, k, dtype=torch.float32, kept=None, sharp=3.0):
    generator = torch.Generator().manual_seed(n * v)
    logits, teacher = (sharp * torch.randn(n, v, generator=generator) for _ in range(2))
    teacher = 0.7 * logits + 0.5 * teacher
    top = teacher.topk(k, dim=1)
    log_sum = teacher.logsumexp(1)
    mask = None
    if kept is not None:
        mask = torch.rand(n, generator=generator) < kept
        logits[~mask], log_sum[~mask], top.values[~mask], top.indices[~mask] = torch.nan, torch.nan, torch.nan, -100
    return logits.to(dtype), top.indices, top.values, log_sum, mask


def textbook(logits, ids, values, log_sum, mask, num_tokens, kind, temperature):
    """Row by row, with torch's KL divergence."""
    total = 0 * logits.sum() if mask is None else 0 * logits[mask].sum()
    for n in range(len(logits)):
        if mask is not None and not mask[n]:
            continue
        z, t = logits[n].double() / temperature, values[n].double() / temperature
        if log_sum is None:
            log_p, log_q = t.log_softmax(0), z[ids[n]].log_softmax(0)
        else:
            log_p, log_q = t - log_sum[n].double(), z.log_softmax(0)[ids[n]]
            log_p, log_q = (torch.cat([x, (1 - x.exp().sum()).clamp(min=1e-8).log()[None]]) for x in (log_p, log_q))
        if kind == "backward_kl":
            log_p, log_q = log_q, log_p
        total = total + torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True)
    return total / num_tokens


def evaluate(function, logits):
    logits = logits.detach().requires_grad_()
    loss = function(logits)
    (gradient,) = torch.autograd.grad(5 * loss, logits)
    return {"loss": loss.detach(), "d_logits": gradient}


def check(logits, ids, values, log_sum, mask, kind, temperature=1.0, epsilon=3e-6):
    tokens = 0.5 * len(logits) + 1

    def call(impl):
        given = dict(kind=kind, teacher_log_sum_N=log_sum, temperature=temperature, impl=impl)
        return lambda x: ops.topk_distillation_loss(x, ids, values, mask, tokens, **given)[0]

    truth = evaluate(lambda x: textbook(x, ids, values, log_sum, mask, tokens, kind, temperature), logits.double())
    truth["d_logits"] = truth["d_logits"].nan_to_num() if mask is not None else truth["d_logits"]
    eager, kernel = evaluate(call("reference"), logits), evaluate(call("cpp"), logits)
    for name in truth:
        assert_three_way(truth[name], eager[name], kernel[name], epsilon=epsilon, what=f"{kind} {name}")


@pytest.mark.parametrize("n,v,k", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["forward_kl", "backward_kl"])
@pytest.mark.parametrize("rest", [False, True])
def test_three_way(isa, n, v, k, dtype, kind, rest):
    logits, ids, values, log_sum, _ = case(n, v, k, dtype)
    # With all of the vocabulary in the top k nothing remains but rounding errors, held at the floor on both sides.
    epsilon = 3e-5 if rest and k == v else 3e-6
    check(logits, ids, values, log_sum if rest else None, None, kind, epsilon=epsilon)


@pytest.mark.parametrize("kind", ["forward_kl", "backward_kl"])
@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize("kept", [0.6, 0.0])
def test_masked_rows(isa, kind, rest, kept):
    logits, ids, values, log_sum, mask = case(13, 300, 9, kept=kept)
    check(logits, ids, values, log_sum if rest else None, mask, kind)


@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_temperature(isa, temperature):
    logits, ids, values, _, _ = case(9, 300, 9)
    log_sum = (1.3 * logits / temperature).logsumexp(1).maximum((values / temperature).logsumexp(1) + 0.1)
    for kind in ("forward_kl", "backward_kl"):
        check(logits, ids, values, log_sum, None, kind, temperature)


def test_extreme_logits(isa):
    # Differences of 2e4: a probability is 0 or 1; eager's own rounding of 1e4 is what the kernel may cost.
    logits, ids, values, _, _ = case(7, 300, 9)
    at = torch.arange(7)[:, None]
    logits[at, ids[:, :3]] += 1e4
    check(logits, ids, values + 1e4, None, None, "forward_kl", epsilon=1e-2)


def test_the_teacher_itself_has_no_loss(isa):
    logits, _, _, _, _ = case(5, 100, 10)
    top = logits.topk(10, dim=1)
    for kind in ("forward_kl", "backward_kl"):
        for log_sum in (None, logits.logsumexp(1)):
            out = evaluate(
                lambda x, s=log_sum, k=kind: ops.topk_distillation_loss(
                    x, top.indices, top.values, None, 5.0, kind=k, teacher_log_sum_N=s, impl="cpp"
                )[0],
                logits,
            )
            assert out["loss"].abs() < 1e-6 and out["d_logits"].abs().max() < 1e-6


def test_strides(isa):
    logits, ids, values, log_sum, _ = case(6, 50, 4)
    padded = torch.full((6, 67), torch.nan)
    padded[:, 3:53] = logits
    for view in (padded[:, 3:53], logits.T.contiguous().T):
        check(view, ids, values, log_sum, None, "forward_kl")


def test_gradcheck():
    logits, ids, values, log_sum, _ = case(3, 12, 4)
    logits = logits.double().requires_grad_()
    for kind in ("forward_kl", "backward_kl"):
        for rest in (None, log_sum.double()):
            assert torch.autograd.gradcheck(
                lambda x, k=kind, s=rest: ops.topk_distillation_loss(
                    x, ids, values.double(), None, 3.0, kind=k, teacher_log_sum_N=s
                )[0],
                (logits,),
            )


def test_errors():
    logits, ids, values, log_sum, _ = case(3, 12, 4)
    ids = ids.clone()
    ids[1, 2] = 12
    with pytest.raises(RuntimeError, match=r"topk_distillation_loss: topk_ids must be in \[0, 12\), got 12 in row 1"):
        ops.topk_distillation_loss(logits, ids, values, None, 3.0)
    with pytest.raises(RuntimeError, match=r"topk_logits must be CPU Float of shape \[3, 4\], got CPU Float of"):
        ops.topk_distillation_loss(logits, ids, values[:, :2], None, 3.0)
    with pytest.raises(RuntimeError, match="topk_ids must have at least one column, got 0"):
        ops.topk_distillation_loss(logits, ids[:, :0], values[:, :0], None, 3.0)
    with pytest.raises(ValueError, match="kind is 'js', expected forward_kl or backward_kl"):
        ops.topk_distillation_loss(logits, ids, values, None, 3.0, kind="js")
    with pytest.raises(ValueError, match="temperature is 0"):
        ops.topk_distillation_loss(logits, ids, values, None, 3.0, temperature=0)
    with pytest.raises(ValueError, match="num_tokens is 0"):
        ops.topk_distillation_loss(logits, ids, values, None, 0)


def test_opcheck_and_compile():
    logits, ids, values, log_sum, mask = case(5, 30, 4, kept=0.6)
    logits, values, log_sum = (t.nan_to_num() for t in (logits, values, log_sum))
    logits.requires_grad_()
    operator = torch.ops.aligner.topk_distillation_loss.default
    torch.library.opcheck(operator, (logits, ids, values, log_sum, mask, 0.7, True))
    call = lambda x: ops.topk_distillation_loss(x * 2, ids, values, mask, 5.0)[0]  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(torch.autograd.grad(compiled(logits), logits)[0], torch.autograd.grad(call(logits), logits)[0])
