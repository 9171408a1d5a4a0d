"""Losses on pairs of a chosen and a rejected response."""

# Shape suffixes: B pairs.

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from aligner.ops import library

REFERENCE_FREE = ("simpo", "orpo")
WITH_REWARDS = ("rpo_sq", "rpo_fwd_kl", "rpo_bwd_kl")
KINDS = ("dpo", "cdpo", "rdpo", "ipo", *WITH_REWARDS, *REFERENCE_FREE)
STATS = ("preference_loss", "sft_loss", "accuracy", "reward_chosen", "reward_rejected", "reward_margin")


def _bernoulli_kl(log_odds_p: Tensor, log_odds_q: Tensor) -> Tensor:
    """KL(Bernoulli(s(a)) || Bernoulli(s(b))) from the log-odds a and b."""
    heads = log_odds_p.sigmoid() * (logsigmoid(log_odds_p) - logsigmoid(log_odds_q))
    return heads + (-log_odds_p).sigmoid() * (logsigmoid(-log_odds_p) - logsigmoid(-log_odds_q))


def _log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 - p)), without cancellation on either side of p = 1/2."""
    near, far = torch.log(-torch.expm1(logp)), torch.log1p(-logp.exp())
    return logp - torch.where(logp > -0.6931, near, far)


def preference_loss_reference(
    policy_chosen_B: Tensor,
    policy_rejected_B: Tensor,
    ref_chosen_B: Tensor | None,
    ref_rejected_B: Tensor | None,
    num_pairs: float,
    *,
    kind: str,
    beta: float,
    label_smoothing: float = 0.0,
    margin: float = 0.0,
    reward_chosen_B: Tensor | None = None,
    reward_rejected_B: Tensor | None = None,
    reward_scale: float = 1.0,
    sft_coef: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`preference_loss` in plain PyTorch: any device, any float dtype."""
    zero = torch.zeros_like(policy_chosen_B)
    chosen_B = policy_chosen_B - (zero if ref_chosen_B is None else ref_chosen_B.detach())
    rejected_B = policy_rejected_B - (zero if ref_rejected_B is None else ref_rejected_B.detach())
    x_B, e = beta * (chosen_B - rejected_B), label_smoothing
    y_B = zero if reward_chosen_B is None else reward_scale * (reward_chosen_B - reward_rejected_B).detach()
    match kind:
        case "dpo":
            loss_B = -logsigmoid(x_B)
        case "cdpo":
            loss_B = -(1 - e) * logsigmoid(x_B) - e * logsigmoid(-x_B)
        case "rdpo":
            loss_B = (e * logsigmoid(-x_B) - (1 - e) * logsigmoid(x_B)) / (1 - 2 * e)
        case "ipo":
            loss_B = (chosen_B - rejected_B - 0.5 / beta).square()
        case "rpo_sq":
            loss_B = (x_B - y_B).square()
        case "rpo_fwd_kl":
            loss_B = _bernoulli_kl(x_B, y_B)
        case "rpo_bwd_kl":
            loss_B = _bernoulli_kl(y_B, x_B)
        case "simpo":
            loss_B = -logsigmoid(beta * (policy_chosen_B - policy_rejected_B) - margin)
        case "orpo":
            loss_B = -beta * logsigmoid(_log_odds(policy_chosen_B) - _log_odds(policy_rejected_B))
    accurate_B = (x_B > 0).to(x_B.dtype)
    terms = (loss_B, -policy_chosen_B, accurate_B, beta * chosen_B, beta * rejected_B, x_B)
    means = [term.sum() / num_pairs for term in terms]
    stats = {name: mean.detach() for name, mean in zip(STATS, means, strict=True)}
    return means[0] + sft_coef * means[1], stats


def _check(kind, num_pairs, beta, label_smoothing, references, rewards) -> None:
    if kind not in KINDS:
        raise ValueError(f"preference_loss: kind is {kind!r}, expected {', '.join(KINDS)}.")
    if not num_pairs > 0:
        raise ValueError(f"preference_loss: num_pairs is {num_pairs}, expected the step's positive number of pairs.")
    if not beta > 0:
        raise ValueError(f"preference_loss: beta is {beta}, expected more than 0.")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"preference_loss: label_smoothing is {label_smoothing}, expected 0 <= label_smoothing < 0.5.")
    if kind not in REFERENCE_FREE and any(t is None for t in references):
        raise ValueError(f"preference_loss: kind {kind} needs ref_chosen_B and ref_rejected_B, got None.")
    if kind in WITH_REWARDS and any(t is None for t in rewards):
        raise ValueError(f"preference_loss: kind {kind} needs reward_chosen_B and reward_rejected_B, got None.")


def preference_loss(
    policy_chosen_B: Tensor,
    policy_rejected_B: Tensor,
    ref_chosen_B: Tensor | None,
    ref_rejected_B: Tensor | None,
    num_pairs: float,
    *,
    kind: str,
    beta: float,
    label_smoothing: float = 0.0,
    margin: float = 0.0,
    reward_chosen_B: Tensor | None = None,
    reward_rejected_B: Tensor | None = None,
    reward_scale: float = 1.0,
    sft_coef: float = 0.0,
    impl: str = "auto",
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""Loss of the DPO family on pairs of responses, with an SFT term on request, and its statistics in one pass.

        delta = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected),    x = beta * delta
        y = reward_scale * (reward_chosen - reward_rejected),    e = label_smoothing
        dpo: -log s(x)                      cdpo: -(1 - e) log s(x) - e log s(-x)
        ipo: (delta - 1 / (2 beta))^2       rdpo: (-(1 - e) log s(x) + e log s(-x)) / (1 - 2 e)
        rpo_sq: (x - y)^2                   rpo_bwd_kl: KL(Bern s(y) || Bern s(x)), rpo_fwd_kl: the other way round
        simpo: -log s(beta (policy_chosen - policy_rejected) - margin)
        orpo: -beta log s(o_chosen - o_rejected),    o = log(p / (1 - p)),    log p = policy
        loss = sum_b (l_b - sft_coef * policy_chosen_b) / num_pairs

    Source: dpo: Rafailov et al. 2023, arXiv:2305.18290, eq. 7; cdpo: Mitchell 2023, ericmitchell.ai/cdpo.pdf; rdpo: Ray
    Chowdhury et al. 2024, arXiv:2403.00409; ipo: Azar et al. 2023, arXiv:2310.12036, eq. 17; rpo: Sun et al. 2025,
    arXiv:2502.00203; simpo: Meng et al. 2024, arXiv:2405.14734, eq. 6; orpo: Hong et al. 2024, arXiv:2403.07691,
    eq. 6-7.

    policy_chosen_B, policy_rejected_B: (B,) float32, nats. Log-probabilities of the responses, summed over tokens or,
        for simpo and orpo (where they must be below 0), averaged. Gradients flow to them.
    ref_chosen_B, ref_rejected_B: (B,) float32, nats. Under the reference; None for simpo and orpo, which have none.
    num_pairs: pairs, > 0. Denominator of the whole optimizer step, so that micro-batches add up.
    kind: "dpo" | "cdpo" | "rdpo" | "ipo" | "rpo_sq" | "rpo_fwd_kl" | "rpo_bwd_kl" | "simpo" | "orpo".
    beta: 1/nats, > 0; for orpo the dimensionless weight of the odds ratio.
    label_smoothing: dimensionless, in [0, 0.5). Share of flipped labels, for cdpo and rdpo.
    margin: dimensionless. Target margin of simpo.
    reward_chosen_B, reward_rejected_B: (B,) float32, reward units, for the rpo kinds; reward_scale: 1/reward units.
    sft_coef: dimensionless. Weight of the negative log-probability of the chosen response.
    impl: "auto" | "reference" | "cpp" | "cuda".

    Returns the loss, () float32, and detached () float32 statistics, each sum_b x_b / num_pairs: "preference_loss",
    "sft_loss" (-policy_chosen, nats), "accuracy" (delta > 0), "reward_chosen", "reward_rejected" (beta (policy - ref))
    and "reward_margin". Raises ValueError for an argument out of range, RuntimeError for shapes.
    """
    rewards, references = (reward_chosen_B, reward_rejected_B), (ref_chosen_B, ref_rejected_B)
    _check(kind, num_pairs, beta, label_smoothing, references, rewards)
    if kind in REFERENCE_FREE:
        ref_chosen_B = ref_rejected_B = None
    if kind not in WITH_REWARDS:
        reward_chosen_B = reward_rejected_B = None
    policy = {"policy_chosen": policy_chosen_B, "policy_rejected": policy_rejected_B}
    constant = {
        "ref_chosen": ref_chosen_B,
        "ref_rejected": ref_rejected_B,
        "reward_chosen": reward_chosen_B,
        "reward_rejected": reward_rejected_B,
    }
    tensors = policy | {name: t for name, t in constant.items() if t is not None}
    if not library.use_compiled("preference_loss", impl, tensors):
        return preference_loss_reference(
            *(policy_chosen_B, policy_rejected_B, ref_chosen_B, ref_rejected_B, num_pairs),
            kind=kind,
            beta=beta,
            label_smoothing=label_smoothing,
            margin=margin,
            reward_chosen_B=reward_chosen_B,
            reward_rejected_B=reward_rejected_B,
            reward_scale=reward_scale,
            sft_coef=sft_coef,
        )
    fixed = (t if t is None else t.detach() for t in constant.values())
    settings = (float(num_pairs), kind, beta, label_smoothing, margin, reward_scale, sft_coef)
    loss, stats, _, _ = torch.ops.aligner.preference_loss(policy_chosen_B, policy_rejected_B, *fixed, *settings)
    return loss, dict(zip(STATS, stats.unbind(), strict=True))


def _setup_context(ctx, inputs, output) -> None:
    _, stats, d_chosen, d_rejected = output
    ctx.set_materialize_grads(False)  # no zeros for the outputs without a gradient
    ctx.mark_non_differentiable(stats, d_chosen, d_rejected)
    ctx.save_for_backward(d_chosen, d_rejected)


def _backward(ctx, d_loss, *_):
    d_chosen, d_rejected = ctx.saved_tensors
    return d_loss * d_chosen, d_loss * d_rejected, *([None] * 11)


if library.LOADED:

    @torch.library.register_fake("aligner::preference_loss")
    def _(policy_chosen, policy_rejected, *_):
        empty = policy_chosen.new_empty
        return empty(()), empty(6), empty(policy_chosen.shape), empty(policy_chosen.shape)

    torch.library.register_autograd("aligner::preference_loss", _backward, setup_context=_setup_context)
