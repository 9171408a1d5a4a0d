"""Model directories in another dtype and in other files."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from aligner import convert
from tests.conftest import save_model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_transformers_loads_what_is_written(tmp_path, capsys, tiny_llama: Path, dtype: str):
    out, kind = tmp_path / "out", getattr(torch, dtype)
    out.mkdir()  # empty, so it may be there
    assert convert.main(["--model", str(tiny_llama), "--output", str(out), "--dtype", dtype]) == 0
    printed, written = capsys.readouterr().out, (out / "model.safetensors").stat().st_size
    assert printed.startswith(f"{out}: 29 tensors, {written:,} bytes in {dtype}, ") and printed.endswith(" s\n")
    want, got = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=kind), AutoModelForCausalLM.from_pretrained(out)
    assert got.config.dtype == kind and json.loads((out / "config.json").read_text())["dtype"] == dtype
    ids = AutoTokenizer.from_pretrained(out)("A film that", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(got(ids).logits, want(ids).logits)


def test_files_are_of_the_size_asked_for_and_join_again(tmp_path):
    folder = save_model(tmp_path / "m", "qwen3", vocab_size=311)
    convert.main(["--model", str(folder), "--output", str(tmp_path / "many"), "--max-shard-gb", "0.0002"])
    sizes = [sum(t.nbytes for t in load_file(f).values()) for f in (tmp_path / "many").glob("*.safetensors")]
    assert len(sizes) > 3 and max(sizes) <= 200_000
    convert.main(["--model", str(tmp_path / "many"), "--output", str(tmp_path / "one")])
    one, original = (load_file(f / "model.safetensors") for f in (tmp_path / "one", folder))
    assert one.keys() == original.keys() and all(torch.equal(one[name], t) for name, t in original.items())


def test_mistakes_are_refused_and_leave_nothing(tmp_path):
    folder = save_model(tmp_path / "m", "llama", vocab_size=311)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    for output in ("taken", "taken/notes.txt", "m"):
        with pytest.raises(ValueError, match=r"--output .* is there already and not empty; choose another folder"):
            convert.main(["--model", str(folder), "--output", str(tmp_path / output)])
    with pytest.raises(ValueError, match="--max-shard-gb is -1.0, expected a number above 0"):
        convert.main(["--model", str(folder), "--output", str(tmp_path / "out"), "--max-shard-gb", "-1"])
    with pytest.raises(ValueError, match="int4.*--dtype.*Expected one of"):
        convert.main(["--model", str(folder), "--output", str(tmp_path / "out"), "--dtype", "int4"])
    with pytest.raises(ValueError, match="has no config.json"):
        convert.main(["--model", str(tmp_path / "taken"), "--output", str(tmp_path / "out")])
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = -7e4
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"model\.norm\.weight holds 70000, which float16 cannot; take --dtype bfloat16"
    ):
        convert.main(["--model", str(folder), "--output", str(tmp_path / "out"), "--dtype", "float16"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "taken"]
