"""Metrics of a reward model by hand."""

import math

import pytest
import torch

from aligner.losses.ranking import calibration, spearman


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_calibration_by_hand():
    # Bins of width 1/20 from 1/2: 0.62 right and 0.64 wrong, alone 0.67 right, three times 0.91 wrong.
    d = torch.tensor([logit(0.62), -logit(0.64), logit(0.67), -logit(0.91), -logit(0.91), -logit(0.91)])
    rejected = torch.arange(6.0)
    expected = (2 * (0.63 - 0.5) + (1 - 0.67) + 3 * 0.91) / 6
    assert calibration(rejected + d, rejected) == pytest.approx(expected, rel=1e-4)


def test_a_calibrated_model_has_no_error():
    scores = torch.tensor([logit(0.75 + 1e-4)] * 3 + [-logit(0.75 + 1e-4)])  # right three times in four
    assert calibration(scores, torch.zeros(4)) == pytest.approx(0, abs=1e-3)
    assert calibration(torch.zeros(4), torch.zeros(4)) == 0  # knows nothing and says so
    assert calibration(torch.full((4,), 99.0), torch.zeros(4)) == pytest.approx(0)
    assert calibration(torch.full((4,), -99.0), torch.zeros(4)) == pytest.approx(1)


def test_spearman_by_hand():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert spearman(x, x.exp()) == pytest.approx(1)
    assert spearman(x, -x) == pytest.approx(-1)
    assert spearman(x, torch.tensor([1, 3, 2, 4])) == pytest.approx(1 - 6 * 2 / (4 * 15))
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4.
    assert spearman(torch.tensor([1.0, 2, 2, 9]), x) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert math.isnan(spearman(torch.ones(4), x))
