"""KL estimators and the adaptive coefficient against closed forms."""

import pytest
import torch

from aligner.losses.kl import adapted_kl_coef, kl_estimate


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_k1_and_k3_average_to_the_divergence(kind: str):
    g = torch.Generator().manual_seed(0)
    p, q = (torch.randn(9, generator=g, dtype=torch.float64).log_softmax(0) for _ in range(2))
    divergence = (p.exp() * (p - q)).sum()
    assert torch.isclose((p.exp() * kl_estimate(p, q, kind)).sum(), divergence)  # the expectation, exactly


def test_k2_and_abs_are_biased_and_never_negative():
    p, q = torch.tensor([-1.0, -3.0]), torch.tensor([-2.0, -1.5])
    assert torch.allclose(kl_estimate(p, q, "abs"), torch.tensor([1.0, 1.5]))
    assert torch.allclose(kl_estimate(p, q, "k2"), torch.tensor([0.5, 1.125]))
    e = torch.e
    assert torch.allclose(kl_estimate(p, q, "k3"), torch.tensor([1 / e - 1 + 1, e**1.5 - 1 - 1.5]))
    with pytest.raises(ValueError, match="k1, abs, k2 or k3"):
        kl_estimate(p, q, "k4")


def test_adaptive_coefficient_by_hand():
    settings = {"target": 6.0, "horizon": 1000.0, "sequences": 100.0}
    assert adapted_kl_coef(0.1, 6.0, **settings) == pytest.approx(0.1)
    assert adapted_kl_coef(0.1, 6.6, **settings) == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    assert adapted_kl_coef(0.1, 60.0, **settings) == pytest.approx(0.1 * (1 + 0.2 * 0.1))  # clipped
    assert adapted_kl_coef(0.1, -3.0, **settings) == pytest.approx(0.1 * (1 - 0.2 * 0.1))
    assert isinstance(adapted_kl_coef(0.1, 6.6, **settings), float)
    with pytest.raises(ValueError, match="target is 0"):
        adapted_kl_coef(0.1, 6.0, **settings | {"target": 0})
