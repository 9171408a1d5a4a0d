"""Kahneman-Tversky loss on single responses, desirable or not."""

# Shape suffixes: B responses.

import torch
from torch import Tensor

from aligner.ops import library

STATS = ("kto_loss", "desirable", "reward_desirable", "reward_undesirable")


def kto_loss_reference(
    policy_B: Tensor,
    ref_B: Tensor,
    desirable_B: Tensor,
    kl: Tensor,
    num_responses: float,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`kto_loss` in plain PyTorch: any device, any float dtype."""
    h_B, kl = policy_B - ref_B.detach(), kl.detach()
    good_B = desirable_weight * (1 - (beta * (h_B - kl)).sigmoid())
    bad_B = undesirable_weight * (1 - (beta * (kl - h_B)).sigmoid())
    loss_B, reward_B = torch.where(desirable_B, good_B, bad_B), beta * h_B
    terms = (loss_B, desirable_B.to(h_B.dtype), reward_B * desirable_B, reward_B * ~desirable_B)
    means = [term.sum() / num_responses for term in terms]
    return means[0], {name: mean.detach() for name, mean in zip(STATS, means, strict=True)}


def kto_loss(
    policy_B: Tensor,
    ref_B: Tensor,
    desirable_B: Tensor,
    kl: Tensor,
    num_responses: float,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    impl: str = "auto",
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""KTO's loss on unpaired responses, and its statistics in one pass.

        h_b = policy_b - ref_b
        l_b = desirable_weight (1 - s(beta (h_b - kl))) where desirable
        l_b = undesirable_weight (1 - s(beta (kl - h_b))) elsewhere
        loss = sum_b l_b / num_responses

    Source: Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8.

    policy_B: (B,) float32, nats. Log-probabilities of the responses under the policy; gradients flow to it.
    ref_B: (B,) float32, nats. Under the reference.
    desirable_B: (B,) bool.
    kl: () float32, nats, >= 0. The reference point: an estimate of KL(policy || reference) over all ranks.
    num_responses: responses, > 0. Denominator of the whole optimizer step, so that micro-batches add up.
    beta: 1/nats, > 0.
    desirable_weight, undesirable_weight: dimensionless, >= 0.
    impl: "auto" | "reference" | "cpp" | "cuda".

    Returns the loss, () float32, and detached () float32 statistics, each sum_b x_b / num_responses: "kto_loss",
    "desirable" (share), "reward_desirable" and "reward_undesirable" (beta h of those responses; divide by the share for
    their mean). Raises ValueError for an argument out of range, RuntimeError for shapes.
    """
    if not num_responses > 0:
        raise ValueError(f"kto_loss: num_responses is {num_responses}, expected the step's positive number of them.")
    if not beta > 0:
        raise ValueError(f"kto_loss: beta is {beta}, expected more than 0.")
    if not (desirable_weight >= 0 and undesirable_weight >= 0):
        raise ValueError(f"kto_loss: weights are {desirable_weight} and {undesirable_weight}, expected both >= 0.")
    weights = dict(desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
    if not library.use_compiled("kto_loss", impl, {"policy": policy_B, "ref": ref_B, "kl": kl}):
        return kto_loss_reference(policy_B, ref_B, desirable_B, kl, num_responses, beta=beta, **weights)
    settings = (float(num_responses), beta, desirable_weight, undesirable_weight)
    loss, stats, _ = torch.ops.aligner.kto_loss(policy_B, ref_B.detach(), desirable_B, kl.detach(), *settings)
    return loss, dict(zip(STATS, stats.unbind(), strict=True))


def _setup_context(ctx, inputs, output) -> None:
    _, stats, d_policy = output
    ctx.set_materialize_grads(False)  # no zeros for the outputs without a gradient
    ctx.mark_non_differentiable(stats, d_policy)
    ctx.save_for_backward(d_policy)


def _backward(ctx, d_loss, *_):
    return d_loss * ctx.saved_tensors[0], *([None] * 7)


if library.LOADED:

    @torch.library.register_fake("aligner::kto_loss")
    def _(policy, *_):
        return policy.new_empty(()), policy.new_empty(4), policy.new_empty(policy.shape)

    torch.library.register_autograd("aligner::kto_loss", _backward, setup_context=_setup_context)
