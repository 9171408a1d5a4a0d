"""Packed batches for tests of losses, and what all of those owe: micro-batches that add up."""

from types import SimpleNamespace

import torch
from torch import Tensor

LENGTHS = [(2, 3), (1, 1), (3, 4), (2, 2), (1, 5), (2, 1)]  # prompt and response of each sequence


def packed(lengths=LENGTHS, **fields) -> SimpleNamespace:
    """A batch whose action tokens are the responses; fields as given."""
    mask = torch.cat([torch.tensor([False] * p + [True] * r) for p, r in lengths])
    starts = torch.tensor([0, *(p + r for p, r in lengths)]).cumsum(0, dtype=torch.int32)
    return SimpleNamespace(cu_seqlens=starts, action_mask_N=mask, **fields)


def responses(batch) -> list[list[int]]:
    """Indices of each sequence's action tokens."""
    starts = batch.cu_seqlens.tolist()
    spans = zip(starts[:-1], starts[1:], strict=True)
    return [[t for t in range(a, b) if batch.action_mask_N[t]] for a, b in spans]


def tokens_of(batch, sequences) -> Tensor:
    starts = getattr(batch, "rollout", batch).cu_seqlens.tolist()
    return torch.cat([torch.arange(starts[b], starts[b + 1]) for b in sequences])


def take(batch, sequences) -> SimpleNamespace:
    """The batch restricted to some sequences."""
    index_N, found = tokens_of(batch, sequences), {}
    for name, x in vars(batch).items():
        if name == "rollout":
            found[name] = take(x, sequences)
        elif name == "cu_seqlens":
            counts = torch.tensor([0, *((x[1:] - x[:-1])[b] for b in sequences)])
            found[name] = counts.cumsum(0, dtype=torch.int32)
        else:
            found[name] = x if x is None else x[index_N] if name.endswith("_N") else x[list(sequences)]
    return SimpleNamespace(**found)


def to(batch, dtype: torch.dtype) -> SimpleNamespace:
    """The batch with its floating-point tensors in `dtype`."""
    found = {}
    for name, x in vars(batch).items():
        floating = isinstance(x, Tensor) and x.is_floating_point()
        found[name] = to(x, dtype) if name == "rollout" else x.to(dtype) if floating else x
    return SimpleNamespace(**found)


def gradients(loss, tensors, batch) -> tuple[Tensor, dict, list[Tensor]]:
    """Loss, statistics, and gradients of the tensors."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    value, stats = loss(*leaves, batch)
    assert all(not x.requires_grad for x in stats.values())
    found = torch.autograd.grad(value, leaves, allow_unused=True)
    return value.detach(), stats, [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


def assert_adds_up(loss, tensors, batch, parts) -> None:
    """The losses, statistics and gradients of micro-batches sum to those of the whole step."""
    value, stats, whole = gradients(loss, tensors, batch)
    total, sums, pieces = 0, dict.fromkeys(stats, 0), [torch.zeros_like(x) for x in tensors]
    for part in parts:
        index_N = tokens_of(batch, part)
        part_value, part_stats, part_gradients = gradients(loss, [x[index_N] for x in tensors], take(batch, part))
        total = total + part_value
        sums = {name: sums[name] + part_stats[name] for name in stats}
        for piece, gradient in zip(pieces, part_gradients, strict=True):
            piece[index_N] = gradient
    assert torch.allclose(total, value, rtol=1e-5, atol=1e-6)
    for name in stats:
        assert torch.allclose(sums[name], stats[name], rtol=1e-5, atol=1e-6), name
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(pieces, whole, strict=True))
