"""The critic's value loss."""

# Shape suffixes: N packed tokens.

import torch
from torch import Tensor

from aligner.ops import library

STATS = ("value_loss", "value_clip_fraction", "value", "return")


def value_loss_reference(
    values_N: Tensor,
    old_values_N: Tensor,
    returns_N: Tensor,
    mask_N: Tensor,
    num_tokens: float,
    *,
    clip: float | None,
    huber: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`value_loss` in plain PyTorch: any device, any float dtype."""
    weights_N = mask_N.to(values_N.dtype)
    values_N = torch.where(weights_N != 0, values_N, 0)
    old_values_N = torch.where(weights_N != 0, old_values_N.detach(), 0)
    returns_N = torch.where(weights_N != 0, returns_N.detach(), 0)

    def rho(error_N):
        if huber is None:
            return 0.5 * error_N.square()
        return torch.where(error_N.abs() <= huber, 0.5 * error_N.square(), huber * (error_N.abs() - 0.5 * huber))

    plain_N = rho(values_N - returns_N)
    loss_N, active_N = plain_N, torch.zeros_like(plain_N)
    if clip is not None:
        outside_N = (values_N - old_values_N).abs() > clip
        clipped_N = old_values_N + (values_N - old_values_N).detach().clamp(-clip, clip)
        clip_N = torch.where(outside_N, rho(clipped_N - returns_N), plain_N)
        loss_N = torch.where(clip_N > plain_N, clip_N, plain_N)
        active_N = (clip_N > plain_N).to(plain_N.dtype)
    sums = [(weights_N * x).sum() / num_tokens for x in (loss_N, active_N, values_N, returns_N)]
    return sums[0], {name: value.detach() for name, value in zip(STATS, sums, strict=True)}


def value_loss(
    values_N: Tensor,
    old_values_N: Tensor,
    returns_N: Tensor,
    mask_N: Tensor,
    num_tokens: float,
    *,
    clip: float | None,
    huber: float | None = None,
    impl: str = "auto",
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""The critic's squared or Huber error, clipped around its old values, and its statistics in one pass.

        loss = sum_t w_t max(rho(v_clip - R_t), rho(v_t - R_t)) / num_tokens
        v_clip = v_old + clamp(v_t - v_old, -clip, clip)
        rho(e) = e^2 / 2 where |e| <= huber, else huber (|e| - huber / 2)

    Source: Schulman et al. 2017, arXiv:1707.06347, the clipping is its authors' PPO2 implementation's; rho: Huber 1964,
    "Robust estimation of a location parameter".

    values_N: (N,) float32, reward units. From the critic being trained; gradients flow to it.
    old_values_N: (N,) float32, reward units. From the critic before this step.
    returns_N: (N,) float32, reward units. Targets.
    mask_N: (N,) bool, or float32 weights w_t, dimensionless. What a token of weight 0 holds is ignored, NaN included.
    num_tokens: tokens, > 0. Denominator of the whole optimizer step, so that micro-batches add up.
    clip: reward units, >= 0, or None for no clipping.
    huber: reward units, > 0, the error at which rho turns linear; None for half the squared error everywhere.
    impl: "auto" | "reference" | "cpp" | "cuda".

    Returns the loss, () float32, and detached () float32 statistics, each sum_t w_t x_t / num_tokens: "value_loss",
    "value_clip_fraction" (1 where the clipped branch is larger), "value" and "return" (reward units). Raises ValueError
    for an argument out of range, RuntimeError for shapes.
    """
    if not num_tokens > 0:
        raise ValueError(f"value_loss: num_tokens is {num_tokens}, expected the step's positive number of tokens.")
    if clip is not None and not clip >= 0:
        raise ValueError(f"value_loss: clip is {clip}, expected >= 0, or None for no clipping.")
    if huber is not None and not huber > 0:
        raise ValueError(f"value_loss: huber is {huber}, expected > 0, or None for the squared error.")
    tensors = {"values": values_N, "old_values": old_values_N, "returns": returns_N}
    if not library.use_compiled("value_loss", impl, tensors):
        return value_loss_reference(values_N, old_values_N, returns_N, mask_N, num_tokens, clip=clip, huber=huber)
    loss, stats, _ = torch.ops.aligner.value_loss(
        values_N, old_values_N.detach(), returns_N.detach(), mask_N, float(num_tokens), clip, huber
    )
    return loss, dict(zip(STATS, stats.unbind(), strict=True))


def _setup_context(ctx, inputs, output) -> None:
    _, stats, d_values = output
    ctx.set_materialize_grads(False)  # no zeros for the outputs without a gradient
    ctx.mark_non_differentiable(stats, d_values)
    ctx.save_for_backward(d_values)


def _backward(ctx, d_loss, d_stats, d_d_values):
    return d_loss * ctx.saved_tensors[0], *([None] * 6)


if library.LOADED:

    @torch.library.register_fake("aligner::value_loss")
    def _(values, old_values, returns, mask, num_tokens, clip, huber):
        return values.new_empty(()), values.new_empty(4), values.new_empty(values.shape)

    torch.library.register_autograd("aligner::value_loss", _backward, setup_context=_setup_context)
