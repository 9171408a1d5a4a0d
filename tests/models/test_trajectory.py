"""Megatron on the CPU, redirections and all, trains as transformers' model under torch's AdamW does."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from aligner.checkpoint.huggingface import Weights
from aligner.data.batch import SupervisedBatch
from aligner.losses.supervised import supervised_loss
from aligner.models.lora import LoRAConfig
from aligner.models.network import OptimizerConfig
from aligner.models.policy import Policy
from aligner.models.shape import ModelShape
from tests.conftest import save_model

# Where a gradient is close to 0, rounding would decide about the sign of a step that eps does not damp.
LR, EPS, DECAY, CLIP, WARMUP, STEPS = 1e-3, 1e-5, 0.1, 0.7, 2, 5
LENGTHS = [9, 14, 5, 11]
SIZES = {"vocab_size": 211, "num_hidden_layers": 2}


def make(folder: Path, dtype: torch.dtype = torch.float32, **changes) -> Policy:
    shape = ModelShape.from_folder(folder)
    options = {"lr": LR, "weight_decay": DECAY, "clip": CLIP, "warmup_steps": WARMUP, "eps": EPS} | changes
    return Policy(
        shape,
        Weights(folder, shape.tensors()),
        lora=LoRAConfig(rank=0),
        optimizer=OptimizerConfig(**options),
        tokens_per_micro_batch=20,
        seed=0,
        dtype=dtype,
    )


def batch_of(step: int) -> SupervisedBatch:
    tokens_N = torch.randint(3, 211, (sum(LENGTHS),), generator=torch.Generator().manual_seed(step))
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0, dtype=torch.int32)
    mask_N = torch.ones_like(tokens_N, dtype=torch.bool)
    mask_N[cu_seqlens[:-1].long()] = False
    return SupervisedBatch(tokens_N=tokens_N, cu_seqlens=cu_seqlens, action_mask_N=mask_N)


def update(policy: Policy, step: int) -> dict[str, float]:
    num_tokens = float(sum(LENGTHS) - len(LENGTHS))
    return policy.update(batch_of(step), lambda logprobs_N, _h, micro: supervised_loss(logprobs_N, micro, num_tokens))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_training_equals_transformers_and_adamw(tmp_path, family: str):
    folder = save_model(tmp_path / "m", family, **SIZES)
    policy, reference = make(folder), AutoModelForCausalLM.from_pretrained(folder)
    matrices = [p for p in reference.parameters() if p.dim() > 1]
    vectors = [p for p in reference.parameters() if p.dim() == 1]  # norms and biases do not decay
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=EPS)
    norms = []
    for step in range(STEPS):
        stats = update(policy, step)
        batch, loss = batch_of(step), 0.0
        for ids in batch.tokens_N.split(LENGTHS):
            loss = loss - reference(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None]).sum()
        loss = loss / (sum(LENGTHS) - len(LENGTHS))
        adam.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(reference.parameters(), CLIP)))
        for group in adam.param_groups:
            group["lr"] = LR * min(1.0, (step + 1) / WARMUP)
        adam.step()
        assert stats["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
        assert stats["grad_norm"] == pytest.approx(norms[-1], rel=1e-5)
    assert min(norms) > CLIP  # so the clipping was at work
    trained = dict(policy.hugging_face())
    for name, want in reference.state_dict().items():
        assert (trained[name] - want).abs().max() <= 1e-5 * want.abs().max(), name


@pytest.mark.slow
def test_bfloat16_weights_keep_float32_masters(tmp_path):
    """Steps too small for bfloat16 add up in the masters, which move as float32 weights do."""
    folder = save_model(tmp_path / "m", "llama", **SIZES)
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).float().save_pretrained(folder)
    small = {"lr": 1e-6, "weight_decay": 0.0, "warmup_steps": 0}
    exact, half = make(folder, **small), make(folder, torch.bfloat16, **small)
    names = list(exact.network.parameters)
    start = {name: exact.network.parameters[name].detach().clone() for name in names}
    for step in range(20):
        want, got = update(exact, step), update(half, step)
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-2)
    for name in names:
        master, weight = half.network.parameters[name].main_param, half.network.parameters[name]
        assert weight.dtype == torch.bfloat16 and torch.equal(weight, master.bfloat16())
        drift, alone = (x.detach() - start[name] for x in (master, exact.network.parameters[name]))
        assert torch.cosine_similarity(drift.flatten(), alone.flatten(), dim=0) > 0.95, name
        assert (drift != 0).float().mean() > 0.9 or "embedding" in name  # where no token came by
    still = sum(int((p.float() == start[n]).sum()) for n, p in half.network.parameters.items())
    assert still > 0.9 * sum(p.numel() for p in start.values())  # the weights themselves show little of it yet


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_offloaded_comes_back(tmp_path, dtype: torch.dtype):
    folder = save_model(tmp_path / "m", "llama", **SIZES)
    stayed, moved = make(folder, dtype), make(folder, dtype)
    for step in range(3):
        assert update(stayed, step) == update(moved, step)
        before = moved.infer(batch_of(9))[0]
        moved.network.offload.leave()
        held = list(moved.network.offload._tensors())
        masters = dtype == torch.bfloat16
        gone = [x for x in held if x.untyped_storage().nbytes() == 0]
        assert (
            len(gone) == len(held) * (3 if masters else 2) // 3
        )  # two moments, and masters unless they are the weights
        assert torch.equal(moved.infer(batch_of(9))[0], before)  # the weights stayed
        moved.network.offload.leave(weights=True)
        assert all(p.untyped_storage().nbytes() == 0 for p in moved.network.parameters.values())
        assert torch.equal(moved.infer(batch_of(9))[0], before)  # they come when they are needed
        moved.network.offload.leave(weights=True)
    assert update(stayed, 3) == update(moved, 3)
    for (name, a), (_, b) in zip(stayed.hugging_face(), moved.hugging_face(), strict=True):
        assert torch.equal(a, b), name
