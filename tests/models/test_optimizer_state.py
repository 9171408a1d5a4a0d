"""Optimizers continue bit for bit from a checkpoint, and Megatron alone still would not."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer import TransformerConfig
from torch import nn

from aligner.checkpoint import training
from aligner.models import cpu, optimizer_state
from aligner.models.sharded import sharded

# (distributed optimizer, dtype)
KINDS = [(False, torch.float32), (True, torch.float32), (False, torch.bfloat16), (True, torch.bfloat16)]


class Model:
    """A small network under Megatron's gradient buffers and optimizer."""

    def __init__(self, distributed: bool, dtype: torch.dtype, seed: int, *, start: bool = True):
        cpu.install()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
        config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
        buffers = DistributedDataParallelConfig(use_distributed_optimizer=distributed, grad_reduce_in_fp32=True)
        self.ddp = DistributedDataParallel(config, buffers, self.net)
        bf16 = dtype == torch.bfloat16
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                lr=0.05, use_distributed_optimizer=distributed, weight_decay=0.1, bf16=bf16, params_dtype=dtype
            ),
            [self.ddp],
        )
        if start:
            optimizer_state.start(self.optimizer)

    @property
    def inner(self) -> torch.optim.AdamW:
        return self.optimizer.chained_optimizers[0].optimizer

    def train(self, step: int) -> None:
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
        self.ddp(x.to(self.net[0].weight.dtype)).float().square().sum().backward()
        finalize_model_grads([self.ddp])
        self.optimizer.step()

    def state(self, loading: bool) -> dict:
        parameters = sharded(self.net.named_parameters())
        optimizer = optimizer_state.sharded(self.optimizer, parameters, loading=loading)
        return {"net": {"parameters": parameters, "optimizer": optimizer}}

    def load(self, folder: Path) -> None:
        optimizer_state.load(self.optimizer, training.load(folder, self.state(True))["net"]["optimizer"])

    def steps(self) -> list[torch.Tensor]:
        return [s["step"] for s in self.inner.state.values()]

    def values(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.net.parameters()]


def resume(run: Path, distributed: bool, dtype: torch.dtype) -> None:
    """Uninterrupted training against training that is saved after 0 and 2 steps and goes on in a new network."""
    straight = Model(distributed, dtype, seed=0)
    for saved in (0, 2):
        for step in range(1, saved + 1):
            straight.train(step)
        training.save(run, saved, straight.state(False))
    straight.train(3)
    for saved in (0, 2):
        resumed = Model(distributed, dtype, seed=1)
        resumed.load(run / "checkpoints" / f"step-{saved}")
        steps = resumed.steps()
        assert {float(s) for s in steps} == {saved}
        assert len({s.data_ptr() for s in steps}) == len(steps) > 0
        for step in range(saved + 1, 4):
            resumed.train(step)
        assert {float(s) for s in resumed.steps()} == {3}
        assert all(torch.equal(a, b) for a, b in zip(resumed.values(), straight.values(), strict=True)), saved


@pytest.mark.parametrize(("distributed", "dtype"), KINDS)
def test_one_process_continues_exactly(tmp_path, distributed: bool, dtype: torch.dtype):
    resume(tmp_path, distributed, dtype)


@pytest.mark.slow
def test_two_processes_continue_exactly_and_one_takes_over(tmp_path):
    mp.start_processes(two_processes, args=(tmp_path,), nprocs=2, start_method="forkserver")
    for i, (distributed, dtype) in enumerate(KINDS):
        alone = Model(distributed, dtype, seed=2)
        alone.load(training.latest(tmp_path / str(i)))
        two = torch.load(tmp_path / f"{i}.pt")
        assert all(torch.equal(a.detach(), b) for a, b in zip(alone.net.parameters(), two, strict=True))
        assert {float(s) for s in alone.steps()} == {2}


def two_processes(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    parallel_state.initialize_model_parallel()
    for i, (distributed, dtype) in enumerate(KINDS):
        run = folder / str(i)
        resume(run, distributed, dtype)
        saved = Model(distributed, dtype, seed=3)
        saved.load(training.latest(run))
        if rank == 0:
            torch.save(saved.values(), folder / f"{i}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_megatron_still_asserts_a_state_before_the_first_step():
    model = Model(True, torch.float32, seed=0, start=False)
    with pytest.raises(AssertionError):
        model.optimizer.state_dict()


def test_megatron_still_leaves_out_step_zero(tmp_path):
    model = Model(False, torch.float32, seed=0)
    state = training.load(training.save(tmp_path, 0, model.state(False)), model.state(True))["net"]["optimizer"]
    with pytest.raises(KeyError, match="step"):
        model.optimizer.load_state_dict(state)


def test_megatron_still_copies_over_the_step_and_shares_it(tmp_path):
    model = Model(True, torch.float32, seed=0)
    model.train(1)
    folder = training.save(tmp_path, 1, model.state(False))
    again = Model(True, torch.float32, seed=1)
    state = training.load(folder, again.state(True))["net"]["optimizer"]
    with pytest.raises(KeyError, match="step"):
        again.optimizer.load_state_dict(state)
    assert len({id(s) for s in again.steps()}) == 1
