"""Hugging Face checkpoints in and out on every layout."""

import dataclasses
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from aligner.run.distributed import ParallelConfig
from tests.distributed.test_layouts import LAYOUTS, TOLERANCE, outcomes, small_models
from tests.distributed.updates import Case, batch_and_loss

models = pytest.fixture(scope="module")(small_models)
CASES = [Case(method="sft", model=m, lora=x) for m in ("tied", "untied", "qwen2", "qwen3") for x in (False, True)]


def transformers_logprobs(folder: Path) -> torch.Tensor:
    """Of the batch's action tokens, 0 elsewhere."""
    batch, _ = batch_and_loss("sft", 0)
    model = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    parts = []
    with torch.no_grad():
        for ids in batch.tokens_N.split((batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).tolist()):
            log_p = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            parts.append(torch.cat([log_p.new_zeros(1), log_p]))
    return torch.cat(parts) * batch.action_mask_N


@pytest.mark.slow
def test_every_layout_reads_and_writes_the_same_checkpoint(models: Path, tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    work = {1: [ParallelConfig()], **LAYOUTS}
    found = []
    for world, layouts in work.items():
        cases = [dataclasses.replace(c, work="export", layout=layout) for layout in layouts for c in CASES]
        found += zip(cases, outcomes(world, models, cases, tmp_path), strict=True)
    truth = {name: transformers_logprobs(models / name) for name in {c.model for c in CASES}}
    alone = {case.key: result for case, result in found[: len(CASES)]}
    assert len(found) == len(CASES) * 10
    for case, result in found:
        assert (result["logprobs"].double() - truth[case.model]).abs().max() <= 1e-4
        original = load_file(models / case.model / "model.safetensors")
        trained, want = (load_file(Path(r["trained"]) / "model.safetensors") for r in (result, alone[case.key]))
        assert original.keys() == trained.keys() == want.keys()
        assert result["untrained"] == alone[case.key]["untrained"], case
        for name, tensor in trained.items():
            assert (tensor - want[name]).abs().max() <= TOLERANCE * want[name].abs().max(), (case, name)
    assert any(not torch.equal(trained[name], original[name]) for name in original)
