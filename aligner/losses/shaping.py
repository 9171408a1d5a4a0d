"""What becomes of a reward before advantages are estimated; pure functions of rewards."""

import torch
from torch import Tensor


def shape_rewards(
    rewards_B: Tensor,
    finished_B: Tensor,
    lengths_B: Tensor,
    *,
    mean: float = 0.0,
    std: float = 1.0,
    clip: float | None = None,
    missing_eos_penalty: float = 0.0,
    overlong: tuple[float, float, float] | None = None,
) -> Tensor:
    r"""Rewards standardised and clipped, less what unfinished and overlong responses cost.

        R = clip((r - mean) / std, -clip, clip) - missing_eos_penalty [not finished]
            - penalty clip((length - start) / (limit - start), 0, 1)

    Source: the end-of-text penalty: Huang et al. 2024, arXiv:2403.17031 (EOS trick); soft overlong
    punishment: Yu et al. 2025, arXiv:2503.14476, eq. 13, whose L_max is limit and L_cache is limit - start.

    rewards_B: (B,) float32, reward units.
    finished_B: (B,) bool. The response ended by itself and not by the length limit.
    lengths_B: (B,) integer or float, tokens of the response.
    mean, std: reward units, std > 0. Of the rewards of reference responses.
    clip: standard deviations, > 0, or None for none.
    missing_eos_penalty: dimensionless after standardisation.
    overlong: (start, limit, penalty), or None for none: 0 up to start tokens, then growing linearly to penalty at limit
        tokens, start < limit, and staying there.
    Returns (B,) float32. Raises ValueError for an argument out of range.
    """
    if not std > 0:
        raise ValueError(f"shape_rewards: std is {std}, expected more than 0.")
    if clip is not None and not clip > 0:
        raise ValueError(f"shape_rewards: clip is {clip}, expected more than 0, or None to switch it off.")
    shaped_B = (rewards_B - mean) / std
    if clip is not None:
        shaped_B = shaped_B.clamp(-clip, clip)
    if missing_eos_penalty:
        shaped_B = shaped_B - missing_eos_penalty * (~finished_B).to(shaped_B.dtype)
    if overlong is not None:
        start, limit, penalty = overlong
        if not start < limit:
            raise ValueError(
                f"shape_rewards: overlong starts at {start} tokens, expected less than its limit, {limit}."
            )
        shaped_B = shaped_B - penalty * ((lengths_B.to(shaped_B.dtype) - start) / (limit - start)).clamp(0, 1)
    return shaped_B


def informative_groups(rewards_B: Tensor, groups_B: Tensor) -> Tensor:
    r"""Responses of the groups that have something to teach: those whose rewards are not all equal.

        keep_b = [max_g r > min_g r],    g the group of b

    Source: Yu et al. 2025, arXiv:2503.14476, section 3.2 (dynamic sampling): elsewhere every advantage is 0.

    rewards_B: (B,) float32, reward units. groups_B: (B,) int64, which prompt a response belongs to.
    Returns keep_B, (B,) bool.
    """
    _, index_B = torch.unique(groups_B, return_inverse=True)
    empty = rewards_B.new_zeros(len(rewards_B))
    high = empty.scatter_reduce(0, index_B, rewards_B, "amax", include_self=False)
    low = empty.scatter_reduce(0, index_B, rewards_B, "amin", include_self=False)
    return (high > low)[index_B]
