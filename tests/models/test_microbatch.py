"""Dealing sequences to ranks, cutting micro-batches for context parallelism, attention within sequences."""

from dataclasses import dataclass, replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aligner.data.batch import SupervisedBatch
from aligner.models import attention as attention_module
from aligner.models.attention import PackedAttention, Segments, Varlen
from aligner.models.microbatch import Layout, deal, deal_parts


@dataclass
class Group:
    """Stands for a process group where nothing is sent."""

    ranks: int
    own: int

    def size(self) -> int:
        return self.ranks

    def rank(self) -> int:
        return self.own


def batch_of(lengths: list[int], seed: int = 0) -> SupervisedBatch:
    g = torch.Generator().manual_seed(seed)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    mask_N = torch.rand(sum(lengths), generator=g) < 0.6
    mask_N[cu_seqlens[:-1]] = False
    tokens_N = torch.randint(1, 99, (sum(lengths),), generator=g)
    return SupervisedBatch(tokens_N=tokens_N, cu_seqlens=cu_seqlens.int(), action_mask_N=mask_N)


LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40)


@settings(deadline=None, max_examples=60)
@given(LENGTHS, st.integers(1, 5), st.integers(1, 90), st.integers(1, 3))
def test_deal_is_complete_within_budget_and_balanced(lengths, ranks, budget, multiple):
    dealt = deal(lengths, ranks, budget, multiple=multiple)
    assert sorted(i for share in dealt for group in share for i in group) == list(range(len(lengths)))
    for share in dealt:
        assert share and len(share) % multiple == 0
        for group in share:
            assert len(group) <= 1 or sum(lengths[i] for i in group) <= budget
        full = [sum(lengths[i] for i in group) for group in share if group]
        assert sum(a + b <= budget for a, b in zip(full, full[1:], strict=False)) == 0  # no two would fit together
    loads = [sum(lengths[i] for group in share for i in group) for share in dealt]
    assert max(loads) <= sum(loads) / ranks + (1 - 1 / ranks) * max(lengths)  # Graham's bound


@settings(deadline=None, max_examples=60)
@given(
    st.lists(LENGTHS, min_size=1, max_size=6), st.integers(1, 5), st.integers(1, 90), st.integers(1, 3), st.randoms()
)
def test_parts_have_micro_batches_of_their_own_on_any_number_of_ranks(parts, ranks, budget, multiple, draw):
    """They are those that each part has alone; a part's indices come in any order."""
    lengths = [length for part in parts for length in part]
    order = iter(draw.sample(range(len(lengths)), len(lengths)))
    parts = [[next(order) for _ in part] for part in parts]
    dealt = deal_parts(lengths, parts, ranks, budget, multiple=multiple)
    micros = [micro for share in dealt for micro in share if micro]
    alone = [micro for part in parts for micro in deal_parts(lengths, [part], 1, budget)[0]]
    assert sorted(micros) == sorted(alone)
    for part in parts:
        packed = deal([lengths[i] for i in sorted(part)], 1, budget)[0]  # as without other parts
        assert sorted([sorted(part)[i] for i in micro] for micro in packed) == sorted(
            micro for micro in micros if micro[0] in part
        )
    assert all(share and len(share) % multiple == 0 for share in dealt)
    loads, costs = (
        [sum(lengths[i] for m in ms for i in m) for ms in dealt],
        [sum(lengths[i] for i in m) for m in alone],
    )
    assert max(loads) <= sum(loads) / ranks + (1 - 1 / ranks) * max(costs)  # Graham's bound


def test_long_sequences_cost_more_than_their_tokens():
    assert [sorted(len(g) for g in share) for share in deal([8, 2, 2, 2, 2], 2, 99)] == [[1], [4]]
    assert deal([8, 4, 4, 4, 4], 2, 99, quadratic=1.0) == [[[0]], [[1, 2, 3, 4]]]  # 72 against 4 x 20


@settings(deadline=None, max_examples=60)
@given(LENGTHS, st.integers(1, 4), st.integers(1, 3), st.sampled_from([0, 1]))
def test_every_token_is_on_one_rank_and_sees_its_own_prefix(lengths, ranks, tensor, shift):
    batch = batch_of(lengths)
    n, starts = sum(lengths), batch.cu_seqlens.tolist()
    sequence = [b for b, length in enumerate(lengths) for _ in range(length)]
    layouts = [Layout.of(batch, context_group=Group(ranks, r), tensor=tensor, shift=shift) for r in range(ranks)]
    rows = len(layouts[0].tokens_T)
    assert rows % tensor == 0 and rows * ranks < n + 2 * ranks * tensor
    computed, read = [], []
    for layout in layouts:
        assert len(layout.tokens_T) == rows
        stream = {}  # row -> token of the stream
        for q0, q1, k0, k1 in layout.segments:
            for row in range(q0, q1):
                stream[row] = k1 - (q1 - row)
                assert starts[sequence[stream[row]]] == k0
        computed += stream.values()
        for row, token in stream.items():
            assert layout.tokens_T[row] == batch.tokens_N[token]
            assert layout.positions_T[row] == token - starts[sequence[token]]
        assert all(layout.tokens_T[row] == 0 for row in range(rows) if row not in stream)
        for token, index, row in zip(layout.action_tokens, layout.action_index, layout.row, strict=True):
            assert token == batch.tokens_N[index] and stream[int(row)] == index - shift
        read += layout.action_index.tolist()
    assert sorted(computed) == list(range(n))
    assert sorted(read) == batch.action_mask_N.nonzero()[:, 0].tolist()


def test_context_ranks_share_the_causal_triangle():
    work = [int(Layout.of(batch_of([512]), context_group=Group(4, r)).positions_T.sum()) for r in range(4)]
    assert max(work) == min(work) == 512 * 511 // 2 // 4


def test_a_micro_batch_of_padding():
    layout = Layout.of(None, context_group=Group(2, 1), tensor=2)
    assert layout.tokens_T.tolist() == [0] * 4 and layout.segments == [] and layout.num_packed == 0


def test_an_action_without_a_prompt_is_refused():
    batch = batch_of([3, 2])
    batch.action_mask_N[3] = True
    with pytest.raises(ValueError, match="starts with an action token"):
        Layout.of(batch)
    Layout.of(batch, shift=0)  # a score is read after the token


def dense(q, k, v, mask):
    """softmax over all tokens, in float64; q: (n, heads, d), k and v with as many heads or fewer."""
    q, k, v = (x.double().transpose(0, 1).repeat_interleave(q.shape[1] // x.shape[1], 0) for x in (q, k, v))
    scores = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1)


def fake_varlen(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size, enable_gqa):
    """The kernel's documented meaning: by sequence, the last query at the last key, nothing of what comes after."""
    assert window_size == (-1, 0) and enable_gqa and q.shape[0] == cu_q[-1] and k.shape[0] == cu_k[-1]
    parts = []
    for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False):
        assert b - a <= max_q and d - c <= max_k
        mask = torch.arange(d - c)[None] <= torch.arange(b - a)[:, None] + (d - c) - (b - a)
        parts.append(dense(q[a:b], k[c:d], v[c:d], mask).to(q.dtype))
    return torch.cat(parts)


SHORT = st.lists(st.integers(1, 17), min_size=1, max_size=9)


@pytest.mark.parametrize("kernel", ["sdpa", "varlen"])
@settings(deadline=None, max_examples=30)
@given(SHORT, st.integers(1, 3), st.sampled_from([(4, 4), (4, 2), (3, 1)]))
def test_packed_attention_equals_masked_softmax(kernel, lengths, ranks, heads):
    """On every context rank, its keys and values as they are once gathered, with gradients."""
    n, (queries, keys), d = sum(lengths), heads, 8
    batch, g = batch_of(lengths), torch.Generator().manual_seed(1)
    layouts = [Layout.of(batch, context_group=Group(ranks, r)) for r in range(ranks)]
    stream = ranks * len(layouts[0].tokens_T)
    k, v = (torch.randn(stream, 1, keys, d, generator=g, requires_grad=True) for _ in range(2))
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = (sequence[:, None] == sequence[None]) & (torch.arange(n)[:, None] >= torch.arange(n)[None])
    attention = PackedAttention.__new__(PackedAttention)
    for layout in layouts:
        q = torch.randn(len(layout.tokens_T), 1, queries, d, generator=g, requires_grad=True)
        rows = [(row, k1 - (q1 - row)) for q0, q1, _, k1 in layout.segments for row in range(q0, q1)]
        mine, tokens = torch.tensor(rows, dtype=torch.int64).reshape(-1, 2).unbind(1)
        still = {"cos": torch.ones(1, 1, d // 2), "sin": torch.zeros(1, 1, d // 2)}  # nothing is rotated
        segments = replace(Segments.of(layout), context_group=None, **still)
        if kernel == "varlen" and rows:
            segments = replace(segments, groups=[], varlen=Varlen.of(layout.segments, "cpu"))
        with mock.patch.object(attention_module, "varlen_attn", fake_varlen):
            out = attention.forward(q, k, v, packed_seq_params=segments)
        want = torch.zeros(len(q), queries, d, dtype=torch.float64)
        want = want.index_put((mine,), dense(q[mine, 0], k[:n, 0], v[:n, 0], mask[tokens]))
        assert out.shape == (len(q), 1, queries * d)
        torch.testing.assert_close(out[:, 0].double(), want.flatten(1), rtol=1e-5, atol=1e-5)
        weights = torch.randn(out.shape, generator=g)
        inputs = (q, k, v)
        got = torch.autograd.grad((out * weights).sum(), inputs, allow_unused=True)
        exact = torch.autograd.grad((want.flatten(1) * weights[:, 0]).sum(), inputs, allow_unused=True)
        for x, a, b in zip(inputs, got, exact, strict=True):
            a, b = (torch.zeros_like(x) if grad is None else grad for grad in (a, b))
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
