"""The planner for every pair of layouts, against slices of the whole checkpoint."""

import itertools
import json

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from aligner.models.weights import megatron_entry, window
from aligner.refit.plan import compile_plan
from tests.refit.layouts import PADDING, Megatron, Model, checkpoint, engine_manifest, engine_rank


def assert_refits(m: Model, full: dict, source: Megatron, ranks: int) -> int:
    """Every engine rank holds the truth bit for bit, and every element was written once. Returns the tensors seen."""
    seen = 0
    for rank in range(ranks):
        truth = engine_rank(m, full, ranks, rank)
        storage = {name: torch.full_like(t, torch.nan) for name, t in truth.items()}
        described = engine_manifest(m, full, storage, ranks, rank)
        plan = compile_plan(source.manifest(), described)
        plan.preflight(source, described, storage)
        plan.execute(source, storage)
        times = {name: torch.zeros_like(t, dtype=torch.int32) for name, t in truth.items()}
        for copy in plan.copies:
            window(times[copy.destination], copy.destination_at, copy.size).add_(1)
        for name, want in truth.items():
            padding = want == PADDING
            assert torch.equal(times[name] == 0, padding) and times[name].max() <= 1, name
            assert torch.equal(storage[name][~padding], want[~padding]), name
            assert storage[name][padding].isnan().all(), name
            seen += 1
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_every_layout(kv_heads: int):
    seen = 0
    for tied, extra in itertools.product((True, False), (True, False)):
        m = Model(kv_heads=kv_heads, tied=tied, bias=extra, qk_norm=extra)
        full = checkpoint(m)
        for tp, pp in itertools.product((1, 2, 4, 8), (1, 2, 4)):
            source = Megatron(m, full, tp, pp)
            for ranks in (1, 2, 4, 8):
                seen += assert_refits(m, full, source, ranks)
    assert seen == 12 * 15 * sum(4 * (6 + 3 * e) + 2 + (not t) for t in (0, 1) for e in (0, 1))


@st.composite
def cases(draw):
    kv_heads = draw(st.sampled_from([1, 2, 8]))
    m = Model(
        num_layers=4,
        hidden=draw(st.integers(1, 9)),
        ffn=8 * draw(st.integers(1, 3)),
        heads=8 * draw(st.integers(1, 2)),
        kv_heads=kv_heads,
        head_dim=4 * draw(st.integers(1, 2)),
        vocab=draw(st.integers(1, 40)),
        tied=draw(st.booleans()),
        bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
    )
    tp, pp, ranks = draw(st.sampled_from([1, 2, 4, 8])), draw(st.sampled_from([1, 2, 4])), draw(st.integers(0, 3))
    return m, tp, pp, draw(st.integers(1, 9)), 1 << ranks


@hypothesis.given(cases())
@hypothesis.settings(max_examples=60, deadline=None)
def test_any_sizes(case):
    m, tp, pp, multiple, ranks = case
    full = checkpoint(m)
    assert_refits(m, full, Megatron(m, full, tp, pp, multiple), ranks)


def test_replicas_give_the_same_plan_whichever_comes_first():
    m = Model(tied=True)
    full, storage = checkpoint(m), engine_rank(Model(), checkpoint(m), 1, 0)
    described = engine_manifest(m, full, storage, 1, 0)
    source = Megatron(m, full, 4, 2)
    plan = compile_plan(source.manifest(), described)
    norms = {c.source for c in plan.copies if "norm" in c.source or "word_embeddings" in c.source}
    first_stage = {"0/decoder.layers.0.input_layernorm.weight", "2/embedding.word_embeddings.weight"}
    assert first_stage < norms and not any(n.startswith(("1/decoder", "5/", "6/output_layer")) for n in norms)
    assert plan == compile_plan(json.loads(json.dumps(source.manifest())), json.loads(json.dumps(described)))


def test_a_megatron_shard_of_another_size_is_refused():
    with pytest.raises(ValueError, match="2 ranks of shape"):
        megatron_entry("decoder.layers.0.mlp.linear_fc2.weight", torch.zeros(12, 9), Model(), ranks=2)
    with pytest.raises(ValueError, match="2 ranks of shape"):
        megatron_entry("embedding.word_embeddings.weight", torch.zeros(16, 12), Model(), ranks=2)
    padded = megatron_entry("embedding.word_embeddings.weight", torch.zeros(20, 12), Model(), rank=1, ranks=2)
    assert [(s["tensor"], s["size"][0]) for s in padded["segments"]] == [("model.embed_tokens.weight", 13), (None, 7)]
