"""Model directories: shards, an index that transformers reads, and nothing half-written."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
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
def test_written_model_loads_in_transformers(model, tmp_path, limit: int):
    folder, shape = model
    read = Weights(folder, shape.tensors())
    doubled = ((name, read(name) * 2) for name in shape.tensors())
    huggingface.write(tmp_path / "copy", doubled, like=folder, max_shard_bytes=limit)
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


def rewrite(folder, **tensors) -> None:
    """Add tensors to the model's file; None takes one out."""
    held = load_file(folder / "model.safetensors") | tensors
    save_file({n: t for n, t in held.items() if t is not None}, folder / "model.safetensors", metadata={"format": "pt"})


def test_an_index_must_be_true(model, tmp_path):
    folder, shape = model
    read = Weights(folder, shape.tensors())
    huggingface.write(tmp_path / "m", ((n, read(n)) for n in shape.tensors()), like=folder, max_shard_bytes=40_000)
    index = tmp_path / "m" / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    assert Weights(tmp_path / "m", shape.tensors())("lm_head.weight").shape == (97, 64)

    (tmp_path / "m" / "notes.safetensors").write_bytes(b"not of the model")
    Weights(tmp_path / "m", shape.tensors())
    listed = document["weight_map"] | {"model.extra.weight": document["weight_map"]["lm_head.weight"]}
    index.write_text(json.dumps(document | {"weight_map": listed}))
    with pytest.raises(ValueError, match=r"index.json: 1 tensors that it lists .* 'model.extra.weight'; copy"):
        Weights(tmp_path / "m", shape.tensors())
    index.write_text(json.dumps(document))
    files = sorted(set(document["weight_map"].values()))
    for number, names in ((1, rf"{files[0]}; copy"), (4, rf"{', '.join(files[:3])}, \.\.\.; copy")):
        for file in files[:number]:
            (tmp_path / "m" / file).unlink(missing_ok=True)
        with pytest.raises(ValueError, match=rf"index.json: {number} of its {len(files)} files are not there, {names}"):
            Weights(tmp_path / "m", shape.tensors())
    for text, message in (
        ("{", "not valid JSON"),
        ("[]", "got a list at the top"),
        ('{"weight_map": 3}', "no weight_"),
    ):
        index.write_text(text)
        with pytest.raises(ValueError, match=f"index.json: .*{message}"):
            Weights(tmp_path / "m", shape.tensors())


def test_tensors_of_another_network_are_refused(model):
    folder, shape = model
    rotary, bias = torch.zeros(8), {f"model.layers.{i}.self_attn.q_proj.bias": torch.zeros(64) for i in range(3)}
    rewrite(folder, **{"model.layers.0.self_attn.rotary_emb.inv_freq": rotary})
    Weights(folder, shape.tensors())
    tied = {name: size for name, size in shape.tensors().items() if name != "lm_head.weight"}
    Weights(folder, tied)  # the file holds the embedding twice
    rewrite(folder, **bias)
    with pytest.raises(
        ValueError, match=r": 3 tensors are not of .*0.*q_proj.bias, .*1.*bias, .*2.*bias; give the conf"
    ):
        Weights(folder, shape.tensors())
    rewrite(folder, score=rotary)
    with pytest.raises(ValueError, match=r": 4 tensors are not of .*, \.\.\.; give"):
        Weights(folder, shape.tensors())
    rewrite(folder, **dict.fromkeys([*bias, "score"]), **{"model.norm.weight": rotary})
    with pytest.raises(ValueError, match=r"'model.norm.weight' has shape \(8,\), expected \(64,\)"):
        Weights(folder, shape.tensors())
    rewrite(folder, **{"model.norm.weight": None, "lm_head.weight": None})
    with pytest.raises(ValueError, match="2 tensors of its config.json are missing, the first is 'model.norm.weight'"):
        Weights(folder, shape.tensors())


def test_a_window_is_a_box_of_the_tensor(model):
    folder, shape = model
    read, rows = Weights(folder, shape.tensors()), load_file(folder / "model.safetensors")["lm_head.weight"]
    assert torch.equal(read.window("lm_head.weight", [5, 8], [90, 16]), rows[5:95, 8:24])
    assert torch.equal(read.window("model.norm.weight", [3], [2]), read("model.norm.weight")[3:5])
    save_file(
        {n: t.bfloat16() for n, t in load_file(folder / "model.safetensors").items()}, folder / "half.safetensors"
    )
    (folder / "half.safetensors").rename(folder / "model.safetensors")
    half = Weights(folder, shape.tensors()).window("lm_head.weight", [5, 8], [90, 16])
    assert half.dtype == torch.float32 and torch.equal(half, rows[5:95, 8:24].bfloat16().float())


def test_the_copied_config_says_the_dtype_and_no_other_weights_come_along(model, tmp_path):
    folder, shape = model
    read, config = Weights(folder, shape.tensors()), json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    huggingface.write(tmp_path / "copy", ((n, read(n).bfloat16()) for n in shape.tensors()), like=folder)
    files = {file.name for file in (tmp_path / "copy").iterdir()}
    assert files == {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors"}
    assert json.loads((tmp_path / "copy" / "config.json").read_text()) == config | {"dtype": "bfloat16"}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "copy", dtype="auto").dtype == torch.bfloat16


def test_old_and_new_spelling_of_rope_theta(model):
    folder, shape = model
    config = json.loads((folder / "config.json").read_text())
    assert shape.rope.theta == config.pop("rope_parameters")["rope_theta"]
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 123.0, "rope_scaling": None}))
    assert ModelShape.from_folder(folder).rope.theta == 123.0
