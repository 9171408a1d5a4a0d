"""Losses on pairs against loops over Python floats, and their identities."""

import math

import pytest
import torch

from aligner.losses.preference import bradley_terry_loss, direct_preference_loss
from tests.losses.batches import assert_adds_up, gradients, packed, responses, to

KINDS = ("dpo", "cdpo", "rdpo", "ipo", "rpo_sq", "rpo_fwd_kl", "rpo_bwd_kl", "simpo", "orpo")
SETTINGS = {"beta": 0.3, "label_smoothing": 0.1, "margin": 0.4, "reward_scale": 0.7}
PARTS = [[0, 1], [2, 3, 4, 5]]


def example(**changes):
    """(logprobs_N,) and a batch of three pairs, in float64."""
    g = torch.Generator().manual_seed(0)
    batch = packed()
    logprobs_N = -0.1 - torch.rand(len(batch.action_mask_N), generator=g, dtype=torch.float64)
    batch.reference_logprobs_B = torch.tensor([-2.0, -1.5, -3.0, -1.0, -2.5, -0.7], dtype=torch.float64)
    batch.rewards_B = torch.tensor([1.0, 0.2, -0.5, -0.1, 2.0, -1.0], dtype=torch.float64)
    vars(batch).update(changes)
    return [logprobs_N * batch.action_mask_N], batch


def log_s(x: float) -> float:
    return -math.log(1 + math.exp(-x))


def bernoulli_kl(a: float, b: float) -> float:
    p, q = 1 / (1 + math.exp(-a)), 1 / (1 + math.exp(-b))
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def by_hand(kind: str, logprobs_N, batch, average: bool, sft_average: bool, sft_coef: float) -> dict[str, float]:
    beta, e, margin, scale = SETTINGS.values()
    sums = dict.fromkeys(("loss", "sft_loss", "preference_loss", "accuracy", "reward_chosen", "reward_margin"), 0.0)
    spans = responses(batch)
    for chosen, rejected in zip(range(0, len(spans), 2), range(1, len(spans), 2), strict=True):
        (pc, rc), (pr, rr) = [
            (sum(float(logprobs_N[t]) for t in spans[b]) / n, float(batch.reference_logprobs_B[b]) / n)
            for b in (chosen, rejected)
            for n in [len(spans[b]) if average or kind in ("simpo", "orpo") else 1]
        ]
        if kind in ("simpo", "orpo"):
            rc = rr = 0.0
        delta = (pc - rc) - (pr - rr)
        x, y = beta * delta, scale * float(batch.rewards_B[chosen] - batch.rewards_B[rejected])
        odds = [p - math.log(1 - math.exp(p)) if p < 0 else 0.0 for p in (pc, pr)]
        loss = {
            "dpo": lambda x=x: -log_s(x),
            "cdpo": lambda x=x: -(1 - e) * log_s(x) - e * log_s(-x),
            "rdpo": lambda x=x: (-(1 - e) * log_s(x) + e * log_s(-x)) / (1 - 2 * e),
            "ipo": lambda d=delta: (d - 1 / (2 * beta)) ** 2,
            "rpo_sq": lambda x=x, y=y: (x - y) ** 2,
            "rpo_fwd_kl": lambda x=x, y=y: bernoulli_kl(x, y),
            "rpo_bwd_kl": lambda x=x, y=y: bernoulli_kl(y, x),
            "simpo": lambda x=x: -log_s(x - margin),
            "orpo": lambda odds=odds: -beta * log_s(odds[0] - odds[1]),
        }[kind]()
        sft = -sum(float(logprobs_N[t]) for t in spans[chosen]) / (len(spans[chosen]) if sft_average else 1)
        sums["loss"] += loss + sft_coef * sft
        sums["preference_loss"] += loss
        sums["sft_loss"] += sft
        sums["accuracy"] += delta > 0
        sums["reward_chosen"] += beta * (pc - rc)
        sums["reward_margin"] += x
    return {name: total / (len(spans) / 2) for name, total in sums.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("sft_average", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_statistics_by_hand(kind, sft_average, average, dtype):
    (logprobs_N,), batch = example()
    expected = by_hand(kind, logprobs_N, batch, average, sft_average, 0.2)
    settings = SETTINGS | {"kind": kind, "average": average, "sft_coef": 0.2, "sft_average": sft_average}
    loss, stats = direct_preference_loss(logprobs_N.to(dtype), to(batch, dtype), 3.0, **settings)
    exact = 1e-12 if dtype == torch.float64 else 1e-5
    for name, value in expected.items():
        assert float(stats.get(name, loss)) == pytest.approx(value, rel=exact, abs=exact), name


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_and_micro_batches_add_up(kind, average):
    tensors, batch = example()

    def loss(logprobs_N, batch):
        settings = SETTINGS | {"kind": kind, "average": average, "sft_coef": 0.2}
        return direct_preference_loss(logprobs_N, batch, 3.0, **settings)

    inside = batch.action_mask_N.nonzero()[:, 0]
    leaf = tensors[0][inside].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(tensors[0].index_put((inside,), x), batch)[0], leaf)
    assert_adds_up(loss, [tensors[0].float()], to(batch, torch.float32), PARTS)


@pytest.mark.parametrize("average", [False, True])
def test_dpo_of_equal_log_probabilities_is_log_2(average):
    (logprobs_N,), batch = example()
    batch.reference_logprobs_B = torch.tensor([float(logprobs_N[tokens].sum()) for tokens in responses(batch)]).double()
    loss, stats = direct_preference_loss(logprobs_N, batch, 3.0, kind="dpo", beta=0.1, average=average)
    assert float(loss) == pytest.approx(math.log(2), rel=1e-6)
    assert float(stats["reward_margin"]) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("average", [False, True])
def test_ipo_at_its_optimum_is_0_and_does_not_move(average):
    beta = 0.25
    (logprobs_N,), batch = example()
    target = [float(logprobs_N[tokens].sum()) for tokens in responses(batch)]
    counts = [len(tokens) if average else 1 for tokens in responses(batch)]
    target = [s - (c / (2 * beta) if b % 2 == 0 else 0) for b, (s, c) in enumerate(zip(target, counts, strict=True))]
    batch.reference_logprobs_B = torch.tensor(target, dtype=torch.float64)

    def ipo(lp, batch):
        return direct_preference_loss(lp, batch, 3.0, kind="ipo", beta=beta, average=average)

    loss, _, (found,) = gradients(ipo, [logprobs_N], batch)
    assert loss == pytest.approx(0, abs=1e-12) and torch.allclose(found, torch.zeros_like(found), atol=1e-12)


def test_averages_do_not_depend_on_the_length_but_sums_do():
    (logprobs_N,), batch = example()
    uniform_N = -0.5 * batch.action_mask_N.double()
    batch.reference_logprobs_B = torch.tensor([-0.5 * len(tokens) - 1 for tokens in responses(batch)]).double()
    _, mean = direct_preference_loss(uniform_N, batch, 3.0, kind="dpo", beta=1.0, average=True)
    _, total = direct_preference_loss(uniform_N, batch, 3.0, kind="dpo", beta=1.0)
    counts = [len(tokens) for tokens in responses(batch)]
    assert float(total["reward_chosen"]) == pytest.approx(1)
    assert float(mean["reward_chosen"]) == pytest.approx(sum(1 / n for n in counts[0::2]) / 3)


@pytest.mark.parametrize("kind", ["simpo", "orpo"])
def test_a_reference_is_not_needed_and_not_read(kind):
    (logprobs_N,), batch = example()
    with_one, _ = direct_preference_loss(logprobs_N, batch, 3.0, kind=kind, beta=0.3)
    batch.reference_logprobs_B = None
    with_none, _ = direct_preference_loss(logprobs_N, batch, 3.0, kind=kind, beta=0.3)
    del batch.reference_logprobs_B
    absent, _ = direct_preference_loss(logprobs_N, batch, 3.0, kind=kind, beta=0.3)
    assert with_one == with_none == absent
    with pytest.raises(ValueError, match="needs ref_chosen_B"):
        direct_preference_loss(logprobs_N, batch, 3.0, kind="dpo", beta=0.3)
    del batch.rewards_B
    with pytest.raises(ValueError, match="needs reward_chosen_B|needs ref"):
        direct_preference_loss(logprobs_N, batch, 3.0, kind="rpo_sq", beta=0.3)


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_outside_of_the_responses_is_ignored(kind):
    (logprobs_N,), batch = example()
    dirty_N = torch.where(batch.action_mask_N, logprobs_N, torch.nan)

    def loss(lp, batch):
        return direct_preference_loss(lp, batch, 3.0, **SETTINGS, kind=kind, sft_coef=0.1)

    for dtype in (torch.float64, torch.float32):
        clean = gradients(loss, [logprobs_N.to(dtype)], to(batch, dtype))
        dirty = gradients(loss, [dirty_N.to(dtype)], to(batch, dtype))
        assert clean[0] == dirty[0] and torch.equal(clean[2][0], dirty[2][0])


def scored(**changes):
    """Scores at the last tokens of three pairs, in float64."""
    batch = packed(margins_B=torch.tensor([1.0, 1.0, 0.5, 0.5, 3.0, 3.0], dtype=torch.float64))
    vars(batch).update(changes)
    last = batch.cu_seqlens[1:].long() - 1
    scores_N = torch.zeros(len(batch.action_mask_N), dtype=torch.float64)
    scores_N[last] = torch.tensor([1.0, 0.2, -0.5, -0.1, 2.0, -1.0], dtype=torch.float64)
    return [scores_N], batch


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("centre", [0.0, 0.01])
@pytest.mark.parametrize("kind", ["bt", "margin", "scaled"])
def test_bradley_terry_by_hand(kind, centre, dtype):
    pairs, margins = [(1.0, 0.2), (-0.5, -0.1), (2.0, -1.0)], [1.0, 0.5, 3.0]
    each = [
        {"bt": -log_s(c - r), "margin": -log_s(c - r - m), "scaled": -m * log_s(c - r)}[kind]
        for (c, r), m in zip(pairs, margins, strict=True)
    ]
    (scores_N,), batch = scored()
    loss, stats = bradley_terry_loss(scores_N.to(dtype), to(batch, dtype), 3.0, kind=kind, centre=centre)
    expected = {
        "reward_model_loss": sum(each) / 3,
        "accuracy": 2 / 3,
        "reward_chosen": 2.5 / 3,
        "reward_rejected": -0.9 / 3,
        "margin": 3.4 / 3,
    }
    assert stats.keys() == expected.keys()
    for name, value in expected.items():
        assert float(stats[name]) == pytest.approx(value, rel=1e-6), name
    centred = centre * (1.2**2 + 0.6**2 + 1.0**2) / 3
    assert float(loss) == pytest.approx(sum(each) / 3 + centred, rel=1e-6)


@pytest.mark.parametrize("kind", ["bt", "margin", "scaled"])
def test_bradley_terry_gradcheck_and_micro_batches_add_up(kind):
    tensors, batch = scored()

    def loss(scores_N, batch):
        return bradley_terry_loss(scores_N, batch, 3.0, kind=kind, centre=0.1)

    assert torch.autograd.gradcheck(lambda x: loss(x, batch)[0], tensors[0].clone().requires_grad_())
    assert_adds_up(loss, [tensors[0].float()], to(batch, torch.float32), PARTS)


@pytest.mark.parametrize(("kind", "margin"), [("scaled", 1.0), ("margin", 0.0)])
def test_a_neutral_margin_gives_plain_bradley_terry(kind, margin):
    tensors, batch = scored(margins_B=torch.full((6,), margin, dtype=torch.float64))
    plain = gradients(lambda x, b: bradley_terry_loss(x, b, 3.0), tensors, batch)
    other = gradients(lambda x, b: bradley_terry_loss(x, b, 3.0, kind=kind), tensors, batch)
    assert plain[0] == other[0] and torch.equal(plain[2][0], other[2][0])


def test_bradley_terry_is_dpo_with_beta_1_and_references_of_0():
    tensors, batch = scored(reference_logprobs_B=torch.zeros(6, dtype=torch.float64))
    one, _ = bradley_terry_loss(tensors[0], batch, 3.0)
    other, _ = direct_preference_loss(tensors[0], batch, 3.0, kind="dpo", beta=1.0)
    assert torch.isclose(one, other)


def test_centring_draws_the_sum_of_a_pair_to_0_and_leaves_its_difference():
    tensors, batch = scored()
    _, _, (plain,) = gradients(lambda x, b: bradley_terry_loss(x, b, 3.0), tensors, batch)
    _, _, (centred,) = gradients(lambda x, b: bradley_terry_loss(x, b, 3.0, centre=0.1), tensors, batch)
    last = batch.cu_seqlens[1:].long() - 1
    push = (centred - plain)[last].view(3, 2)
    expected = 0.2 * tensors[0][last].view(3, 2).sum(1, keepdim=True) / 3
    assert torch.allclose(push, expected.expand(3, 2))


def test_a_kind_of_reward_model_loss_is_never_replaced_in_silence():
    """NeMo-Aligner reads the option from another place than it documents, and trains by regression instead."""
    tensors, batch = scored()
    with pytest.raises(ValueError, match="bt, margin or scaled"):
        bradley_terry_loss(*tensors, batch, 3.0, kind="scaled_bt")
    del batch.margins_B
    for kind in ("margin", "scaled"):
        with pytest.raises(ValueError, match="needs margins_B"):
            bradley_terry_loss(*tensors, batch, 3.0, kind=kind)
    with pytest.raises(ValueError, match="num_pairs 0"):
        bradley_terry_loss(*tensors, batch, 0)
