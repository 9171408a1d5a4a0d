"""Shaping of rewards by hand."""

import pytest
import torch

from aligner.losses.shaping import informative_groups, shape_rewards

REWARDS = torch.tensor([1.0, 5.0, -9.0, 2.0])
FINISHED = torch.tensor([True, False, True, False])
LENGTHS = torch.tensor([10, 16, 18, 25])


def test_nothing_is_done_unless_asked():
    assert torch.equal(shape_rewards(REWARDS, FINISHED, LENGTHS), REWARDS)


def test_each_step_by_hand():
    def shape(**settings):
        return shape_rewards(REWARDS, FINISHED, LENGTHS, **settings).tolist()

    assert shape(mean=1.0, std=2.0) == [0, 2, -5, 0.5]
    assert shape(clip=3.0) == [1, 3, -3, 2]
    assert shape(missing_eos_penalty=0.5) == [1, 4.5, -9, 1.5]
    # No cost up to 16 tokens, all of it from 20.
    assert shape(overlong=(16.0, 20.0, 1.0)) == [1, 5, -9.5, 1]
    assert shape(overlong=(16.0, 20.0, 0.5)) == [1, 5, -9.25, 1.5]


def test_order_is_standardise_clip_penalties():
    found = shape_rewards(
        REWARDS, FINISHED, LENGTHS, mean=1.0, std=2.0, clip=1.0, missing_eos_penalty=2.0, overlong=(16.0, 20.0, 1.0)
    )
    assert found.tolist() == [0, 1 - 2, -1 - 0.5, 0.5 - 2 - 1]  # penalties are not clipped


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"std": 0.0}, "std is 0"), ({"clip": 0.0}, "clip is 0"), ({"overlong": (20.0, 20.0, 1.0)}, "starts at 20.0")],
)
def test_mistakes_are_told(settings, message):
    with pytest.raises(ValueError, match=message):
        shape_rewards(REWARDS, FINISHED, LENGTHS, **settings)


def test_groups_whose_rewards_are_all_equal_teach_nothing():
    rewards_B = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 7.0, -2.0, -2.0])
    groups_B = torch.tensor([5, 5, 3, 3, 9, 9, 4, 11, 11])
    assert informative_groups(rewards_B, groups_B).tolist() == [False] * 4 + [True] * 2 + [False] * 3
    apart = informative_groups(torch.tensor([1.0, 2.0, 1.0, 3.0]), torch.tensor([0, 1, 0, 1]))
    assert apart.tolist() == [False, True, False, True]
    assert informative_groups(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).tolist() == []
