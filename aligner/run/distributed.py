"""Process groups: torch.distributed and Megatron-core's model-parallel state."""

import os

import torch
import torch.distributed as dist


def initialize(threads: int) -> None:
    """Set the thread count and join the process groups: torchrun's when started by it, else a group of one.

    threads: CPU threads of this process for torch and the compiled operators; 0 leaves torch's choice.
    """
    if threads:
        torch.set_num_threads(threads)
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if "WORLD_SIZE" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if dist.get_world_size() != 1:
        raise ValueError(
            f"started with {dist.get_world_size()} processes, but this version trains in one; leave torchrun out."
        )
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
