"""KTO by hand."""

import math

import pytest
import torch

from aligner.losses.kto import kl_baseline, kto_loss
from tests.losses.batches import assert_adds_up, gradients, packed, responses, to

SETTINGS = {"beta": 0.4, "kl": torch.tensor(0.3), "desirable_weight": 1.5, "undesirable_weight": 0.7}


def example():
    g = torch.Generator().manual_seed(0)
    batch = packed(
        reference_logprobs_B=torch.tensor([-2.0, -1.5, -3.0, -1.0, -2.5, -0.7], dtype=torch.float64),
        desirable_B=torch.tensor([True, False, False, True, True, False]),
    )
    return [-torch.rand(len(batch.action_mask_N), generator=g, dtype=torch.float64) * batch.action_mask_N], batch


def kto(logprobs_N, batch, **changes):
    settings = SETTINGS | changes
    return kto_loss(logprobs_N, batch, 6.0, **settings | {"kl": settings["kl"].to(logprobs_N.dtype)})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_by_hand(dtype):
    (logprobs_N,), batch = example()
    total, good, bad = 0.0, 0.0, 0.0
    for tokens, reference, desirable in zip(
        responses(batch), batch.reference_logprobs_B.tolist(), batch.desirable_B.tolist(), strict=True
    ):
        h = sum(float(logprobs_N[t]) for t in tokens) - reference
        sign, weight = (1, 1.5) if desirable else (-1, 0.7)
        total += weight * (1 - 1 / (1 + math.exp(-0.4 * sign * (h - float(SETTINGS["kl"])))))
        good, bad = (good + 0.4 * h, bad) if desirable else (good, bad + 0.4 * h)
    loss, stats = kto(logprobs_N.to(dtype), to(batch, dtype))
    expected = {"kto_loss": total / 6, "desirable": 0.5, "reward_desirable": good / 6, "reward_undesirable": bad / 6}
    assert float(loss) == pytest.approx(total / 6, rel=1e-6) and stats.keys() == expected.keys()
    for name, value in expected.items():
        assert float(stats[name]) == pytest.approx(value, rel=1e-5), name


def test_gradcheck():
    (logprobs_N,), batch = example()
    assert torch.autograd.gradcheck(lambda x: kto(x, batch)[0], logprobs_N.clone().requires_grad_())


@pytest.mark.parametrize("parts", [[[0, 3, 4], [1, 2, 5]], [[0, 1], [2, 3], [4, 5]]])
def test_statistics_add_up_whatever_preferences_each_rank_holds(parts):
    """NeMo-Aligner splits every rank's rewards by its own preferences; the first parts hold one kind each."""
    (logprobs_N,), batch = example()
    assert_adds_up(kto, [logprobs_N.float()], to(batch, torch.float32), parts)


def test_symmetric_data_give_equal_losses():
    """A desirable response at h and an undesirable one at -h, measured from 0."""
    settings = {"beta": 0.4, "kl": torch.tensor(0.0), "desirable_weight": 1.0, "undesirable_weight": 1.0}

    def one(h: float, desirable: bool):
        batch = packed([(1, 1)], reference_logprobs_B=torch.zeros(1), desirable_B=torch.tensor([desirable]))
        return gradients(lambda x, b: kto_loss(x, b, 1.0, **settings), [torch.tensor([0.0, h])], batch)

    good, bad = one(0.8, True), one(-0.8, False)
    assert torch.isclose(good[0], bad[0]) and torch.isclose(good[2][0][1], -bad[2][0][1])
    assert good[2][0][1] < 0  # the desirable one becomes more likely


def test_baseline_by_hand():
    logprobs_B = torch.tensor([-1.0, -2.0, -4.0], requires_grad=True)
    found = kl_baseline(logprobs_B, torch.tensor([-2.0, -2.5, -4.2]))
    assert found.shape == () and not found.requires_grad
    assert float(found) == pytest.approx((1.0 + 0.5 + 0.2) / 3)
    assert kl_baseline(logprobs_B, torch.tensor([0.0, -2.5, -4.2])) == 0  # the mean is negative, not each
