"""Supervised losses: (logprobs, batch, num_tokens) -> (loss, statistics)."""

from torch import Tensor


def supervised_loss(logprobs_N: Tensor, batch, num_tokens: float) -> tuple[Tensor, dict[str, Tensor]]:
    r"""Mean negative log-likelihood of the tokens of batch.action_mask_N.

        L = -sum_t log p(token_t | its prefix) / num_tokens

    Source: Ouyang et al. 2022, arXiv:2203.02155, section 3.5 (supervised fine-tuning).

    logprobs_N: (N,) float32, nats, 0 outside of the mask. num_tokens: masked tokens of the whole optimizer step.
    Returns the loss, nats a token.
    """
    loss = -(logprobs_N * batch.action_mask_N).sum() / num_tokens
    return loss, {"supervised_loss": loss.detach()}
