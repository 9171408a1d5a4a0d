"""Weights of a replica of several ranks reach its sampler, on one machine and across machines."""

import os
import socket
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from aligner.checkpoint import huggingface
from aligner.checkpoint.huggingface import Weights
from aligner.models.lora import LoRAConfig
from aligner.models.network import OptimizerConfig
from aligner.models.policy import Policy
from aligner.models.shape import ModelShape
from aligner.refit.replica import Replica
from aligner.rollout.native import NativeSampler
from aligner.run import distributed
from aligner.run.distributed import ParallelConfig
from tests.conftest import save_llama


def worker(rank: int, folder: Path, layout: ParallelConfig, machines: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    distributed.initialize(1, layout)
    shape = ModelShape.from_folder(folder / "model")
    policy = Policy(
        shape,
        Weights(folder / "model", shape.tensors()),
        lora=LoRAConfig(rank=4),
        optimizer=OptimizerConfig(),
        tokens_per_micro_batch=64,
        seed=0,
        parallel=layout,
    )
    with mock.patch.object(socket, "gethostname", lambda: f"node-{rank % machines}"):
        replica = Replica(policy, lambda: NativeSampler(shape))
    assert (replica.sampler is None) == (rank == 1 and layout.replica() == 2)
    replica.refit(1)
    check(replica, folder / "model", exact=True)
    here = distributed.place()
    with torch.no_grad():
        for adapter in policy.network.adapters.values():
            adapter.b.normal_(std=0.1, generator=torch.Generator().manual_seed(here.tensor + 2 * here.pipeline))
    replica.refit(2)
    huggingface.write(folder / "trained", policy.hugging_face(), like=folder / "model")
    check(replica, folder / "trained", exact=False)
    dist.barrier()
    dist.destroy_process_group()


def check(replica: Replica, folder: Path, exact: bool) -> None:
    if replica.sampler is not None:
        want = NativeSampler.from_pretrained(folder).weights
        for name, tensor in replica.sampler.weights.items():
            torch.testing.assert_close(tensor, want[name], rtol=0, atol=0 if exact else 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("machines", [1, 2])
@pytest.mark.parametrize("layout", [{"tensor": 2}, {"pipeline": 2}, {"context": 2}, {}])
def test_sampler_holds_what_the_ranks_hold(layout: dict, machines: int, tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    save_llama(
        tmp_path / "model", None, vocab_size=312, num_hidden_layers=2, tie_word_embeddings=layout == {"tensor": 2}
    )
    arguments = (tmp_path, ParallelConfig(**layout), machines)
    mp.start_processes(worker, arguments, nprocs=2, start_method="forkserver")
