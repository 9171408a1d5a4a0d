"""Softmax over a vocabulary sharded across the ranks of a group: equal contiguous shards, in rank order."""

# Shape suffixes: N packed tokens, V vocabulary (of this rank's shard).

import torch
import torch.distributed as dist
from torch import Tensor


def shard_bounds(columns: int, group: dist.ProcessGroup | None) -> tuple[int, int]:
    """First global column of this rank's shard of `columns`, and the size of the whole vocabulary."""
    if group is None:
        return 0, columns
    return dist.get_rank(group) * columns, dist.get_world_size(group) * columns


def combine(
    logprobs_N: Tensor,
    entropy_N: Tensor,
    max_N: Tensor,
    log_sum_N: Tensor,
    here_N: Tensor,
    temperature: float,
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Log-probability, entropy, max and log-sum of the whole vocabulary from those of each shard r.

        M = max_r m_r,    a_r = (m_r - M) / temperature + log S_r,    S = sum_r e^{a_r},    w_r = e^{a_r} / S
        logprob = logprob_r + a_r - log S of the shard that holds the target,    H = sum_r w_r (H_r - log w_r)

    Source: the chain rule of entropy; Milakov and Gimelshein 2018, arXiv:1805.02867, eq. 4 for combining (m, S).

    logprobs_N, entropy_N, log_sum_N: (N,) float32, nats, of the shard.
    max_N: (N,) float32, largest logit of the shard, not divided by the temperature.
    here_N: (N,) bool. The target is in this rank's shard.
    """
    largest_N = max_N.clone()
    dist.all_reduce(largest_N, dist.ReduceOp.MAX, group=group)
    empty_N = max_N == -torch.inf  # a shard of nothing but -inf logits weighs nothing
    a_N = torch.where(empty_N, -torch.inf, (max_N.double() - largest_N) / temperature + log_sum_N)
    e_N = a_N.exp()
    weighted_N = torch.where(empty_N | (e_N == 0), 0, e_N * (entropy_N - a_N))
    target_N = torch.where(here_N, torch.where(empty_N, -torch.inf, logprobs_N + a_N), 0)
    sums = torch.stack([e_N, weighted_N, target_N])
    dist.all_reduce(sums, group=group)
    log_sum_N = sums[0].log()
    return (
        (sums[2] - log_sum_N).float(),
        (sums[1] / sums[0] + log_sum_N).float(),
        largest_N,
        log_sum_N.float(),
    )


class GatherColumns(torch.autograd.Function):
    """All ranks' columns side by side; backward keeps this rank's, since every rank computes the same loss."""

    @staticmethod
    def forward(ctx, shard_NV: Tensor, group: dist.ProcessGroup) -> Tensor:
        shards = [torch.empty_like(shard_NV) for _ in range(dist.get_world_size(group))]
        dist.all_gather(shards, shard_NV.contiguous(), group=group)
        ctx.rank, ctx.columns = dist.get_rank(group), shard_NV.shape[1]
        return torch.cat(shards, dim=1)

    @staticmethod
    def backward(ctx, d_NV: Tensor):
        return d_NV[:, ctx.rank * ctx.columns : (ctx.rank + 1) * ctx.columns], None


class SumGradient(torch.autograd.Function):
    """Identity; backward sums the gradient over ranks, each of which saw only its shard's share."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, d_x: Tensor):
        d_x = d_x.contiguous().clone()
        dist.all_reduce(d_x, group=ctx.group)
        return d_x, None
