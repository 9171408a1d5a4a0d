"""PPO's clipped policy loss."""

# Shape suffixes: N packed tokens.

import torch
from torch import Tensor

from aligner.ops import library

STATS = ("policy_loss", "clip_fraction", "approx_kl", "ratio", "ratio_clamped", "entropy")


def policy_loss_reference(
    logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    advantages_N: Tensor,
    mask_N: Tensor,
    num_tokens: float,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    entropy_N: Tensor | None = None,
    entropy_coef: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`policy_loss` in plain PyTorch: any device, any float dtype."""
    weights_N = mask_N.to(logprobs_N.dtype)
    d_N = torch.where(weights_N != 0, logprobs_N - old_logprobs_N.detach(), 0)
    advantages_N = torch.where(weights_N != 0, advantages_N.detach(), 0)
    ratio_N = d_N.exp()
    clamped_N = ratio_N.clamp(1 - clip_low, 1 + clip_high)
    plain_N, clip_N = -advantages_N * ratio_N, -advantages_N * clamped_N
    active_N = clip_N > plain_N
    loss_N = torch.where(active_N, clip_N.detach(), plain_N)
    if dual_clip is not None:
        dual_N = -advantages_N * dual_clip
        beyond_N = (advantages_N < 0) & (dual_N < loss_N)
        loss_N = torch.where(beyond_N, dual_N, loss_N)
        active_N = active_N | beyond_N
    terms = [loss_N, active_N.to(loss_N.dtype), torch.expm1(d_N) - d_N, ratio_N, clamped_N]
    if entropy_N is not None:
        terms.append(torch.where(weights_N != 0, entropy_N, 0))
    sums = [(weights_N * term).sum() / num_tokens for term in terms]
    loss = sums[0] - entropy_coef * sums[5] if entropy_N is not None else sums[0]
    return loss, {name: value.detach() for name, value in zip(STATS, sums, strict=False)}


def _check(num_tokens, clip_low, clip_high, dual_clip, entropy_N, entropy_coef) -> None:
    if not num_tokens > 0:
        raise ValueError(f"policy_loss: num_tokens is {num_tokens}, expected the step's positive number of tokens.")
    if not (clip_low >= 0 and clip_high >= 0):
        raise ValueError(f"policy_loss: clip_low is {clip_low} and clip_high is {clip_high}, expected both >= 0.")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"policy_loss: dual_clip is {dual_clip}, expected more than 1, or None to switch it off.")
    if entropy_coef and entropy_N is None:
        raise ValueError(f"policy_loss: entropy_coef is {entropy_coef} but entropy_N is None; pass the entropy.")


def policy_loss(
    logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    advantages_N: Tensor,
    mask_N: Tensor,
    num_tokens: float,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    entropy_N: Tensor | None = None,
    entropy_coef: float = 0.0,
    impl: str = "auto",
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""PPO's clipped surrogate, with dual clip and an entropy bonus on request, and its statistics in one pass.

        loss = sum_t w_t (l_t - entropy_coef * H_t) / num_tokens,    r_t = exp(logprob_t - old_logprob_t)
        l_t = max(-A_t r_t, -A_t clip(r_t, 1 - clip_low, 1 + clip_high)),    where A_t < 0: min(l_t, -A_t dual_clip)

    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 7; dual clip: Ye et al. 2020, arXiv:1912.09729, eq. 5.

    logprobs_N: (N,) float32, nats. Under the policy being trained; gradients flow to it.
    old_logprobs_N: (N,) float32, nats. Under the policy that sampled.
    advantages_N: (N,) float32, dimensionless after whitening.
    mask_N: (N,) bool, or float32 weights w_t, dimensionless. What a token of weight 0 holds is ignored, NaN included.
    num_tokens: tokens, > 0. Denominator of the whole optimizer step, so that micro-batches add up.
    clip_low, clip_high: dimensionless, >= 0. The ratio is clipped to [1 - clip_low, 1 + clip_high].
    dual_clip: dimensionless, > 1, or None for none. Bound on the ratio where the advantage is negative.
    entropy_N: (N,) float32, nats, or None. Gradients flow to it.
    entropy_coef: dimensionless. Weight of the entropy bonus; needs entropy_N.
    impl: "auto" | "reference" | "cpp".

    Returns the loss, () float32, and detached () float32 statistics, each sum_t w_t x_t / num_tokens: "policy_loss"
    (without the entropy term), "clip_fraction" (1 where a clipped branch is active), "approx_kl" (r - 1 - log r, the k3
    estimate of KL(old || new), nats), "ratio", "ratio_clamped", and "entropy" (nats) when entropy_N is given. Raises
    ValueError for an argument out of range, RuntimeError for shapes.
    """
    _check(num_tokens, clip_low, clip_high, dual_clip, entropy_N, entropy_coef)
    tensors = {"logprobs": logprobs_N, "old_logprobs": old_logprobs_N, "advantages": advantages_N}
    if entropy_N is not None:
        tensors["entropy"] = entropy_N
    if not library.use_cpp("policy_loss", impl, tensors):
        given = dict(dual_clip=dual_clip, entropy_N=entropy_N, entropy_coef=entropy_coef)
        inputs = (logprobs_N, old_logprobs_N, advantages_N, mask_N, num_tokens)
        return policy_loss_reference(*inputs, clip_low=clip_low, clip_high=clip_high, **given)
    inputs = (logprobs_N, old_logprobs_N.detach(), advantages_N.detach(), mask_N, entropy_N)
    settings = (float(num_tokens), clip_low, clip_high, dual_clip, entropy_coef)
    loss, stats, _ = torch.ops.aligner.policy_loss(*inputs, *settings)
    names = STATS if entropy_N is not None else STATS[:-1]
    return loss, dict(zip(names, stats.unbind(), strict=False))


def _setup_context(ctx, inputs, output) -> None:
    _, _, _, mask, entropy, ctx.num_tokens, _, _, _, ctx.entropy_coef = inputs
    _, stats, d_logprobs = output
    ctx.mark_non_differentiable(stats, d_logprobs)
    ctx.save_for_backward(d_logprobs, mask)
    ctx.entropy_needed = entropy is not None and entropy.requires_grad and ctx.entropy_coef != 0


def _backward(ctx, d_loss, d_stats, d_d_logprobs):
    d_logprobs, mask = ctx.saved_tensors
    d_entropy = -ctx.entropy_coef / ctx.num_tokens * d_loss * mask if ctx.entropy_needed else None
    return d_loss * d_logprobs, None, None, None, d_entropy, None, None, None, None, None


if library.LOADED:

    @torch.library.register_fake("aligner::policy_loss")
    def _(logprobs, old_logprobs, advantages, mask, entropy, num_tokens, clip_low, clip_high, dual_clip, entropy_coef):
        return logprobs.new_empty(()), logprobs.new_empty(6), logprobs.new_empty(logprobs.shape)

    torch.library.register_autograd("aligner::policy_loss", _backward, setup_context=_setup_context)
