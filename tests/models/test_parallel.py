"""Which layouts are refused, and what --dry-run says."""

import dataclasses

import pytest
import torch

from aligner import ppo
from aligner.job.job import Job
from aligner.models.lora import LoRAConfig
from aligner.models.parallel import NetworkPlan, check, describe
from aligner.models.rope import Rope
from aligner.models.shape import ModelShape
from aligner.run.distributed import ParallelConfig

SHAPE = ModelShape(
    num_layers=12, hidden=48, ffn=96, heads=8, kv_heads=4, head_dim=6, vocab=100, context=64, norm_eps=1e-5, tied=True,
    rope=Rope(theta=1e4),
)  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"tensor": 3}, r"tensor is 3, which does not divide the 8 attention heads of it; expected one of 1, 2, 4\."),
        ({"tensor": 8}, r"tensor is 8, which does not divide the 4 key-value heads of it"),
        ({"pipeline": 5}, r"pipeline 5 makes 5 stages, .* the 12 layers of it; .* 1, 2, 3, 4, 6, 12"),
        ({"pipeline": 4, "virtual_pipeline": 2}, r"pipeline 4 x parallel.virtual-pipeline 2 makes 8 stages"),
    ],
)
def test_what_a_model_cannot_be_dealt_to(layout: dict, message: str):
    with pytest.raises(ValueError, match=message):
        check(ParallelConfig(**layout), SHAPE, "it")


def test_a_vocabulary_that_ranks_cannot_share():
    with pytest.raises(ValueError, match="does not divide the 101 vocabulary entries"):
        check(ParallelConfig(tensor=2), dataclasses.replace(SHAPE, vocab=101))


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"tensor": 0}, "must be 1 or more"),
        ({"sequence": True}, "sequence splits tokens over tensor ranks"),
        ({"virtual_pipeline": 2}, "virtual-pipeline needs --parallel.pipeline 2"),
    ],
)
def test_options_that_contradict_each_other(layout: dict, message: str):
    with pytest.raises(ValueError, match=message):
        ParallelConfig(**layout)


def test_world_sizes():
    layout = ParallelConfig(tensor=2, context=2, pipeline=3)
    assert [layout.data(n) for n in (12, 24)] == [1, 2]
    with pytest.raises(ValueError, match=r"18 processes .* 3 pipeline = 12 ranks; start a multiple of 12"):
        layout.data(18)


def test_description_of_a_layout():
    layout = ParallelConfig(tensor=2, pipeline=2, virtual_pipeline=3, distributed_optimizer=True)
    plans = [
        NetworkPlan(name="policy", shape=SHAPE, lora=LoRAConfig(rank=0)),
        NetworkPlan(name="critic", shape=SHAPE, lora=LoRAConfig(rank=4), value_head=SHAPE.hidden + 1),
    ]
    text = describe(layout, plans, 12, torch.bfloat16)
    assert "12 processes: 2 tensor x 1 context x 3 data x 2 pipeline" in text
    assert "stage 0: ranks 0-5\n  policy: embedding, layers 0-1, 4-5, 8-9\n" in text
    assert "stage 1: ranks 6-11\n  policy: layers 2-3, 6-7, 10-11, output layer\n" in text
    assert "critic: layers 2-3, 6-7, 10-11, value head" in text
    assert text.endswith("asks for rewards: 0, 2, 4")
    # Six layers of half the matrices, two norms of 48 each, half the embedding; 2 bytes, then 4, then 12 over 3 ranks.
    entries = 6 * ((48 * 48 * 2 + 48 * 24 * 2 + 3 * 48 * 96) // 2 + 2 * 48) + 100 * 48 // 2
    sizes = [f"{n * entries / 1e6:.2f} MB" for n in (2, 4, 4)]
    assert "weights {}, gradients {}, optimizer {} a rank".format(*sizes) in text


def test_dry_run_loads_nothing(monkeypatch, capsys, smollm2):
    monkeypatch.setenv("WORLD_SIZE", "6")
    monkeypatch.setattr(Job, "begin", lambda *_: pytest.fail("it loads"))
    assert ppo.main(["--dry-run", "--parallel.tensor", "3", "--parallel.pipeline", "2"]) == 0
    printed = capsys.readouterr().out
    assert "pipeline stage 1: ranks 3-5" in printed and "policy: layers 15-29, output layer" in printed
    with pytest.raises(ValueError, match="9 attention heads of the model; expected one of 1, 3"):
        ppo.main(["--dry-run", "--parallel.tensor", "2"])
