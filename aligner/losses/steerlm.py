"""SteerLM 2: (log-probabilities, batch of groups of responses, num_prompts) -> (loss, statistics)."""

import torch
from torch import Tensor

from aligner import ops


def steerlm2_loss(logprobs_N: Tensor, batch, num_prompts: float, n: int) -> tuple[Tensor, dict[str, Tensor]]:
    r"""Divergence of the policy from the posterior of responses that have the attributes asked for.

        p = softmax_g(log P(a|x,y_i) + log P(y_i|x) - log Q(y_i|a,x))
        q = softmax_g(log Q_theta(y_i|a,x) - log Q(y_i|a,x)),    g: the n responses to one prompt, drawn from Q
        loss = sum_g KL(p || q) / num_prompts,    d loss / d log Q_theta(y_i) = (q_i - p_i) / num_prompts

    Source: Wang et al. 2024, arXiv:2406.08673, appendix on SteerLM 2.0. Its gradient, sum_i (p_i - q_i) of the negative
    log-likelihood's, is that of this loss; NeMo-Aligner further divides it by the responses' mean length.

    logprobs_N: (N,) float32, nats. Gradients flow to it.
    batch: anything with cu_seqlens, action_mask_N (the responses' tokens; what another token holds is ignored),
        target_log_weights_B, (B,) float32, nats, the exponent of p, up to a constant of the prompt, -inf for a response
        that has not the attributes (not for all n), and proposal_logprobs_B, (B,) float32, nats, log Q summed over each
        response.
    num_prompts: prompts of the whole optimizer step, > 0, so that micro-batches add up.
    n: responses to a prompt; they are neighbours.

    Returns the loss, () float32, nats, and detached () float32 statistics: "steerlm2_loss", and "distance", KL(p || q),
    which is the same number by its name in the paper's code. Raises ValueError for groups that are not whole and
    num_prompts.
    """
    sums_B = ops.segment_sum(logprobs_N, batch.cu_seqlens, mask_N=batch.action_mask_N)
    if n < 1 or len(sums_B) % n:
        raise ValueError(f"steerlm2_loss: {len(sums_B)} responses do not come in groups of {n}; keep groups together.")
    if not num_prompts > 0:
        raise ValueError(f"steerlm2_loss: num_prompts is {num_prompts}, expected the step's positive number of them.")
    log_p_gn = batch.target_log_weights_B.detach().view(-1, n).log_softmax(1)
    log_q_gn = (sums_B - batch.proposal_logprobs_B.detach()).view(-1, n).log_softmax(1)
    terms_gn = log_p_gn.exp() * torch.where(log_p_gn == -torch.inf, 0, log_p_gn - log_q_gn)
    loss = terms_gn.sum() / num_prompts
    return loss, {"steerlm2_loss": loss.detach(), "distance": loss.detach()}
