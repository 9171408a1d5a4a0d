"""Generalized advantage estimation (GAE) over packed sequences."""

# Shape suffixes: N packed tokens, B sequences.

import torch
from torch import Tensor

from aligner.ops import library


def gae_reference(
    rewards_N: Tensor, values_N: Tensor, action_mask_N: Tensor, cu_seqlens: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """`gae` in plain PyTorch, one token at a time: any device, any float dtype."""
    rewards_N, values_N = rewards_N.detach(), values_N.detach()
    advantages_N, returns_N = torch.zeros_like(rewards_N), torch.zeros_like(rewards_N)
    bounds, action = cu_seqlens.tolist(), action_mask_N.tolist()
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        advantage, next_value = rewards_N.new_zeros(()), rewards_N.new_zeros(())
        for t in reversed(range(start, end)):
            if not action[t]:
                continue
            delta = rewards_N[t] + gamma * next_value - values_N[t]
            advantage = delta + gamma * lam * advantage
            next_value = values_N[t]
            advantages_N[t], returns_N[t] = advantage, advantage + next_value
    return advantages_N, returns_N


def gae(
    rewards_N: Tensor,
    values_N: Tensor,
    action_mask_N: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float,
    lam: float,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    r"""Advantage and return of each action token.

        A_t = sum_l (gamma * lam)^l * delta_{t+l},    delta_t = r_t + gamma * V_{t+1} - V_t,    V_{end} = 0

    where t + 1 is the next action token of the sequence: tokens that are not actions are skipped.

    Source: Schulman et al. 2015, arXiv:1506.02438, eq. 16.

    rewards_N: (N,) float32, reward units. Reward credited to each token.
    values_N: (N,) float32, reward units. Critic's estimate before token t.
    action_mask_N: (N,) bool. Token t is an action; other entries of rewards and values may hold anything.
    cu_seqlens: (B + 1,) int32, tokens. Prefix sum of sequence lengths; cu_seqlens[B] == N.
    gamma: dimensionless, in [0, 1]. Discount per action token.
    lam: dimensionless, in [0, 1]. Trace decay per action token.
    impl: "auto" | "reference" | "cpp" | "cuda".

    Returns advantages_N and returns_N = advantages_N + values_N, (N,) float32, reward units, 0 where not an action; no
    gradient flows through either. Raises ValueError for gamma, lam or impl out of range, RuntimeError for shapes.
    """
    if not (0 <= gamma <= 1 and 0 <= lam <= 1):
        raise ValueError(f"gae: gamma is {gamma} and lam is {lam}, expected both in [0, 1].")
    if library.use_compiled("gae", impl, {"rewards": rewards_N, "values": values_N}):
        return torch.ops.aligner.gae(rewards_N.detach(), values_N.detach(), action_mask_N, cu_seqlens, gamma, lam)
    return gae_reference(rewards_N, values_N, action_mask_N, cu_seqlens, gamma=gamma, lam=lam)


if library.LOADED:

    @torch.library.register_fake("aligner::gae")
    def _(rewards, values, action_mask, cu_seqlens, gamma, lam):
        return torch.empty_like(rewards).contiguous(), torch.empty_like(rewards).contiguous()
