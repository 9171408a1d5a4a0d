"""Policy losses: (logprobs, entropy, batch, num_tokens) -> (loss, statistics)."""

import torch
from torch import Tensor

from aligner import ops


def token_weights(action_mask_N: Tensor, cu_seqlens: Tensor, average: str) -> Tensor:
    r"""Weight of each token in a loss; the weights of an optimizer step add up to its denominator.

        "token":    loss = sum_t l_t / (number of action tokens)
        "sequence": loss = sum_i (1 / |a_i|) sum_{t in a_i} l_t / (number of sequences)

    Source: Yu et al. 2025, arXiv:2503.14476, section 3.3 (token mean); Shao et al. 2024, arXiv:2402.03300, eq. 3
    (sequence mean).

    action_mask_N: (N,) bool. cu_seqlens: (B + 1,) int32, tokens.
    Returns weights_N, (N,) float32, dimensionless, 0 outside action tokens.
    """
    weights_N = action_mask_N.float()
    if average == "token":
        return weights_N
    counts = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    sequence_N = torch.repeat_interleave(torch.arange(len(counts)), counts)
    actions_B = ops.segment_sum(weights_N, cu_seqlens)
    return weights_N / actions_B[sequence_N]


def clipped_policy_loss(
    logprobs_N: Tensor,
    entropy_N: Tensor,
    batch,
    num_tokens: float,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    entropy_bonus: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped surrogate with an entropy bonus, on a data.batch.PolicyBatch; see ops.policy_loss."""
    return ops.policy_loss(
        logprobs_N,
        batch.old_logprobs_N,
        batch.advantages_N,
        batch.weights_N,
        num_tokens,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        entropy_N=entropy_N,
        entropy_coef=entropy_bonus,
    )
