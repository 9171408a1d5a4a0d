"""Masked whitening."""

# Shape suffixes: N packed tokens.

import torch
import torch.distributed as dist
from torch import Tensor

from aligner.ops import library

EPSILON = 1e-8


def combine_moments(moments: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Moments of all ranks' tokens from each rank's (3,) float64: count, mean, sum of squared deviations."""
    shards = [torch.empty_like(moments) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shards, moments.contiguous(), group=group)
    count_R, mean_R, squares_R = torch.stack(shards).unbind(1)
    count = count_R.sum()
    mean = (count_R * mean_R).sum() / count.clamp(min=1)
    return torch.stack([count, mean, (squares_R + count_R * (mean_R - mean).square()).sum()])


def whiten_reference(x_N: Tensor, mask_N: Tensor, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """`whiten` in plain PyTorch: any device, any float dtype."""
    x_N = torch.where(mask_N, x_N.detach(), 0)
    count = mask_N.sum().to(x_N.dtype)
    mean = x_N.sum() / count.clamp(min=1)
    squares = ((x_N - mean).square() * mask_N).sum()
    if group is not None:
        moments = combine_moments(torch.stack([count, mean, squares]).double(), group)
        count, mean, squares = moments.to(x_N.dtype)
    return (x_N - mean) * (squares / count.clamp(min=1) + EPSILON).rsqrt() * mask_N


def whiten(x_N: Tensor, mask_N: Tensor, *, group: dist.ProcessGroup | None = None, impl: str = "auto") -> Tensor:
    r"""Masked tokens scaled to mean 0 and variance 1, 0 elsewhere.

        y_t = (x_t - mean) / sqrt(var + 1e-8),    var = sum_t (x_t - mean)^2 / count

    Source: Chan, Golub and LeVeque 1979 for combining the moments of ranks.

    x_N: (N,) float32, any unit.
    mask_N: (N,) bool. Tokens that take part; other entries of x_N may hold anything.
    group: ranks whose tokens are whitened together (data-parallel), or None for this process alone.
    impl: "auto" | "reference" | "cpp" | "cuda".

    Returns (N,) float32, dimensionless; all 0 when no token takes part. No gradient flows through it. Raises ValueError
    for impl, RuntimeError for shapes.
    """
    if not library.use_compiled("whiten", impl, {"x": x_N}):
        return whiten_reference(x_N, mask_N, group=group)
    moments = torch.ops.aligner.whiten_moments(x_N.detach(), mask_N)
    if group is not None:
        moments = combine_moments(moments, group)
    return torch.ops.aligner.whiten_apply(x_N.detach(), mask_N, moments)


if library.LOADED:

    @torch.library.register_fake("aligner::whiten_moments")
    def _(x, mask):
        return x.new_empty(3, dtype=torch.float64)

    @torch.library.register_fake("aligner::whiten_apply")
    def _(x, mask, moments):
        return x.new_empty(x.shape)
