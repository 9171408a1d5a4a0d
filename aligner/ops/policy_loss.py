"""PPO's clipped policy loss."""

# Shape suffixes: N packed tokens.

import torch
from torch import Tensor

from aligner.ops import library

STATS = ("policy_loss", "clip_fraction", "approx_kl", "ratio", "ratio_clamped", "entropy", "kl", "importance")
KL_ESTIMATORS = {
    "k1": lambda x: x,
    "k2": lambda x: 0.5 * x.square(),
    "k3": lambda x: torch.expm1(-x) + x,
}


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
    importance_N: Tensor | None = None,
    entropy_N: Tensor | None = None,
    entropy_coef: float = 0.0,
    ref_logprobs_N: Tensor | None = None,
    kl_coef: float = 0.0,
    kl: str = "k3",
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
    terms = {
        "policy_loss": loss_N,
        "clip_fraction": active_N.to(loss_N.dtype),
        "approx_kl": torch.expm1(d_N) - d_N,
        "ratio": ratio_N,
        "ratio_clamped": clamped_N,
    }
    if importance_N is not None:
        terms["importance"] = torch.where(weights_N != 0, importance_N.detach(), 0)
        terms["policy_loss"] = terms["importance"] * loss_N
    if entropy_N is not None:
        terms["entropy"] = torch.where(weights_N != 0, entropy_N, 0)
    if ref_logprobs_N is not None:
        terms["kl"] = KL_ESTIMATORS[kl](torch.where(weights_N != 0, logprobs_N - ref_logprobs_N.detach(), 0))
    means = {name: (weights_N * terms[name]).sum() / num_tokens for name in STATS if name in terms}
    loss = means["policy_loss"] - entropy_coef * means.get("entropy", 0) + kl_coef * means.get("kl", 0)
    return loss, {name: mean.detach() for name, mean in means.items()}


def _check(num_tokens, clip_low, clip_high, dual_clip, entropy_N, entropy_coef, ref_logprobs_N, kl_coef, kl) -> None:
    if not num_tokens > 0:
        raise ValueError(f"policy_loss: num_tokens is {num_tokens}, expected the step's positive number of tokens.")
    if not (clip_low >= 0 and clip_high >= 0):
        raise ValueError(f"policy_loss: clip_low is {clip_low} and clip_high is {clip_high}, expected both >= 0.")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"policy_loss: dual_clip is {dual_clip}, expected more than 1, or None to switch it off.")
    if entropy_coef and entropy_N is None:
        raise ValueError(f"policy_loss: entropy_coef is {entropy_coef} but entropy_N is None; pass the entropy.")
    if kl_coef and ref_logprobs_N is None:
        raise ValueError(f"policy_loss: kl_coef is {kl_coef} but ref_logprobs_N is None; pass the reference's.")
    if kl not in KL_ESTIMATORS:
        raise ValueError(f"policy_loss: kl is {kl!r}, expected k1, k2 or k3.")


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
    importance_N: Tensor | None = None,
    entropy_N: Tensor | None = None,
    entropy_coef: float = 0.0,
    ref_logprobs_N: Tensor | None = None,
    kl_coef: float = 0.0,
    kl: str = "k3",
    impl: str = "auto",
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""PPO's clipped surrogate, on request with dual clip, entropy bonus and KL term, and its statistics in one pass.

        loss = sum_t w_t (c_t l_t - entropy_coef * H_t + kl_coef * KL_t) / num_tokens
        l_t = max(-A_t r_t, -A_t clip(r_t, 1 - clip_low, 1 + clip_high)),    where A_t < 0: min(l_t, -A_t dual_clip)
        r_t = exp(logprob_t - old_logprob_t),    x_t = logprob_t - ref_logprob_t
        KL_t = x_t (k1), x_t^2 / 2 (k2), exp(-x_t) - 1 + x_t (k3)

    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 7; dual clip: Ye et al. 2020, arXiv:1912.09729, eq. 5; KL in the
    loss: Shao et al. 2024, arXiv:2402.03300, eq. 3-4; its estimators: Schulman 2020, joschu.net/blog/kl-approx.html;
    correction c_t for a sampler that differs from the trainer: Yao et al. 2025, fengyao.notion.site/off-policy-rl.

    logprobs_N: (N,) float32, nats. Under the policy being trained; gradients flow to it.
    old_logprobs_N: (N,) float32, nats. Under the policy that sampled.
    advantages_N: (N,) float32, dimensionless after whitening.
    mask_N: (N,) bool, or float32 weights w_t, dimensionless. What a token of weight 0 holds is ignored, NaN included.
    num_tokens: tokens, > 0. Denominator of the whole optimizer step, so that micro-batches add up.
    clip_low, clip_high: dimensionless, >= 0. The ratio is clipped to [1 - clip_low, 1 + clip_high].
    dual_clip: dimensionless, > 1, or None for none. Bound on the ratio where the advantage is negative.
    importance_N: (N,) float32, dimensionless, or None for 1. The c_t above, such as a truncated ratio of the trainer's
        to the sampler's probability; no gradient flows to it.
    entropy_N: (N,) float32, nats, or None. Gradients flow to it.
    entropy_coef: dimensionless. Weight of the entropy bonus; needs entropy_N.
    ref_logprobs_N: (N,) float32, nats, or None. Under the reference policy.
    kl_coef: dimensionless. Weight of the KL term; needs ref_logprobs_N.
    kl: "k1" | "k2" | "k3". Its estimator; the gradient is that of the formula, hence 0 in expectation with k1.
    impl: "auto" | "reference" | "cpp" | "cuda".

    Returns the loss, () float32, and detached () float32 statistics, each sum_t w_t x_t / num_tokens: "policy_loss"
    (c_t l_t), "clip_fraction" (1 where a clipped branch is active), "approx_kl" (r - 1 - log r, the k3 estimate of
    KL(old || new), nats), "ratio", "ratio_clamped", and "entropy" (nats), "kl" (nats), "importance" where their inputs
    are given. Raises ValueError for an argument out of range, RuntimeError for shapes.
    """
    _check(num_tokens, clip_low, clip_high, dual_clip, entropy_N, entropy_coef, ref_logprobs_N, kl_coef, kl)
    optional = {"importance": importance_N, "ref_logprobs": ref_logprobs_N, "entropy": entropy_N}
    given = {name: t for name, t in optional.items() if t is not None}
    tensors = {"logprobs": logprobs_N, "old_logprobs": old_logprobs_N, "advantages": advantages_N} | given
    if not library.use_compiled("policy_loss", impl, tensors):
        return policy_loss_reference(
            *(logprobs_N, old_logprobs_N, advantages_N, mask_N, num_tokens),
            clip_low=clip_low,
            clip_high=clip_high,
            dual_clip=dual_clip,
            importance_N=importance_N,
            entropy_N=entropy_N,
            entropy_coef=entropy_coef,
            ref_logprobs_N=ref_logprobs_N,
            kl_coef=kl_coef,
            kl=kl,
        )
    constants = (t if t is None else t.detach() for t in (old_logprobs_N, advantages_N))
    more = (t if t is None else t.detach() for t in (importance_N, ref_logprobs_N))
    settings = (float(num_tokens), clip_low, clip_high, dual_clip, entropy_coef, kl_coef, kl)
    loss, stats, _, _ = torch.ops.aligner.policy_loss(logprobs_N, *constants, mask_N, *more, entropy_N, *settings)
    absent = {"kl" if name == "ref_logprobs" else name for name in optional.keys() - given.keys()}
    return loss, {name: x for name, x in zip(STATS, stats.unbind(), strict=True) if name not in absent}


def _setup_context(ctx, inputs, output) -> None:
    _, stats, d_logprobs, d_entropy = output
    ctx.set_materialize_grads(False)  # no zeros for the outputs without a gradient
    ctx.mark_non_differentiable(stats, d_logprobs, d_entropy)
    ctx.save_for_backward(d_logprobs, d_entropy)
    entropy, entropy_coef = inputs[6], inputs[11]
    ctx.entropy_needed = entropy is not None and entropy.requires_grad and entropy_coef != 0


def _backward(ctx, d_loss, *_):
    d_logprobs, d_entropy = ctx.saved_tensors
    d_entropy = d_loss * d_entropy if ctx.entropy_needed else None
    return d_loss * d_logprobs, None, None, None, None, None, d_entropy, *([None] * 7)


if library.LOADED:

    @torch.library.register_fake("aligner::policy_loss")
    def _(logprobs, *rest):
        entropy, entropy_coef = rest[5], rest[10]
        n = logprobs.shape[0] if entropy is not None and entropy_coef != 0 else 0
        return *(logprobs.new_empty(shape) for shape in ((), 8, logprobs.shape)), logprobs.new_empty(n)

    torch.library.register_autograd("aligner::policy_loss", _backward, setup_context=_setup_context)
