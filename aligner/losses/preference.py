"""Losses on pairs of responses: (log-probabilities or scores, batch of pairs, num_pairs) -> (loss, statistics).

Sequence 2i of a batch is the chosen response of pair i, 2i + 1 the rejected one.
"""

from typing import Literal

from torch import Tensor
from torch.nn.functional import logsigmoid

from aligner import ops

BradleyTerry = Literal["bt", "margin", "scaled"]


def direct_preference_loss(
    logprobs_N: Tensor,
    batch,
    num_pairs: float,
    *,
    kind: str,
    beta: float,
    average: bool = False,
    label_smoothing: float = 0.0,
    margin: float = 0.0,
    reward_scale: float = 1.0,
    sft_coef: float = 0.0,
    sft_average: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""A loss of the DPO family, with an SFT term on request.

        P_i = sum_{t in y_i} logprob_t,    with average: P_i and the reference's are divided by |y_i|
        loss = preference_loss(P) + sft_coef sum_i S_i / num_pairs,    S_i = -sum or mean_{t in chosen i} logprob_t

    Source: ops.preference_loss has the formula and the paper of each kind; the SFT term: Pang et al. 2024,
    arXiv:2404.19733, eq. 1 (averaged), and Nvidia 2024, arXiv:2406.11704, section 3.3.2 (summed).

    logprobs_N: (N,) float32, nats. Gradients flow to it.
    batch: a data.batch.PreferenceBatch or anything with cu_seqlens, action_mask_N (the responses' tokens; what another
        token holds is ignored, NaN included), reference_logprobs_B, (B,) float32, nats, summed over each response
        (simpo and orpo do without), and for the rpo kinds rewards_B, (B,) float32, reward units, one a response.
    num_pairs: pairs of the whole optimizer step, > 0, so that micro-batches add up.
    kind, beta, label_smoothing, margin, reward_scale: as of ops.preference_loss.
    average: mean over a response's tokens in place of the sum; simpo and orpo always do.
    sft_coef: dimensionless. sft_average: S_i is the mean over the tokens, whatever average is.

    Returns the loss, () float32, and the statistics of ops.preference_loss, "sft_loss" being the mean of S_i. Raises
    ValueError for an argument out of range and for what a kind needs and the batch has not.
    """
    cu_seqlens, mask_N = batch.cu_seqlens, batch.action_mask_N
    average = average or kind in ("simpo", "orpo")
    sums_B = ops.segment_sum(logprobs_N, cu_seqlens, mask_N=mask_N)
    counts_B = ops.segment_sum(mask_N.to(sums_B.dtype), cu_seqlens).clamp(min=1)
    policy_B = sums_B / counts_B if average else sums_B
    reference_B = getattr(batch, "reference_logprobs_B", None)
    if reference_B is not None and average:
        reference_B = reference_B / counts_B
    loss, stats = ops.preference_loss(
        *(*_halves(policy_B), *_halves(reference_B), num_pairs),
        kind=kind,
        beta=beta,
        label_smoothing=label_smoothing,
        margin=margin,
        reward_scale=reward_scale,
        **dict(zip(("reward_chosen_B", "reward_rejected_B"), _halves(getattr(batch, "rewards_B", None)), strict=True)),
    )
    sft_B = -(sums_B / counts_B if sft_average else sums_B)[0::2]
    sft_loss = sft_B.sum() / num_pairs
    stats["sft_loss"] = sft_loss.detach()
    return loss + sft_coef * sft_loss if sft_coef else loss, stats


def bradley_terry_loss(
    scores_N: Tensor, batch, num_pairs: float, *, kind: BradleyTerry = "bt", centre: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""The reward model's loss: the chosen response wins over the rejected one with probability sigmoid(d).

        d = r_chosen - r_rejected
        bt: -log s(d)    margin: -log s(d - m)    scaled: -m log s(d)
        loss = sum_i (l_i + centre (r_chosen + r_rejected)^2) / num_pairs

    Source: bt: Ouyang et al. 2022, arXiv:2203.02155, eq. 1; margin: Touvron et al. 2023, arXiv:2307.09288, eq. 2;
    scaled: Wang et al. 2024, arXiv:2410.01257; centre: Eisenstein et al. 2023, arXiv:2312.09244.

    scores_N: (N,) float32, reward units, 0 but at each response's last token. Gradients flow to it.
    batch: a data.batch.PairBatch or anything with cu_seqlens and, for margin and scaled, margins_B, (B,) float32, how
        much better the chosen response is, >= 0, the same in both entries of a pair: reward units, or dimensionless.
    num_pairs: pairs of the whole optimizer step, > 0, so that micro-batches add up.
    kind: "bt" | "margin" | "scaled".
    centre: 1/reward units^2, >= 0. Draws the scores of a pair to a sum of 0, which the pairs alone leave open.

    Returns the loss, () float32, and detached () float32 statistics, each sum_i x_i / num_pairs: "reward_model_loss"
    (l_i), "accuracy" (d > 0), "reward_chosen", "reward_rejected" and "margin" (d). Raises ValueError for kind, for
    centre, for num_pairs and for margins that the batch has not.
    """
    if kind not in ("bt", "margin", "scaled"):
        raise ValueError(f"bradley_terry_loss: kind is {kind!r}, expected bt, margin or scaled.")
    if not (centre >= 0 and num_pairs > 0):
        raise ValueError(f"bradley_terry_loss: centre is {centre} and num_pairs {num_pairs}, expected >= 0 and > 0.")
    margins_B = getattr(batch, "margins_B", None)
    if kind != "bt" and margins_B is None:
        raise ValueError(f"bradley_terry_loss: kind {kind} needs margins_B, which this batch has not; or take kind bt.")
    chosen_B, rejected_B = _halves(ops.segment_sum(scores_N, batch.cu_seqlens))
    d_B = chosen_B - rejected_B
    match kind:
        case "bt":
            loss_B = -logsigmoid(d_B)
        case "margin":
            loss_B = -logsigmoid(d_B - margins_B[0::2])
        case "scaled":
            loss_B = -margins_B[0::2] * logsigmoid(d_B)
    terms = {
        "reward_model_loss": loss_B,
        "accuracy": (d_B > 0).to(d_B.dtype),
        "reward_chosen": chosen_B,
        "reward_rejected": rejected_B,
        "margin": d_B,
    }
    means = {name: term_B.sum() / num_pairs for name, term_B in terms.items()}
    loss = means["reward_model_loss"]
    if centre:
        loss = loss + centre * (chosen_B + rejected_B).square().sum() / num_pairs
    return loss, {name: mean.detach() for name, mean in means.items()}


def _halves(x_B: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """What belongs to the chosen responses and what to the rejected ones."""
    return (None, None) if x_B is None else (x_B[0::2], x_B[1::2])
