"""Process groups: torch.distributed and Megatron-core's tensor, context, data and pipeline groups."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, TypeVar

import torch
import torch.distributed as dist

from aligner.run.watch import Watch

Value = TypeVar("Value")
# Of a collective. Ranks without requests wait in one while others wait ten minutes for a served reward model, and that
# long NCCL waits by default.
PATIENCE = timedelta(minutes=30)
_open = ExitStack()  # what initialize() has opened


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    tensor: int = 1
    """Ranks that share each layer's matrices."""
    pipeline: int = 1
    """Stages that the layers are dealt to."""
    virtual_pipeline: int = 1
    """Chunks of layers on each stage; more than 1 interleaves them."""
    context: int = 1
    """Ranks that share the tokens of a micro-batch."""
    sequence: bool = False
    """Norms and residuals are split by token over the tensor ranks."""
    distributed_optimizer: bool = False
    """Each data-parallel rank keeps its share of the optimizer's state."""
    offload: bool = False
    """Optimizer state waits in host memory while responses are sampled."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in backward: none, those of the attention's core, or every layer's."""

    def __post_init__(self):
        if min(self.tensor, self.pipeline, self.virtual_pipeline, self.context) < 1:
            raise ValueError("parallel.tensor, pipeline, virtual-pipeline and context must be 1 or more.")
        if self.sequence and self.tensor == 1:
            raise ValueError("parallel.sequence splits tokens over tensor ranks; give --parallel.tensor 2 or more.")
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ValueError("parallel.virtual-pipeline needs --parallel.pipeline 2 or more.")

    def replica(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tensor * self.pipeline * self.context

    def data(self, world: int) -> int:
        """Data-parallel size among `world` processes. Raises ValueError when they do not make whole replicas."""
        if world % self.replica():
            raise ValueError(
                f"{world} processes cannot hold copies of {self.tensor} tensor x {self.context} context x "
                f"{self.pipeline} pipeline = {self.replica()} ranks; start a multiple of {self.replica()} "
                "(torchrun --nproc-per-node) or change --parallel.*."
            )
        return world // self.replica()


def world_size() -> int:
    """Processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def initialize(threads: int, parallel: ParallelConfig | None = None) -> None:
    """Set the thread count and join the process groups: torchrun's when started by it, else a group of one.

    threads: CPU threads of this process for torch and the compiled operators; 0 leaves torch's choice.
    parallel: the layout; None is data parallel only.
    Raises ValueError when the processes do not fit the layout.
    """
    from megatron.core import parallel_state

    parallel = parallel or ParallelConfig()
    if threads:
        torch.set_num_threads(threads)
    if not dist.is_initialized():
        parallel.data(world_size())
        backend = "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            backend = "nccl"
        if "WORLD_SIZE" in os.environ:
            store, rank, world = next(dist.rendezvous("env://"))
            dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=PATIENCE)
            _open.enter_context(Watch(store, rank, world))
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    parallel.data(dist.get_world_size())
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
            context_parallel_size=parallel.context,
        )


@contextmanager
def processes() -> Iterator[None]:
    """Around a program: from initialize() to the end of the block its processes watch each other (run.watch)."""
    with _open:
        yield


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where this process stands: its rank of each kind, and the number of data-parallel replicas."""

    tensor: int
    pipeline: int
    context: int
    data: int
    replicas: int

    @property
    def leads(self) -> bool:
        """One rank of each replica."""
        return self.tensor == self.pipeline == self.context == 0


def place() -> Place:
    """Of this process, once initialize() was called."""
    from megatron.core import parallel_state

    return Place(
        tensor=parallel_state.get_tensor_model_parallel_rank(),
        pipeline=parallel_state.get_pipeline_model_parallel_rank(),
        context=parallel_state.get_context_parallel_rank(),
        data=parallel_state.get_data_parallel_rank(),
        replicas=parallel_state.get_data_parallel_world_size(),
    )


def gpu() -> str | None:
    """This process's GPU as CUDA_VISIBLE_DEVICES would name it to another; None without CUDA."""
    if not torch.cuda.is_available():
        return None
    seen = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    number = torch.cuda.current_device()
    return seen[number] if seen else str(number)


def is_main() -> bool:
    """Whether this process is the one that writes what a run writes once. Known before initialize() too."""
    return os.environ.get("RANK", "0") == "0"


def tells_errors() -> bool:
    """Whether what went wrong here is news: before the processes joined, those of one machine all find the same."""
    return dist.is_initialized() or os.environ.get("LOCAL_RANK", "0") == "0"


def gather(compute: Callable[[], Value]) -> list[Value]:
    """What every rank computes, by rank, on all of them; called by all of them.

    When it raises on one rank all raise: a mistake of the user as what it is, anything else as RuntimeError.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [compute()]
    value = error = None
    try:
        value = compute()
    except Exception as raised:  # the other ranks would wait for this one for ever
        error = raised
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (value, error and (_kind(error), str(error))))
    if error:
        raise error
    for rank, (_, failed) in enumerate(everyone):
        if failed:
            kind, words = failed
            raise kind(f"rank {rank}: {words}")
    return [value for value, _ in everyone]


def gather_lists(compute: Callable[[], list[Value]]) -> list[Value]:
    """The lists that the ranks compute, one after the other, on all of them; as of gather()."""
    return [value for values in gather(compute) for value in values]


def agree(compute: Callable[[], Value]) -> Value:
    """What this rank computes; called by all of them, and when it raises on one all raise, as of gather()."""
    mine: list[Value] = []
    gather(lambda: mine.append(compute()))
    return mine[0]


def _kind(error: Exception) -> type[Exception]:
    return next((kind for kind in (ValueError, FloatingPointError, OSError) if isinstance(error, kind)), RuntimeError)
