"""Packed sequences <-> the rows that a rank's network runs on. The only place that shifts by one token.

Entry t of a packed tensor is about token t; the hidden state that predicts token t stands in row t - 1. A micro-batch
is its sequences one after the other, padded at the end to a length that the layout divides. With n context-parallel
ranks this stream is cut into 2n chunks and rank r holds the chunks r and 2n - 1 - r, so that under a causal mask every
rank has the same work.

Source of the chunks' order: Llama Team 2024, arXiv:2407.21783, section 3.3.2.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

# Rows first ... last - 1 of this rank attend to tokens first ... last - 1 of the stream; both end at the same token.
Segment = tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One micro-batch on this rank.

    tokens_T: (T,) int64, this rank's tokens, padded with 0.
    positions_T: (T,) int64, each token's place in its sequence, tokens; 0 for padding.
    segments: which rows attend to which tokens; rows of none are padding.
    action_tokens: (A,) int64, ids of the action tokens whose row is on this rank.
    action_index: (A,) int64, packed index of each.
    row: (A,) int64, row that is read for it: its predictor's, or its own.
    num_packed: packed tokens in the micro-batch, those of other ranks included; 0 for a micro-batch of padding only.
    context_group: ranks that share the micro-batch; None when it is not shared.
    """

    tokens_T: Tensor
    positions_T: Tensor
    segments: list[Segment]
    action_tokens: Tensor
    action_index: Tensor
    row: Tensor
    num_packed: int
    context_group: dist.ProcessGroup | None

    @staticmethod
    def of(batch, *, context_group: dist.ProcessGroup | None = None, tensor: int = 1, shift: int = 1) -> "Layout":
        """This rank's part of a micro-batch (None: padding only).

        tensor: ranks that split the tokens once more (sequence parallel), whose number T must be a multiple of.
        shift: 1 reads the state that predicts a token, 0 the state after it.
        """
        if batch is None:
            tokens_N, mask_N, starts = torch.zeros(0).long(), torch.zeros(0).bool(), torch.zeros(1).long()
        else:
            tokens_N, mask_N, starts = batch.tokens_N, batch.action_mask_N, batch.cu_seqlens.long()
        counts, num_packed = starts[1:] - starts[:-1], len(tokens_N)
        position_N = torch.arange(num_packed) - torch.repeat_interleave(starts[:-1], counts)
        action_index = mask_N.nonzero()[:, 0]
        if shift and bool((position_N[action_index] == 0).any()):
            raise ValueError("a sequence starts with an action token, which nothing predicts; give it a prompt.")

        ranks = 1 if context_group is None else context_group.size()
        chunks = 2 * ranks if ranks > 1 else 1
        width = -(-max(num_packed, 1) // (chunks * tensor)) * tensor
        mine = [0] if ranks == 1 else [context_group.rank(), chunks - 1 - context_group.rank()]
        rows = torch.cat([torch.arange(c * width, (c + 1) * width) for c in mine])
        here = torch.full((chunks * width,), -1)
        here[rows] = torch.arange(len(rows))
        row = here[action_index - shift]
        return Layout(
            tokens_T=_padded(tokens_N, chunks * width)[rows],
            positions_T=_padded(position_N, chunks * width)[rows],
            segments=[s for i, c in enumerate(mine) for s in _segments(c * width, width, i * width, starts.tolist())],
            action_tokens=tokens_N[action_index][row >= 0],
            action_index=action_index[row >= 0],
            row=row[row >= 0],
            num_packed=num_packed,
            context_group=context_group if ranks > 1 else None,
        )

    def to(self, device) -> "Layout":
        """The same with its tensors on `device`."""
        names = ("tokens_T", "positions_T", "action_tokens", "action_index", "row")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def states(self, hidden_TBH: Tensor) -> Tensor:
        """(A, H) hidden states of the action tokens on this rank."""
        return hidden_TBH.reshape(-1, hidden_TBH.shape[-1])[self.row]

    def packed(self, values_A: Tensor) -> Tensor:
        """(num_packed, ...) tensor with the action tokens' values of all context ranks, 0 elsewhere; differentiable."""
        packed = values_A.new_zeros(self.num_packed, *values_A.shape[1:]).index_put((self.action_index,), values_A)
        return self.total(packed)

    def total(self, x: Tensor) -> Tensor:
        """The sum over context ranks of what each knows of its own tokens; differentiable."""
        return x if self.context_group is None else _SumOverRanks.apply(x, self.context_group)


class _SumOverRanks(torch.autograd.Function):
    """Sum; backward is the identity, because every rank goes on to compute the same loss from the sum."""

    @staticmethod
    def forward(_ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(_ctx, d_x: Tensor):
        return d_x, None


def _padded(x_N: Tensor, length: int) -> Tensor:
    return torch.cat([x_N, x_N.new_zeros(length - len(x_N))])


def _segments(first: int, width: int, at: int, starts: list[int]) -> list[Segment]:
    """Of the chunk [first, first + width) of the stream, which lies at row `at` of this rank."""
    segments = []
    for low, high in zip(starts[:-1], starts[1:], strict=True):
        begin, end = max(low, first), min(high, first + width)
        if begin < end:
            segments.append((at + begin - first, at + end - first, low, end))
    return segments


def deal(
    lengths: Sequence[int], ranks: int, budget: int, *, quadratic: float = 0.0, multiple: int = 1
) -> list[list[list[int]]]:
    """Deal sequences to data-parallel ranks and pack each rank's into micro-batches: indices, by rank and micro-batch.

    A sequence costs length + quadratic * length^2; the costliest goes first, to the rank with the least to do. Then the
    longest first into the first micro-batch that has room for it; one over the budget stands alone.

    budget: tokens of a micro-batch.
    multiple: the number of micro-batches is rounded up to it with empty ones, as interleaved pipelines want it. A rank
        without sequences has empty ones too.
    Source: Graham 1969, doi:10.1137/0117039 (longest processing time first); Johnson 1974, doi:10.1137/0203025 (first
    fit decreasing).
    """
    shares = _lightest_first([length + quadratic * length**2 for length in lengths], ranks)
    return [_filled(_packed([(i, lengths[i]) for i in share], budget), multiple) for share in shares]


def deal_parts(
    lengths: Sequence[int],
    parts: Sequence[Sequence[int]],
    ranks: int,
    budget: int,
    *,
    quadratic: float = 0.0,
    multiple: int = 1,
) -> list[list[list[int]]]:
    """As deal(), but no micro-batch has sequences of two parts, or depends on the number of ranks.

    parts: sequence indices, each in one part.
    """
    micros = []
    for part in parts:
        longest_first = sorted(part, key=lambda i: (-lengths[i], i))
        micros += _packed([(i, lengths[i]) for i in longest_first], budget)
    costs = [sum(lengths[i] + quadratic * lengths[i] ** 2 for i in micro) for micro in micros]
    return [_filled([micros[m] for m in share], multiple) for share in _lightest_first(costs, ranks)]


def _lightest_first(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Indices dealt to ranks: the costliest first, to the rank with the least to do."""
    work, dealt = [0.0] * ranks, [[] for _ in range(ranks)]
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = min(range(ranks), key=lambda r: (work[r], r))
        work[rank] += costs[i]
        dealt[rank].append(i)
    return dealt


def _packed(share: list[tuple[int, int]], budget: int) -> list[list[int]]:
    groups: list[list[int]] = []
    room: list[int] = []
    for i, length in share:
        fits = next((g for g, left in enumerate(room) if length <= left), None)
        if fits is None:
            groups.append([i])
            room.append(budget - length)
        else:
            groups[fits].append(i)
            room[fits] -= length
    return groups


def _filled(groups: list[list[int]], multiple: int) -> list[list[int]]:
    return groups + [[] for _ in range(-len(groups) % multiple if groups else multiple)]
