"""What a refit would move, told from the model's shape alone, against shards, a network and engines that exist."""

import re
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from aligner.models.lora import LoRAConfig
from aligner.models.network import Network
from aligner.models.rope import Rope
from aligner.models.shape import ModelShape
from aligner.models.weights import join, megatron_entry
from aligner.refit.plan import compile_plan
from aligner.refit.predict import describe, engine_manifest, given, trainer_manifests
from aligner.refit.trtllm_layout import survey
from tests.refit import standin
from tests.refit.layouts import Model, Whole, checkpoint, megatron_rank
from tests.refit.test_extension import shape_of

DTYPES = {"source_dtype": torch.float32, "dtype": torch.bfloat16}


@st.composite
def models(draw):
    """(model, the trainer's tensor ranks, among them more than there are key-value heads)"""
    kinds = {name: draw(st.booleans()) for name in ("tied", "bias", "qk_norm")}
    tp, kv_heads = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2, 4]))
    sizes = {"hidden": draw(st.integers(1, 9)), "ffn": 8, "heads": 4, "kv_heads": kv_heads, "head_dim": 4}
    return Model(num_layers=4, vocab=tp * draw(st.integers(1, 9)), **sizes, **kinds), tp


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(models(), st.sampled_from([1, 2, 4]))
def test_trainer_manifests_are_those_of_shards(drawn, pp: int):
    m, tp = drawn
    found, full = trainer_manifests(shape_of(m), tensor=tp, pipeline=pp, dtype=torch.float32), checkpoint(m)
    assert len(found) == tp * pp
    for rank, mine in enumerate(found):
        first, wanted = rank // tp * (m.num_layers // pp), {}
        for name, t in megatron_rank(m, full, tp, pp, rank % tp, rank // tp, 1).items():
            item = megatron_entry(name, t, m, rank=rank % tp, ranks=tp, first_layer=first)
            # A stage of the trainer counts its layers over the whole network.
            item["name"] = re.sub(r"(?<=layers\.)\d+", lambda i, first=first: str(int(i[0]) + first), name)
            wanted[item["name"]] = item
        assert {item["name"]: item for item in mine["tensors"]} == wanted and len(mine["tensors"]) == len(wanted)
        assert mine["model"] == {name: list(t.shape) for name, t in full.items()}


@pytest.mark.parametrize("kinds", [{}, {"tied": False}, {"bias": True}, {"tied": False, "qk_norm": True}])
def test_a_network_publishes_the_same_manifest(kinds: dict):
    """Down to the order of its parameters, so that the plans have the digests that were predicted."""
    m = Model(**kinds)
    network = Network(
        shape_of(m),
        Whole(checkpoint(m)),
        adapters=LoRAConfig(rank=0),
        optimizer=None,
        tokens_per_micro_batch=64,
        seed=0,
    )
    assert [network.manifest] == trainer_manifests(shape_of(m), tensor=1, pipeline=1, dtype=torch.float32)


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(models(), st.sampled_from([1, 2, 4]), st.sampled_from([torch.float32, torch.bfloat16]))
def test_engine_manifests_are_those_of_a_survey(drawn, ranks: int, dtype: torch.dtype):
    m, _ = drawn
    hypothesis.assume(not (m.bias and ranks > m.kv_heads))  # which check_shape() refuses
    s = shape_of(m)
    for rank in range(ranks):
        surveyed = survey(standin.build(s, ranks).to(dtype), s, rank=rank, ranks=ranks)
        assert engine_manifest(s, rank=rank, ranks=ranks, dtype=dtype) == surveyed.manifest


@hypothesis.settings(deadline=None, max_examples=30)
@hypothesis.given(models(), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]))
def test_bytes_are_those_that_the_engine_needs_once(drawn, pp: int, ranks: int):
    m, tp = drawn
    hypothesis.assume(not (m.bias and ranks > m.kv_heads))
    s = shape_of(m)
    source = join(trainer_manifests(s, tensor=tp, pipeline=pp, dtype=torch.float32))
    for rank in range(ranks):
        manifest = engine_manifest(s, rank=rank, ranks=ranks, dtype=torch.bfloat16)
        boxes = [g["size"] for item in manifest["tensors"] for g in item["segments"] if g["tensor"]]
        gifts = given(compile_plan(source, manifest))
        assert sum(gifts.values()) == 4 * sum(torch.Size(size).numel() for size in boxes)
        assert set(gifts) <= set(range(tp * pp))


LARGE = ModelShape(
    num_layers=80,
    hidden=8192,
    ffn=28672,
    heads=64,
    kv_heads=8,
    head_dim=128,
    vocab=128256,
    context=8192,
    norm_eps=1e-5,
    tied=False,
    rope=Rope(),
)


def test_description_of_a_large_model():
    """Predicted seconds are bytes over rates; copies and bytes are those of plans compiled here."""
    said = describe(LARGE, tensor=8, pipeline=4, ranks=8, **DTYPES, network_gb_s=25.0).splitlines()
    source = join(trainer_manifests(LARGE, tensor=8, pipeline=4, dtype=torch.float32))
    plans = [
        compile_plan(source, engine_manifest(LARGE, rank=rank, ranks=8, dtype=torch.bfloat16)) for rank in range(8)
    ]
    gifts = [given(plan) for plan in plans]
    received = {sum(gift.values()) for gift in gifts}
    assert len(received) == 1 and {len(plan.copies) for plan in plans} == {723}
    size, gives = received.pop(), [sum(gift.get(rank, 0) for gift in gifts) for rank in range(32)]
    peers = sorted(len(gift) for gift in gifts)
    assert said[0].startswith("refit from 8 tensor x 4 pipeline ranks, float32, into an engine of 8 tensor ranks, bf")
    assert said[1] == (
        f"each engine rank: 723 copies, receives {size / 1e9:.2f} GB from {peers[0]} to {peers[-1]} trainer ranks"
    )
    assert said[2] == (
        f"  predicted, not measured: {size / 400e9:.3g} s within a node at 400 GB/s, "
        f"{size / 25e9:.3g} s over the network at 25 GB/s"
    )
    whole = 4 * sum(torch.Size(shape).numel() for shape in LARGE.tensors().values())
    assert said[3] == f"  whole tensors instead: {whole / 1e9:.2f} GB, {whole / size:.2f} times as much"
    assert said[4] == f"each trainer rank: gives {min(gives) / 1e9:.2f} GB to {max(gives) / 1e9:.2f} GB"
    assert said[5].startswith(f"  the busiest, rank {gives.index(max(gives))}, predicted, not measured: ")
    assert f"{max(gives) / 25e9:.3g} s over the network" in said[5]
    assert re.fullmatch(r"each plan: compiled in \S+ s( to \S+ s)?, table of copies 46\.3 kB", said[6])
    assert said[7] == "plans of ranks 0 to 7: " + ", ".join(plan.digest[:12] for plan in plans) and len(said) == 8


def test_what_differs_between_ranks_is_a_span():
    """The last rank of four has no row of a vocabulary of 5, but padding."""
    s = shape_of(Model(vocab=5, tied=False, heads=8, kv_heads=2))
    said = describe(s, tensor=1, pipeline=2, ranks=4, **DTYPES)
    assert re.search(
        r"^each engine rank: \d+ to \d+ copies, receives \S+ kB to \S+ kB from 2 trainer ranks$", said, re.M
    )


def test_impossible_layouts():
    s = shape_of(Model(bias=True))
    for wrong in ({"tensor": 0}, {"pipeline": -1}, {"ranks": 0}, {"node_gb_s": 0.0}, {"network_gb_s": -1.0}):
        with pytest.raises(ValueError, match="expected all above 0"):
            describe(s, **{"tensor": 1, "pipeline": 1, "ranks": 1} | wrong, **DTYPES)
    with pytest.raises(ValueError, match="16 columns of the MLP .* 3 ranks; 2 key-value heads and 3 ranks"):
        describe(s, tensor=1, pipeline=1, ranks=3, **DTYPES)
    with pytest.raises(ValueError, match="a bias of 2 key-value heads on 4 ranks"):
        describe(s, tensor=1, pipeline=1, ranks=4, **DTYPES)
    with pytest.raises(ValueError, match=r"word_embeddings.weight: 2 ranks of shape \[16, 12\] do not share 1 x 33"):
        describe(s, tensor=2, pipeline=1, ranks=1, **DTYPES)


def test_megatron_is_not_imported():
    code = "import sys, aligner.refit.predict; assert 'megatron' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
