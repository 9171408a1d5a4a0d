"""Four ranks import and export at several layouts; every file they write is the one that one process writes."""

import hashlib
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from aligner.checkpoint import huggingface
from aligner.models.shape import ModelShape
from aligner.models.weights import export
from tests.conftest import save_model
from tests.models.export_ranks import DTYPES, LAYOUTS, SHARD_BYTES, Part, worker


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


@pytest.mark.slow
def test_four_ranks_write_what_one_process_writes(tmp_path, monkeypatch):
    for name in DTYPES:
        family, _, tied = name.partition("-")
        sizes = {"num_hidden_layers": 4, "vocab_size": 311, "tie_word_embeddings": bool(tied)}
        save_model(tmp_path / name, family, **sizes)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    mp.spawn(worker, (tmp_path,), nprocs=4)
    for name, dtype in DTYPES.items():
        folder = tmp_path / name
        shape, original = ModelShape.from_folder(folder), load_file(folder / "model.safetensors")
        part = Part(shape, original)
        tensors = export(part.entries, part.read, shape, dtype=dtype)
        huggingface.write(tmp_path / "one", tensors, folder, max_shard_bytes=SHARD_BYTES)
        want = digests(tmp_path / "one")
        assert sum(file.endswith(".safetensors") for file in want) > 1
        for layout in LAYOUTS:
            assert digests(tmp_path / f"{name}-{layout}") == want, (name, layout)
        ids = torch.arange(3, 67)[None]
        models = [AutoModelForCausalLM.from_pretrained(f, dtype=dtype) for f in (folder, tmp_path / "one")]
        assert models[1].config.dtype == dtype
        with torch.no_grad():
            assert torch.equal(*(model(ids).logits for model in models))


def test_a_part_that_no_rank_holds_is_named(tmp_path):
    folder = save_model(tmp_path / "m", "llama", vocab_size=311, tie_word_embeddings=True)
    shape = ModelShape.from_folder(folder)
    part = Part(shape, load_file(folder / "model.safetensors"))
    entries = [item for item in part.entries if item["name"] != "decoder.layers.2.mlp.linear_fc1.weight"]
    with pytest.raises(
        ValueError, match=r"no rank holds 0\.\.96 x 0\.\.64 of model\.layers\.2\.mlp\.gate_proj\.weight"
    ):
        next(export(entries, part.read, shape))
    assert part.asked == []
