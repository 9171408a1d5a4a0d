"""Advantages of the responses to one prompt over each other."""

# Shape suffixes: B sequences.

import torch
import torch.distributed as dist
from torch import Tensor

from aligner.ops import library
from aligner.ops.whiten import whiten, whiten_reference

KINDS = ("grpo", "dr_grpo", "rloo", "reinforce_pp")
EPSILON = 1e-6


def group_advantages_reference(
    rewards_B: Tensor, groups_B: Tensor, *, kind: str, group: dist.ProcessGroup | None = None
) -> Tensor:
    """`group_advantages` in plain PyTorch: any device, any float dtype."""
    rewards_B = rewards_B.detach()
    _, index_B, counts = torch.unique(groups_B, return_inverse=True, return_counts=True)
    n_B = counts[index_B].to(rewards_B.dtype)
    mean_B = (rewards_B.new_zeros(len(counts)).index_add(0, index_B, rewards_B) / counts)[index_B]
    centred_B = rewards_B - mean_B
    if kind == "dr_grpo":
        return centred_B
    if kind == "reinforce_pp":
        return whiten_reference(centred_B, torch.ones_like(groups_B, dtype=torch.bool), group=group)
    alone_B = n_B == 1
    others_B = (n_B - 1).clamp(min=1)
    if kind == "rloo":
        return torch.where(alone_B, 0, centred_B * n_B / others_B)
    squares_B = rewards_B.new_zeros(len(counts)).index_add(0, index_B, centred_B.square())[index_B]
    return torch.where(alone_B, 0, centred_B / ((squares_B / others_B).sqrt() + EPSILON))


def group_advantages(
    rewards_B: Tensor,
    groups_B: Tensor,
    *,
    kind: str,
    group: dist.ProcessGroup | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""Advantage of each response over the others to the same prompt.

        dr_grpo: A = r - mean_g            grpo: A = (r - mean_g) / (std_g + 1e-6)
        rloo: A = r - mean of the others   reinforce_pp: A = whiten(r - mean_g) over all responses of all ranks

    where std is that of a sample (n - 1); a response that is alone in its group gets 0.

    Source: grpo: Shao et al. 2024, arXiv:2402.03300, section 4.1.2; dr_grpo: Liu et al. 2025, arXiv:2503.20783, section
    3.2; rloo: Ahmadian et al. 2024, arXiv:2402.14740, eq. 7; reinforce_pp: Hu et al. 2025, arXiv:2501.03262.

    rewards_B: (B,) float32, reward units.
    groups_B: (B,) int64, which prompt a response belongs to; equal ones are adjacent.
    kind: "grpo" | "dr_grpo" | "rloo" | "reinforce_pp".
    group: ranks over which reinforce_pp whitens, or None for this process alone. A group of responses is on one rank.
    impl: "auto" | "reference" | "cpp" | "cuda".

    Returns advantages_B, (B,) float32: reward units, or dimensionless for grpo and reinforce_pp. No gradient flows
    through it. Raises ValueError for kind and impl, RuntimeError for shapes and groups that are not adjacent.
    """
    if kind not in KINDS:
        raise ValueError(f"group_advantages: kind is {kind!r}, expected {', '.join(KINDS)}.")
    if not library.use_compiled("group_advantages", impl, {"rewards": rewards_B}):
        return group_advantages_reference(rewards_B, groups_B, kind=kind, group=group)
    if kind != "reinforce_pp":
        return torch.ops.aligner.group_advantages(rewards_B.detach(), groups_B, kind)
    centred_B = torch.ops.aligner.group_advantages(rewards_B.detach(), groups_B, "dr_grpo")
    return whiten(centred_B, torch.ones_like(groups_B, dtype=torch.bool), group=group, impl=impl)


if library.LOADED:

    @torch.library.register_fake("aligner::group_advantages")
    def _(rewards, groups, kind):
        return rewards.new_empty(rewards.shape)
