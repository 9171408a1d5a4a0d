"""Statistics of a step against numbers by hand."""

import pytest
import torch

from aligner.data.batch import pack_rollout
from aligner.losses.statistics import explained_variance, rollout_statistics, update_statistics


def test_rollout_statistics_by_hand():
    rollout = pack_rollout([[5, 6], [7]], [[8, 9, 9], [8]], [[-1.0] * 3, [-2.0]], [True, False], 3)
    log_ratio_N = torch.tensor([0.0, 0.0, 0.5, -0.25, 0.25, 0.0, 1.5])
    stats = rollout_statistics(rollout, torch.tensor([1.0, 4.0]), log_ratio_N, prefix="eval/")
    assert stats == {
        "eval/reward/mean": 2.5,
        "eval/reward/std": 1.5,
        "eval/kl/mean": 1.0,  # (0.5 + 1.5) / 2 responses
        "eval/response_length/mean": 2.0,
        "eval/prompt_length/mean": 1.5,
        "eval/finished/mean": 0.5,
    }


def test_explained_variance():
    returns = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert explained_variance(returns, returns) == 1
    assert explained_variance(torch.full((4,), 9.0), returns) == 0
    assert explained_variance(-returns, returns) == pytest.approx(-3)
    assert explained_variance(returns, torch.ones(4)) == 0


def test_skipped_updates_are_counted_and_not_averaged():
    names = ("policy_loss", "grad_norm", "clip_fraction", "approx_kl", "ratio", "ratio_clamped", "padding")
    applied, skipped = dict.fromkeys(names, 2.0) | {"skipped": 0.0}, dict.fromkeys(names, torch.nan) | {"skipped": 1.0}
    value = [dict.fromkeys(("value_loss", "grad_norm", "value_clip_fraction"), 3.0) | {"skipped": 0.0}]
    found = update_statistics([applied, skipped], value)
    assert found["loss/policy"] == found["padding/policy"] == 2 and found["loss/value"] == 3
    assert found["skipped/policy"] == 0.5 and found["skipped/value"] == 0
    assert "loss/policy" not in update_statistics([skipped], value)
