"""Distillation by hand."""

import math

import pytest
import torch

from aligner.losses.distillation import distillation_loss

IDS = torch.tensor([[4, 1], [0, 3], [2, 5]])
TARGETS = torch.tensor([4, 2, 5])


def example():
    g = torch.Generator().manual_seed(0)
    logits_AV, teacher_AV = (torch.randn(3, 6, generator=g, dtype=torch.float64) for _ in range(2))
    return logits_AV, teacher_AV.gather(1, IDS), teacher_AV


def log_sum(x: list[float]) -> float:
    return math.log(sum(map(math.exp, x)))


def by_hand(logits_AV, teacher_AV, kind: str, temperature: float, rest: bool) -> tuple[float, float]:
    """(KD, NLL), summed."""
    divergence, nll = 0.0, 0.0
    rows = zip(logits_AV.tolist(), teacher_AV.tolist(), IDS.tolist(), TARGETS.tolist(), strict=True)
    for student, teacher, ids, target in rows:
        nll += log_sum(student) - student[target]
        z, y = [v / temperature for v in student], [v / temperature for v in teacher]
        over = range(6) if rest else ids
        q, p = ([math.exp(x[i] - log_sum([x[j] for j in over])) for i in ids] for x in (z, y))
        if rest:
            p, q = [*p, 1 - sum(p)], [*q, 1 - sum(q)]
        if kind == "backward_kl":
            p, q = q, p
        divergence += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return divergence, nll


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["forward_kl", "backward_kl"])
def test_values_by_hand(kind, temperature, rest, dtype):
    logits_AV, topk_AK, teacher_AV = example()
    kd, nll = by_hand(logits_AV, teacher_AV, kind, temperature, rest)
    log_sum_A = (teacher_AV / temperature).logsumexp(1).to(dtype) if rest else None
    settings = {"kind": kind, "temperature": temperature, "kd_coef": 0.7, "sft_coef": 0.2}
    tensors = (logits_AV.to(dtype), IDS, topk_AK.to(dtype), log_sum_A, TARGETS, 5.0)
    loss, stats = distillation_loss(*tensors, **settings)
    assert float(stats["distillation_loss"]) == pytest.approx(kd / 5, rel=1e-5)
    assert float(stats["sft_loss"]) == pytest.approx(nll / 5, rel=1e-5)
    assert float(loss) == pytest.approx((0.7 * kd + 0.2 * nll) / 5, rel=1e-5)


@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize("kind", ["forward_kl", "backward_kl"])
def test_gradcheck_and_micro_batches_add_up(kind, rest):
    logits_AV, topk_AK, teacher_AV = example()
    log_sum_A = teacher_AV.logsumexp(1) if rest else None

    def loss(x, rows=slice(None)):
        total = None if log_sum_A is None else log_sum_A[rows].to(x.dtype)
        more = {"kind": kind, "kd_coef": 0.7, "sft_coef": 0.2}
        return distillation_loss(x[rows], IDS[rows], topk_AK[rows].to(x.dtype), total, TARGETS[rows], 3.0, **more)

    assert torch.autograd.gradcheck(lambda x: loss(x)[0], logits_AV.clone().requires_grad_())
    x = logits_AV.float().requires_grad_()
    whole, stats = loss(x)
    parts = [loss(x, slice(0, 1)), loss(x, slice(1, 3)), loss(x, slice(0, 0))]  # the last one has no action token
    assert torch.isclose(sum(part for part, _ in parts), whole)
    assert all(torch.isclose(sum(part[name] for _, part in parts), stats[name]) for name in stats)
    a, b = (torch.autograd.grad(v, x)[0] for v in (whole, sum(part for part, _ in parts)))
    assert torch.allclose(a, b, atol=1e-7)


def test_a_student_that_is_the_teacher_does_not_move():
    _, topk_AK, teacher_AV = example()
    x = teacher_AV.clone().requires_grad_()
    loss, stats = distillation_loss(x, IDS, topk_AK, teacher_AV.logsumexp(1), TARGETS, 3.0, kind="forward_kl")
    assert torch.allclose(loss, torch.zeros(()).double(), atol=1e-12)
    assert torch.allclose(torch.autograd.grad(loss, x)[0], torch.zeros(3, 6).double(), atol=1e-12)
    assert stats["sft_loss"] > 0  # reported without being learnt


def test_supervised_alone_is_cross_entropy():
    logits_AV, topk_AK, _ = example()
    x = logits_AV.clone().requires_grad_()
    loss, _ = distillation_loss(x, IDS, topk_AK, None, TARGETS, 3.0, kind="forward_kl", kd_coef=0.0, sft_coef=1.0)
    expected = torch.nn.functional.cross_entropy(x, TARGETS)
    assert torch.isclose(loss, expected)
    assert torch.allclose(*(torch.autograd.grad(v, x)[0] for v in (loss, expected)))
