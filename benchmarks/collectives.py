"""Counts what a rank gives to and gets from collectives: calls and bytes, by operation, process group and content.

Every function of torch.distributed ends in a method of ProcessGroup, also one that a library imported by name before
and one that coalesces others. So the methods are wrapped. Each runs an operator of torch's, and a profiler counts those
too: a collective that found a way around the methods would make the two numbers differ.

Bytes of a call are those of the whole tensor that the ranks share in it: all-reduce, its tensor; all-gather, what the
rank gets; reduce-scatter, what it gives; send and receive, the message.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.autograd.profiler import profile

# Method of ProcessGroup -> name here, and which argument holds the tensors that are counted.
METHODS = {
    "allreduce": ("all-reduce", 0),
    "allreduce_coalesced": ("all-reduce", 0),
    "allgather": ("all-gather", 0),
    "all_gather_single": ("all-gather", 0),
    "all_gather_single_coalesced": ("all-gather", 0),
    "_allgather_base": ("all-gather", 0),
    "allgather_into_tensor_coalesced": ("all-gather", 0),
    "reduce_scatter": ("reduce-scatter", 1),
    "reduce_scatter_single": ("reduce-scatter", 1),
    "reduce_scatter_single_coalesced": ("reduce-scatter", 1),
    "_reduce_scatter_base": ("reduce-scatter", 1),
    "reduce_scatter_tensor_coalesced": ("reduce-scatter", 1),
    "send": ("send", 0),
    "recv": ("receive", 0),
    "recv_anysource": ("receive", 0),
    "broadcast": ("broadcast", 0),
    "reduce": ("reduce", 0),
    "gather": ("gather", 0),
    "scatter": ("scatter", 0),
    "alltoall": ("all-to-all", 0),
    "alltoall_base": ("all-to-all", 0),
    "all_to_all_single": ("all-to-all", 0),
    "barrier": ("barrier", None),
}
# Name in parallel_state -> kind of group; where two names mean one group the first counts.
GROUPS = {
    "_TENSOR_MODEL_PARALLEL_GROUP": "tensor",
    "_CONTEXT_PARALLEL_GROUP": "context",
    "_PIPELINE_MODEL_PARALLEL_GROUP": "pipeline",
    "_EMBEDDING_GROUP": "embedding",
    "_MODEL_PARALLEL_GROUP": "tensor x pipeline",
    "_DATA_PARALLEL_GROUP_WITH_CP": "data x context",
    "_INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP": "data x context",
    "_DATA_PARALLEL_GROUP": "data",
    "_INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP": "world",
}


@dataclass(frozen=True, order=True)
class Kind:
    """What is counted together.

    content: "numbers" of the model, or "control": integers and bytes, as shapes of messages and pickled objects.
    """

    group: str
    operation: str
    content: str = "numbers"


@dataclass(frozen=True)
class Amount:
    calls: int
    bytes: int

    def __add__(self, other: "Amount") -> "Amount":
        return Amount(self.calls + other.calls, self.bytes + other.bytes)


Counts = dict[Kind, Amount]


def add(counts: Counts, kind: Kind, amount: Amount) -> None:
    if amount.calls:
        counts[kind] = counts.get(kind, Amount(0, 0)) + amount


@contextmanager
def counted() -> Iterator[Counts]:
    """The dict is filled while the block runs. Calls in groups of one rank move nothing and are left out."""
    counts: Counts = {}
    calls: Counter[str] = Counter()
    originals = {name: method for name, method in vars(dist.ProcessGroup).items() if name in METHODS}
    for name in originals:
        setattr(dist.ProcessGroup, name, _counting(name, getattr(dist.ProcessGroup, name), counts, calls))
    try:
        with profile(use_kineto=False) as profiler:
            yield counts
    finally:
        for name, original in originals.items():
            setattr(dist.ProcessGroup, name, original)
    seen = sum(event.name().startswith("c10d::") for event in profiler.kineto_results.events())
    assert seen == sum(calls.values()), f"torch ran {seen} collectives, the methods saw {dict(calls)}"


def _counting(name: str, original, counts: Counts, calls: Counter):
    operation, which = METHODS[name]

    def method(group, *arguments, **options):
        calls[name] += 1
        if group.size() > 1:
            tensors = [] if which is None else list(_flat(arguments[which]))
            control = all(not t.is_floating_point() for t in tensors)
            kind = Kind(_kind(group), operation, "control" if control else "numbers")
            add(counts, kind, Amount(1, sum(t.nbytes for t in tensors)))
        return original(group, *arguments, **options)

    return method


def _flat(tensors: Tensor | Iterable) -> Iterator[Tensor]:
    if isinstance(tensors, Tensor):
        yield tensors
    else:
        for inner in tensors:
            yield from _flat(inner)


def _kind(group: dist.ProcessGroup) -> str:
    if group is dist.group.WORLD:
        return "world"
    return next((kind for name, kind in GROUPS.items() if getattr(parallel_state, name) is group), "unknown")
