"""Kahneman-Tversky loss: (log-probabilities, batch of single responses, num_responses) -> (loss, statistics)."""

from torch import Tensor

from aligner import ops


def kl_baseline(logprobs_B: Tensor, reference_logprobs_B: Tensor) -> Tensor:
    r"""The point from which KTO measures gains and losses.

        z = max(0, mean_b (logprob_b - reference_logprob_b))

    Source: Ethayarajh et al. 2024, arXiv:2402.01306, section 4.1: an estimate of KL(policy || reference) from prompts
    with responses to other prompts, biased but cheap.

    logprobs_B, reference_logprobs_B: (B,) float32, nats. Summed over the responses of the mismatched pairs, B >= 1,
        of all data-parallel ranks: the mean comes before the maximum.
    Returns z, () float32, nats, >= 0, without a gradient.
    """
    return (logprobs_B - reference_logprobs_B).detach().mean().clamp(min=0)


def kto_loss(
    logprobs_N: Tensor,
    batch,
    num_responses: float,
    *,
    beta: float,
    kl: Tensor,
    desirable_weight: float,
    undesirable_weight: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""KTO's loss on responses that are desirable or not, without pairs; see ops.kto_loss.

        h_b = sum_{t in b} logprob_t - reference_logprob_b
        loss = sum_b w_b (1 - s(+-beta (h_b - kl))) / num_responses,    + and desirable_weight where desirable

    Source: Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8.

    logprobs_N: (N,) float32, nats. Gradients flow to it.
    batch: anything with cu_seqlens, action_mask_N (the responses' tokens; what another token holds is ignored),
        reference_logprobs_B, (B,) float32, nats, summed over each response, and desirable_B, (B,) bool.
    num_responses: responses of the whole optimizer step, > 0, so that micro-batches add up.
    beta: 1/nats, > 0. kl: () float32, nats, of `kl_baseline`.
    desirable_weight, undesirable_weight: dimensionless, >= 0.

    Returns the loss, () float32, and the statistics of ops.kto_loss. Raises ValueError for an argument out of range.
    """
    return ops.kto_loss(
        ops.segment_sum(logprobs_N, batch.cu_seqlens, mask_N=batch.action_mask_N),
        batch.reference_logprobs_B,
        batch.desirable_B,
        kl,
        num_responses,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )
