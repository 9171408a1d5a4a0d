"""What two processes do within a step; `run(rank, world, folder)` is for torch.multiprocessing."""

import contextlib
import os
from pathlib import Path

import torch
import torch._dynamo  # imported by custom operators; after init_process_group it would keep the group alive
import torch.distributed as dist
from megatron.core import parallel_state

from aligner.models.network import Network
from tests.programs import runs
from tests.programs.every import PROGRAMS

LAYOUTS = {"data": {}, "tensor": {"parallel.tensor": 2}}
TABLE = {program.name: program for program in PROGRAMS}
# What NeMo-Aligner's users had to set for the same log-probabilities in training and inference.
DETERMINISM = ("NCCL_ALGO", "NVTE_APPLY_QK_LAYER_SCALING", "NVTE_FLASH_ATTN", "CUBLAS_WORKSPACE_CONFIG")

EXPERIMENTS = {  # name: (program, steps, options)
    "shares": ("reinforce", 2, {}),
    "labels": ("kto", 2, {"eval-examples": 11, "batch.examples": 8}),
    "padding": ("ppo", 2, {"batch.minibatch-sequences": 1, "policy.mask-unfinished": True, "sampling.max-tokens": 12}),
    "agreement": ("ppo", 3, {"batch.minibatch-sequences": 8, "batch.epochs": 1}),
    "order": ("grpo", 2, {"reward.function": "tests.programs.rewards:digits_in_no_hurry", "batch.sequences": 16}),
}


@contextlib.contextmanager
def dealt():
    """The sequences of this rank's micro-batches in every optimizer step of all networks."""
    seen, original = [], Network.step

    def step(self, batch, loss):
        seen.append(self._micro_batches(batch))
        return original(self, batch, loss)

    Network.step = step
    try:
        yield seen
    finally:
        Network.step = original


def experiment(name: str, folder: Path, output: Path, options: dict) -> list:
    program, steps, own = EXPERIMENTS[name]
    with dealt() as seen:
        runs.run(program, output, TABLE[program].command(folder, steps, rank=0) | own | options)
    return seen


def run(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    for name in DETERMINISM:
        os.environ.pop(name, None)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    found = {}
    for layout, options in LAYOUTS.items():
        dist.init_process_group("gloo", init_method=f"file://{folder}/{layout}.meeting", rank=rank, world_size=world)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            for name in EXPERIMENTS:
                found[layout, name] = experiment(name, folder, folder / f"{layout}-{name}", options)
        dist.barrier()
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    torch.save(found, folder / f"seen-{rank}.pt")
