"""Model directories: shards, an index that transformers reads, and nothing half-written."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from aligner.checkpoint import huggingface
from aligner.checkpoint.huggingface import Weights
from aligner.models.shape import ModelShape
from tests.conftest import save_llama


@pytest.fixture
def model(tmp_path):
    folder = save_llama(tmp_path / "model", None, vocab_size=97, tie_word_embeddings=False)
    return folder, ModelShape.from_folder(folder)


@pytest.mark.parametrize("limit", [1, 40_000, 10**9])
def test_written_model_loads_in_transformers(model, tmp_path, monkeypatch, limit: int):
    folder, shape = model
    read = Weights(folder, shape.tensors())
    monkeypatch.setattr(huggingface, "_MAX_SHARD_BYTES", limit)
    huggingface.write(tmp_path / "copy", ((name, read(name) * 2) for name in shape.tensors()), like=folder)
    files = sorted(f.name for f in (tmp_path / "copy").glob("*.safetensors"))
    assert len(files) == (1 if limit == 10**9 else int(files[-1].rsplit("-", 1)[1].removesuffix(".safetensors")))
    copy, original = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (tmp_path / "copy", folder))
    assert copy.keys() == original.keys() and all(torch.equal(copy[k], 2 * original[k]) for k in copy)
    again = Weights(tmp_path / "copy", shape.tensors())
    assert torch.equal(again("model.norm.weight"), 2 * read("model.norm.weight"))


def test_a_failed_write_leaves_the_old_model(model, tmp_path):
    folder, shape = model
    read = Weights(folder, shape.tensors())

    def broken():
        yield "model.norm.weight", read("model.norm.weight")
        raise OSError("disk gone")

    huggingface.write(tmp_path / "copy", ((n, read(n)) for n in shape.tensors()), like=folder)
    with pytest.raises(OSError, match="disk gone"):
        huggingface.write(tmp_path / "copy", broken(), like=folder)
    assert torch.equal(Weights(tmp_path / "copy", shape.tensors())("model.norm.weight"), read("model.norm.weight"))
    assert [f.name for f in tmp_path.iterdir() if f.name.startswith(".")] == []


def test_incomplete_folders_are_named(model, tmp_path):
    folder, shape = model
    with pytest.raises(ValueError, match=r"has no \*.safetensors"):
        Weights(tmp_path, shape.tensors())
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        Weights(folder, shape.tensors())
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="has no config.json"):
        ModelShape.from_folder(folder)


def test_old_and_new_spelling_of_rope_theta(model):
    folder, shape = model
    config = json.loads((folder / "config.json").read_text())
    assert shape.rope.theta == config.pop("rope_parameters")["rope_theta"]
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 123.0, "rope_scaling": None}))
    assert ModelShape.from_folder(folder).rope.theta == 123.0
