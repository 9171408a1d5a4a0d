"""Causal attention within each sequence of a packed micro-batch, across context-parallel ranks too."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import varlen_attn

from aligner.models.microbatch import Layout, Segment

WASTE = 1.25  # rows of attention on the CPU, padded to the longest of a group, may be this many times the real ones


@dataclass(frozen=True, kw_only=True)
class Group:
    """Segments that run as one batch of n sequences: rows of q, (n * queries,), and of k and v, (n * keys,)."""

    q_rows: Tensor
    k_rows: Tensor
    n: int
    queries: int
    keys: int


@dataclass(frozen=True, kw_only=True)
class Varlen:
    """All segments for one call of the kernel for sequences of different lengths.

    rows: of q, one segment after the other from the first row on. k_rows: (sum of keys,) rows of k and v, by segment.
    cu_q, cu_k: (segments + 1,) int32, prefix sums of their queries and keys.
    """

    rows: int
    k_rows: Tensor
    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int

    @staticmethod
    def of(segments: list[Segment], device) -> "Varlen":
        queries, keys = ([s[i + 1] - s[i] for s in segments] for i in (0, 2))
        prefix = [torch.tensor([0, *counts]).cumsum(0, dtype=torch.int32).to(device) for counts in (queries, keys)]
        return Varlen(
            rows=sum(queries),
            k_rows=torch.cat([torch.arange(s[2], s[3]) for s in segments]).to(device),
            cu_q=prefix[0],
            cu_k=prefix[1],
            max_q=max(queries),
            max_k=max(keys),
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(T, heads, d); a segment's last query is at its last key."""
        k, v = k.index_select(0, self.k_rows), v.index_select(0, self.k_rows)
        options = {"window_size": (-1, 0), "enable_gqa": True}  # each query sees what is up to it
        out = varlen_attn(q[: self.rows], k, v, self.cu_q, self.cu_k, self.max_q, self.max_k, **options)
        return F.pad(out, (0, 0, 0, 0, 0, len(q) - self.rows))


@dataclass(frozen=True, kw_only=True)
class Segments:
    """Which rows attend to which tokens, ready for the attention kernel; made once a micro-batch, read by all layers.

    varlen: where there is that kernel: on GPUs for numbers of 16 bits. Then there are no groups.
    groups: batches, one kernel call each.
    order: (T,) int64, for each row of this rank its row in the groups' results, one after the other; after the last
        stands a row of zeros, for padding.
    context_group: ranks that share the micro-batch; None when it is not shared.
    in_order: there is one group, and its rows are this rank's, none of them padding.
    cos, sin: (T, 1, d / 2) float32, of each row's rotary angles, which the model adds.
    qkv_format: read by Megatron, which passes this object through as its packed_seq_params.
    """

    groups: list[Group]
    order: Tensor
    context_group: dist.ProcessGroup | None
    in_order: bool = False
    varlen: Varlen | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None
    qkv_format: str = "sbhd"

    @staticmethod
    def of(layout: Layout, dtype: torch.dtype = torch.float32) -> "Segments":
        """dtype: of queries, keys and values."""
        segments, rows, device = layout.segments, len(layout.tokens_T), layout.tokens_T.device
        if segments and device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
            varlen, none = Varlen.of(segments, device), torch.zeros(0, dtype=torch.int64, device=device)
            return Segments(groups=[], order=none, context_group=layout.context_group, varlen=varlen)
        groups, order, at = [], torch.full((rows,), -1), 0
        for members in _alike(segments):
            queries, keys = (max(s[i + 1] - s[i] for s in members) for i in (0, 2))
            groups.append(
                Group(
                    q_rows=torch.cat([_rows(s[0], s[1], queries) for s in members]).to(device),
                    k_rows=torch.cat([_rows(s[2], s[3], keys) for s in members]).to(device),
                    n=len(members),
                    queries=queries,
                    keys=keys,
                )
            )
            for q0, q1, _, _ in members:
                order[q0:q1] = torch.arange(at, at + q1 - q0)
                at += queries
        every = torch.arange(rows)
        in_order = len(groups) == 1 and all(
            torch.equal(x.cpu(), every) for x in (groups[0].q_rows, groups[0].k_rows, order)
        )
        order = torch.where(order < 0, at, order).to(device)
        return Segments(groups=groups, order=order, context_group=layout.context_group, in_order=in_order)


def _rows(first: int, last: int, count: int) -> Tensor:
    """first ... last - 1, then as many others as make it `count`: a causal mask hides those from the real ones."""
    return torch.arange(first, first + count).clamp_(max=last - 1)


def _alike(segments: list[Segment]) -> list[list[Segment]]:
    """Whole sequences of similar length together; a part of a sequence, whose keys begin before it, stands alone."""
    groups, rows = [], 0
    for s in sorted(segments, key=lambda s: (s[0] - s[1], s[0])):
        length, whole = s[1] - s[0], s[1] - s[0] == s[3] - s[2]
        head = groups[-1][0] if groups else None
        longest = head[1] - head[0] if head and head[1] - head[0] == head[3] - head[2] else 0
        if whole and longest and longest * (len(groups[-1]) + 1) <= WASTE * (rows + length):
            groups[-1].append(s)
            rows += length
        else:
            groups.append([s])
            rows = length
    return groups


class PackedAttention(MegatronModule):
    """softmax(q k^T / sqrt(d) + mask) v, the mask causal within each sequence; Megatron's extension point for it.

    With context parallelism keys and values of all ranks are gathered, which grouped-query attention makes small.
    Source: Llama Team 2024, arXiv:2407.21783, section 3.3.2.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, **_):
        super().__init__(config=config)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask=None, *, packed_seq_params: Segments, **_
    ) -> Tensor:
        """query: (T, 1, heads, d); key, value: (T, 1, key-value heads, d). Returns (T, 1, heads * d)."""
        s = packed_seq_params
        q, k, v = _Rotate.apply(query[:, 0], s.cos, s.sin), _Rotate.apply(key[:, 0], s.cos, s.sin), value[:, 0]
        if s.context_group is not None:
            k, v = _gather(torch.cat([k, v], dim=-1), s.context_group).chunk(2, dim=-1)
        if s.varlen is not None:
            return s.varlen.attend(q, k, v).flatten(1)[:, None]
        if s.in_order:
            return _attend(q, k, v, s.groups[0]).flatten(1)[:, None]
        results = [_attend(*_picked(q, k, v, g), g) for g in s.groups]
        zero = q.new_zeros(1, *q.shape[1:])
        if not results:  # padding only: the other ranks wait for this one in the backward pass of the gathering too
            zero = zero + 0 * (k.sum() + v.sum())
        return torch.cat([*results, zero]).index_select(0, s.order).flatten(1)[:, None]


class _Rotate(torch.autograd.Function):
    """Rotary embedding of x, (T, heads, d), in the halves that Hugging Face's weights are in; made once a micro-batch,
    cos and sin are read by all layers, where Megatron's own function makes them in each."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor):
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, d_y: Tensor):
        return _rotated(d_y, *ctx.saved_tensors, -1), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """By the angle, or with sign -1 back."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    (x1, x2), (y1, y2) = x.chunk(2, dim=-1), y.chunk(2, dim=-1)
    torch.mul(x1, cos, out=y1).addcmul_(x2, sin, value=-sign)
    torch.mul(x2, cos, out=y2).addcmul_(x1, sin, value=sign)
    return y


def _picked(q: Tensor, k: Tensor, v: Tensor, g: Group) -> tuple[Tensor, Tensor, Tensor]:
    return q.index_select(0, g.q_rows), k.index_select(0, g.k_rows), v.index_select(0, g.k_rows)


def _attend(q: Tensor, k: Tensor, v: Tensor, g: Group) -> Tensor:
    """The group's rows of q, k and v -> its rows of the result, (rows, heads, d)."""
    q, k, v = (x.unflatten(0, (g.n, -1)).transpose(1, 2) for x in (q, k, v))
    whole = g.queries == g.keys
    mask = None if whole else causal_lower_right(g.queries, g.keys)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=whole, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1)


def _gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The stream's rows in order, from each rank's two chunks (models.microbatch)."""
    x = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=group)
    x = x.unflatten(0, (group.size(), 2, -1))
    return torch.cat([x[:, 0], x[:, 1].flip(0)]).flatten(0, 1)
