"""Policy losses: (logprobs, entropy, batch, denominator of the step) -> (loss, statistics).

A batch is a data.batch.PolicyBatch or anything with its fields: rollout (of which cu_seqlens and action_mask_N are
read), old_logprobs_N, advantages_N and weights_N; importance_N and reference_logprobs_N where a function says so.
"""

from typing import Literal

import torch
from torch import Tensor

from aligner import ops
from aligner.losses.kl import kl_estimate

Average = Literal["token", "sequence"]
Ratio = Literal["token", "sequence", "cispo"]
KLInLoss = Literal["k1", "k2", "k3"]
Correction = Literal["none", "tis", "icepop"]


def token_weights(action_mask_N: Tensor, cu_seqlens: Tensor, average: Average, keep_B: Tensor | None = None) -> Tensor:
    r"""Weight of each token in a loss; the weights of an optimizer step add up to its denominator.

        "token":    loss = sum_t l_t / (number of action tokens)
        "sequence": loss = sum_i (1 / |a_i|) sum_{t in a_i} l_t / (number of sequences)

    Source: Yu et al. 2025, arXiv:2503.14476, section 3.3 (token mean); Shao et al. 2024, arXiv:2402.03300, eq. 3
    (sequence mean); keep_B: Yu et al. 2025, section 3.4 (overlong filtering).

    action_mask_N: (N,) bool. cu_seqlens: (B + 1,) int32, tokens.
    average: "token" | "sequence".
    keep_B: (B,) bool, sequences that the loss reads, or None for all. Neither the tokens of another one nor itself
        count in the denominator, weights_N.sum(); where that is 0, the step has nothing to learn from.
    Returns weights_N, (N,) float32, dimensionless, 0 outside action tokens. Raises ValueError for average.
    """
    if average not in ("token", "sequence"):
        raise ValueError(f"token_weights: average is {average!r}, expected token or sequence.")
    counts_B = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    sequence_N = torch.repeat_interleave(torch.arange(len(counts_B), device=cu_seqlens.device), counts_B)
    mask_N = action_mask_N if keep_B is None else action_mask_N & keep_B[sequence_N]
    weights_N = mask_N.float()
    if average == "token":
        return weights_N
    actions_B = ops.segment_sum(weights_N, cu_seqlens)
    return weights_N / actions_B.clamp(min=1)[sequence_N]


def sampler_correction(
    old_logprobs_N: Tensor, sampler_logprobs_N: Tensor, mask_N: Tensor, *, kind: Correction, low: float, high: float
) -> Tensor:
    r"""Weight that corrects for a sampler whose probabilities are not quite the trainer's.

        w_t = exp(old_logprob_t - sampler_logprob_t)
        none: c_t = 1    tis: c_t = min(w_t, high)    icepop: c_t = w_t where low <= w_t <= high, else 0

    Source: tis: Yao et al. 2025, fengyao.notion.site/off-policy-rl; icepop: Ling Team 2025, ringtech.notion.site/icepop
    and arXiv:2510.18855.

    old_logprobs_N: (N,) float32, nats. The trainer's, with the weights that sampled.
    sampler_logprobs_N: (N,) float32, nats. The sampler's.
    mask_N: (N,) bool. Action tokens; what another token holds is ignored, NaN included.
    kind: "none" | "tis" | "icepop".
    low: dimensionless, >= 0, read by icepop. high: dimensionless, > low.
    Returns importance_N, (N,) float32, dimensionless, 1 outside of the mask, without a gradient. Raises ValueError for
    kind and the bounds.
    """
    if kind not in ("none", "tis", "icepop"):
        raise ValueError(f"sampler_correction: kind is {kind!r}, expected none, tis or icepop.")
    if not 0 <= low < high:
        raise ValueError(f"sampler_correction: low is {low} and high is {high}, expected 0 <= low < high.")
    if kind == "none":
        return torch.ones_like(old_logprobs_N)
    ratio_N = torch.where(mask_N, old_logprobs_N - sampler_logprobs_N, 0).detach().exp()
    if kind == "tis":
        corrected_N = ratio_N.clamp(max=high)
    else:
        corrected_N = torch.where((ratio_N >= low) & (ratio_N <= high), ratio_N, 0)
    return torch.where(mask_N, corrected_N, 1)


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


def group_policy_loss(
    logprobs_N: Tensor,
    entropy_N: Tensor,
    batch,
    num: float,
    *,
    ratio: Ratio,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    entropy_bonus: float,
    kl_coef: float,
    kl_estimator: KLInLoss,
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""The loss of the GRPO family, whose methods differ in what they call the ratio.

        r_t = exp(logprob_t - old_logprob_t),    c_t = importance_t,    clip(x) = clip(x, 1 - clip_low, 1 + clip_high)
        token (GRPO, DAPO): l_t = c_t max(-A_t r_t, -A_t clip(r_t))
        sequence (GSPO): l_i = c_i max(-A_i s_i, -A_i clip(s_i)),    s_i = exp(mean_{t in a_i} log r_t)
        cispo: l_t = -sg(c_t clip(r_t)) A_t logprob_t,    sg: no gradient
        loss = sum w l / num + sum_t w_t (kl_coef KL_t - entropy_bonus H_t) / num

    with A_i and c_i the means of a sequence's tokens and w_i the sum of its weights, so that num is the same for all.

    Source: token: Shao et al. 2024, arXiv:2402.03300, eq. 3; two bounds: Yu et al. 2025, arXiv:2503.14476, eq. 8;
    sequence: Zheng et al. 2025, arXiv:2507.18071, eq. 5-7; cispo: MiniMax 2025, arXiv:2506.13585, eq. 4-5.

    logprobs_N, entropy_N: (N,) float32, nats. Under the policy being trained; gradients flow to them.
    batch: as of this module, with importance_N, (N,) float32 of `sampler_correction` or None for 1, and
        reference_logprobs_N, (N,) float32, nats, or None where kl_coef is 0.
    num: sum of the weights of the whole optimizer step, > 0, so that micro-batches add up.
    ratio: "token" | "sequence" | "cispo".
    clip_low, clip_high: dimensionless, >= 0; GSPO's are about 3e-4, of a mean over tokens.
    dual_clip: dimensionless, > 1, or None. Bound on the ratio where the advantage is negative; cispo has none.
    entropy_bonus, kl_coef: dimensionless.
    kl_estimator: "k1" | "k2" | "k3". Averaged over the policy's own samples, the gradient of k2 is that of
        KL(policy || reference), that of k3 is that of KL(reference || policy), and that of k1 is 0.

    Returns the loss, () float32, and the statistics of ops.policy_loss: with sequence "policy_loss", "clip_fraction",
    "ratio", "ratio_clamped" and "importance" are of sequences; with cispo "clip_fraction" tells where r_t is out of the
    range, and "policy_loss", whose gradient is the loss's, holds -c_t clip(r_t) A_t. "approx_kl" is of tokens.
    Raises ValueError for an argument out of range.
    """
    shared = {"entropy_bonus": entropy_bonus, "kl_coef": kl_coef, "kl_estimator": kl_estimator}
    if ratio == "sequence":
        clip = {"clip_low": clip_low, "clip_high": clip_high, "dual_clip": dual_clip}
        return _sequence_ratio_loss(logprobs_N, entropy_N, batch, num, clip, **shared)
    if ratio == "cispo":
        if dual_clip is not None:
            raise ValueError(f"group_policy_loss: dual_clip is {dual_clip}, but cispo has no dual clip; leave it None.")
        if not (clip_low >= 0 and clip_high >= 0):
            raise ValueError(f"group_policy_loss: clip_low is {clip_low}, clip_high is {clip_high}, expected >= 0.")
        bounds = (1 - clip_low, 1 + clip_high)
        ratio_N = (logprobs_N.detach() - batch.old_logprobs_N).exp()
        return _score_loss(logprobs_N, entropy_N, batch, num, bounds, ratio_N.clamp(*bounds), **shared)
    if ratio != "token":
        raise ValueError(f"group_policy_loss: ratio is {ratio!r}, expected token, sequence or cispo.")
    return ops.policy_loss(
        logprobs_N,
        batch.old_logprobs_N,
        batch.advantages_N,
        batch.weights_N,
        num,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        importance_N=batch.importance_N,
        entropy_N=entropy_N,
        entropy_coef=entropy_bonus,
        ref_logprobs_N=batch.reference_logprobs_N,
        kl_coef=kl_coef,
        kl=kl_estimator,
    )


def reinforce_loss(
    logprobs_N: Tensor,
    entropy_N: Tensor,
    batch,
    num: float,
    *,
    entropy_bonus: float,
    kl_coef: float,
    kl_estimator: KLInLoss,
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""The score function times the advantage: no ratio to the old policy, no clip.

        loss = sum_t w_t (-c_t A_t logprob_t - entropy_bonus H_t + kl_coef KL_t) / num,    c_t = importance_t

    Source: Williams 1992, doi:10.1007/BF00992696; for language models: Ahmadian et al. 2024, arXiv:2402.14740.

    Arguments, statistics and errors as of `group_policy_loss`, and so is what kl_estimator means. "policy_loss", whose
    gradient is the loss's, holds -c_t A_t; "ratio" tells how far the policy has moved; "clip_fraction" is 0.
    """
    free = (0.0, torch.inf)
    return _score_loss(
        *(logprobs_N, entropy_N, batch, num, free, None),
        entropy_bonus=entropy_bonus,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
    )


def _score_loss(
    logprobs_N, entropy_N, batch, num, bounds, factor_N, *, entropy_bonus, kl_coef, kl_estimator
) -> tuple[Tensor, dict[str, Tensor]]:
    """-sg(importance * factor) A log pi: the policy is its own old one, so that the ratio is 1 and its gradient is
    that of log pi; statistics tell of the ratio to the real old one."""
    importance_N, weights_N = batch.importance_N, batch.weights_N
    product_N = factor_N if importance_N is None else importance_N if factor_N is None else importance_N * factor_N
    loss, stats = ops.policy_loss(
        logprobs_N,
        logprobs_N.detach(),
        batch.advantages_N,
        weights_N,
        num,
        clip_low=0.0,
        clip_high=0.0,
        importance_N=product_N,
        entropy_N=entropy_N,
        entropy_coef=entropy_bonus,
        ref_logprobs_N=batch.reference_logprobs_N,
        kl_coef=kl_coef,
        kl=kl_estimator,
    )
    low, high = bounds
    log_ratio_N = torch.where(weights_N != 0, logprobs_N.detach() - batch.old_logprobs_N, 0)
    ratio_N = log_ratio_N.exp()
    terms = {
        "clip_fraction": ((ratio_N < low) | (ratio_N > high)).to(ratio_N.dtype),
        "approx_kl": torch.expm1(log_ratio_N) - log_ratio_N,
        "ratio": ratio_N,
        "ratio_clamped": ratio_N.clamp(low, high),
    }
    stats.pop("importance", None)
    if importance_N is not None:
        terms["importance"] = torch.where(weights_N != 0, importance_N, 0)
    return loss, stats | {name: (weights_N * term_N).sum() / num for name, term_N in terms.items()}


def _sequence_ratio_loss(
    logprobs_N, entropy_N, batch, num, clip, *, entropy_bonus, kl_coef, kl_estimator
) -> tuple[Tensor, dict[str, Tensor]]:
    cu_seqlens, mask_N, weights_N = batch.rollout.cu_seqlens, batch.rollout.action_mask_N, batch.weights_N

    def mean_B(x_N: Tensor) -> Tensor:
        return ops.segment_mean(x_N, cu_seqlens, mask_N=mask_N)

    loss, stats = ops.policy_loss(
        mean_B(logprobs_N),
        mean_B(batch.old_logprobs_N),
        mean_B(batch.advantages_N),
        ops.segment_sum(weights_N, cu_seqlens),
        num,
        importance_N=None if batch.importance_N is None else mean_B(batch.importance_N),
        **clip,
    )
    token_loss, token_stats = ops.policy_loss(  # the terms of tokens alone: an advantage of 0 and a ratio of 1
        logprobs_N,
        logprobs_N.detach(),
        torch.zeros_like(logprobs_N),
        weights_N,
        num,
        clip_low=0.0,
        clip_high=0.0,
        entropy_N=entropy_N,
        entropy_coef=entropy_bonus,
        ref_logprobs_N=batch.reference_logprobs_N,
        kl_coef=kl_coef,
        kl=kl_estimator,
    )
    drift_N = kl_estimate(batch.old_logprobs_N, logprobs_N.detach(), "k3")
    stats["approx_kl"] = (weights_N * torch.where(weights_N != 0, drift_N, 0)).sum() / num
    return loss + token_loss, stats | {name: token_stats[name] for name in ("entropy", "kl") if name in token_stats}
