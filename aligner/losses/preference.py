"""Losses on pairs of responses: (log-probabilities or scores, batch of pairs, num_pairs) -> (loss, statistics)."""

import torch
from torch import Tensor

from aligner import ops


def direct_preference_loss(
    logprobs_N: Tensor, batch, num_pairs: float, *, kind: str, beta: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss of the DPO family on a data.batch.PreferenceBatch, of summed log-probabilities; see ops.preference_loss.

    logprobs_N: (N,) float32, nats, 0 outside of the responses. num_pairs: of the whole optimizer step.
    """
    sums_B = ops.segment_sum(logprobs_N, batch.cu_seqlens)
    reference_B = batch.reference_logprobs_B
    return ops.preference_loss(
        sums_B[0::2], sums_B[1::2], reference_B[0::2], reference_B[1::2], num_pairs, kind=kind, beta=beta
    )


def bradley_terry_loss(scores_N: Tensor, batch, num_pairs: float) -> tuple[Tensor, dict[str, Tensor]]:
    r"""The reward model's loss on a data.batch.PairBatch.

        L = -sum_i log sigmoid(r_chosen - r_rejected) / num_pairs

    Source: Ouyang et al. 2022, arXiv:2203.02155, eq. 1. It is DPO's loss with beta 1 and no reference.

    scores_N: (N,) float32, reward units, 0 but at each response's last token. num_pairs: of the whole optimizer step.
    """
    scores_B = ops.segment_sum(scores_N, batch.cu_seqlens)
    zero_B = torch.zeros_like(scores_B[0::2])
    return ops.preference_loss(scores_B[0::2], scores_B[1::2], zero_B, zero_B, num_pairs, kind="dpo", beta=1.0)
