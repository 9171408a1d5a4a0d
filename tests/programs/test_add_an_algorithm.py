"""docs/add-an-algorithm.md: the program in it runs as it stands there, and nothing else had to change for it."""

import importlib
import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def program(tmp_path) -> Path:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "add-an-algorithm.md").read_text(), re.DOTALL)
    assert len(blocks) == 1
    file = tmp_path / "dft.py"
    file.write_text(blocks[0])
    return file


def test_it_is_one_short_file_that_the_library_does_not_know(program: Path):
    assert len(program.read_text().splitlines()) <= 65
    for path in [
        *ROOT.glob("aligner/**/*.py"),
        *ROOT.glob("benchmarks/*.py"),
        ROOT / "Makefile",
        ROOT / "pyproject.toml",
    ]:
        assert not re.search(r"\bdft\b|dynamic_loss", path.read_text()), path


def test_it_trains_by_its_equation(program: Path, tiny_llama: Path, tmp_path, monkeypatch):
    rows = [{"prompt": f"film number {i}", "completion": " was a long story" + " again" * (i % 3)} for i in range(8)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.syspath_prepend(str(program.parent))
    main = importlib.import_module("dft").main
    options = {"model": tiny_llama, "data": data, "eval-data": data, "batch.examples": 8, "steps": 2, "threads": 2}
    options |= {"output": tmp_path / "run", "lora.rank": 0, "optimizer.lr": 1e-3, "power": 0.5}
    assert main([str(x) for name, value in options.items() for x in (f"--{name}", value)]) == 0
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]

    model = AutoModelForCausalLM.from_pretrained(tiny_llama).double()
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    loss = weight = tokens = 0.0
    for row in rows:
        prompt, rest = (tokenizer(row[key], add_special_tokens=False)["input_ids"] for key in ("prompt", "completion"))
        ids = torch.tensor([*prompt, *rest, tokenizer.eos_token_id])
        logprobs = model(ids[None]).logits[0].log_softmax(-1)[:-1].gather(1, ids[1:, None])[len(prompt) - 1 :, 0]
        loss -= float((logprobs.exp() ** 0.5 * logprobs).sum())
        weight, tokens = weight + float((logprobs.exp() ** 0.5).sum()), tokens + len(logprobs)
    assert logged[1]["loss"] == pytest.approx(loss / tokens, rel=1e-4)
    assert logged[1]["weight/mean"] == pytest.approx(weight / tokens, rel=1e-4)
    assert logged[2]["eval/loss"] < logged[0]["eval/loss"]
    assert (tmp_path / "run" / "policy" / "model.safetensors").is_file()
