"""Every redirection of models/cpu.py is needed by Megatron, and none reaches torch itself."""

import pytest
import torch

from aligner.losses.policy import clipped_policy_loss
from aligner.models import cpu
from tests.conftest import save_llama
from tests.models.test_policy import CLIP, make_policy, policy_batch, random_rollout


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    folder = save_llama(tmp_path_factory.mktemp("cpu") / "m", None, vocab_size=64)

    def once():
        policy, batch = make_policy(folder), policy_batch(random_rollout(64, [(2, 3), (2, 4)]))
        policy.update(batch, lambda lp, h, micro: clipped_policy_loss(lp, h, micro, 7.0, **CLIP))

    once()
    return once


@pytest.mark.parametrize("name", [*cpu._FACTORIES, "cuda.current_device"])
def test_megatron_needs_each_redirection(train, name: str, monkeypatch):
    from megatron.core.optimizer import optimizer

    *parents, last = name.split(".")
    target = optimizer.torch
    for parent in parents:
        target = getattr(target, parent)
    monkeypatch.delitem(target.__dict__, last)
    with pytest.raises(AssertionError, match="CUDA"):
        train()


def test_megatron_needs_the_gradient_type(train, monkeypatch):
    from megatron.core.optimizer import optimizer

    monkeypatch.setattr(optimizer, "clip_grad_by_total_norm_fp32", optimizer.clip_grad_by_total_norm_fp32.__wrapped__)
    with pytest.raises(AssertionError):
        train()


def test_torch_itself_stays_untouched(train):
    with pytest.raises(AssertionError, match="CUDA"):
        torch.zeros(1, device="cuda")
    assert torch.zeros(1).type() == "torch.FloatTensor"
    assert cpu._Proxy(torch, {}).add is torch.add
