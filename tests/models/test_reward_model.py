"""A reward model is transformers' sequence classifier."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from aligner.checkpoint.huggingface import Weights, write
from aligner.data.batch import pack_last
from aligner.models.lora import LoRAConfig
from aligner.models.network import OptimizerConfig
from aligner.models.reward_model import RewardModel, attributes_of, reward_model_config, reward_model_tensors
from aligner.models.shape import ModelShape
from tests.conftest import TINY, save_model

VOCABULARY = 307
SEQUENCES = [[5, 9, 3], [17, 300, 44, 8, 8, 91, 12], [6], [7, 7, 250, 13]]


@pytest.fixture(autouse=True)
def one_thread():
    """Networks as small as these lose time to a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def classifier(folder: Path, family: str, attributes: int) -> Path:
    """A random one of transformers."""
    torch.manual_seed(1)
    sizes = TINY | {"num_key_value_heads": 2, "max_position_embeddings": 64, "vocab_size": VOCABULARY}
    config = AutoConfig.for_model(family, **sizes, num_labels=attributes, bos_token_id=1, eos_token_id=2)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        model.score.weight.normal_(std=0.3)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def scores(folder: Path) -> torch.Tensor:
    """(sequences, attributes) float64."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).double().eval()
    return torch.cat([model(torch.tensor([ids])).logits for ids in SEQUENCES])


def make(folder: Path, attributes: int, *, trained: bool, rank: int = 0, lr: float | None = None) -> RewardModel:
    shape = ModelShape.from_folder(folder)
    return RewardModel(
        shape,
        Weights(folder, reward_model_tensors(shape, attributes if trained else 0)),
        lora=LoRAConfig(rank=rank),
        optimizer=OptimizerConfig(lr=lr) if lr else None,
        tokens_per_micro_batch=8,
        seed=0,
        attributes=attributes,
        trained=trained,
    )


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("attributes", [1, 2, 5])
def test_scores_are_those_of_transformers(tmp_path, family: str, attributes: int):
    folder = classifier(tmp_path / "m", family, attributes)
    assert attributes_of(folder) == attributes
    batch = pack_last(SEQUENCES)
    scores_NK = make(folder, attributes, trained=True).infer(batch)
    last = batch.cu_seqlens[1:].long() - 1
    wanted = scores(folder)
    assert wanted.abs().max() > 0.1 and wanted.shape == (4, attributes)
    assert torch.allclose(scores_NK[last].double(), wanted, atol=1e-5)
    others = torch.ones(len(batch.tokens_N), dtype=torch.bool).index_fill(0, last, False)
    assert (scores_NK[others] == 0).all()


def test_a_part_s_scores_do_not_depend_on_other_parts(tmp_path):
    """To the last bit, and the parts need not be in order."""
    model = make(classifier(tmp_path / "m", "llama", 1), 1, trained=True)
    batch = pack_last([[1 + (7 * i + j) % 40 for j in range(1 + i % 5)] for i in range(12)])
    parts = [[3, 8, 0, 5], [1], [2, 4, 6, 7, 9], [11, 10]]
    together, ends = model.infer(batch, parts)[:, 0], batch.cu_seqlens[1:].long() - 1
    assert len(set(together[ends].tolist())) == 12
    for part in parts:
        alone = batch.take(part)
        assert torch.equal(model.infer(alone)[alone.cu_seqlens[1:].long() - 1, 0], together[ends[part]])


def test_weights_that_never_change_go_to_the_host_once(tmp_path):
    model, batch = make(classifier(tmp_path / "m", "llama", 1), 1, trained=True), pack_last(SEQUENCES)
    wanted, copies = model.infer(batch), []
    for _ in range(3):
        model.network.offload.leave(weights=True)
        model.network.offload.leave(weights=True)
        copies.append({host.data_ptr() for _, host in model.network.offload._kept})
        assert all(p.untyped_storage().nbytes() == 0 for p in model.network.parameters.values())
        assert torch.equal(model.infer(batch), wanted)
    assert copies[0] and copies[0] == copies[1] == copies[2]


@pytest.mark.parametrize("rank", [0, 4])
def test_what_is_trained_and_written_is_read_by_transformers(tmp_path, rank: int):
    """From a language model, whose head starts at 0, to ratings of three attributes."""
    base = save_model(tmp_path / "base", "llama", vocab_size=VOCABULARY)
    assert attributes_of(base) == 0
    model, batch = make(base, 3, trained=False, rank=rank, lr=6e-3), pack_last(SEQUENCES)
    last = batch.cu_seqlens[1:].long() - 1
    assert (model.infer(batch) == 0).all()
    ratings = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 2.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    ends_in = [ids[-1] for ids in SEQUENCES]  # which of them a micro-batch has

    def loss(scores_NK, micro):
        ends = micro.cu_seqlens[1:].long() - 1
        wanted = torch.stack([ratings[ends_in.index(int(token))] for token in micro.tokens_N[ends]])
        return ((scores_NK[ends] - wanted) ** 2).sum() / 12, {}

    losses = [model.update(batch, loss)["loss"] for _ in range(15)]
    assert losses[0] == pytest.approx(float((ratings**2).mean())) and losses[-1] < losses[0] / 3
    changes = {"config.json": reward_model_config(base, model.shape, 3)}
    write(tmp_path / "out", model.hugging_face(), like=base, changes=changes)
    assert attributes_of(tmp_path / "out") == 3
    found = model.infer(batch)[last].double()
    assert torch.allclose(found, scores(tmp_path / "out"), atol=1e-5) and found.abs().max() > 0.5
    again = make(tmp_path / "out", 3, trained=True).infer(batch)[last].double()
    assert torch.allclose(again, found, atol=1e-5)
