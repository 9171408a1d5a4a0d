"""Bytes that one optimizer step and one forward pass move between ranks, and what the formulas say they should be.

`python benchmarks/bench_comm.py` runs a tiny model on each layout in 2 and 4 processes over gloo, compares every
operation in every group on every rank with collective_formulas.py, prints both and ends with status 1 when any differ.
Rows go to results/comm.csv, which is written anew: nothing in it depends on the machine.
"""

import argparse
import csv
import itertools
import multiprocessing
import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch._dynamo  # imported by custom operators; after init_process_group it would keep the group alive
import torch.distributed as dist
from collective_formulas import Work, expected
from collectives import Amount, Counts, Kind, counted
from megatron.core import parallel_state
from torch.multiprocessing import start_processes

from aligner.data.batch import SupervisedBatch
from aligner.losses.supervised import supervised_loss
from aligner.models.lora import LoRAConfig
from aligner.models.network import OptimizerConfig
from aligner.models.policy import Policy
from aligner.models.rope import Rope
from aligner.models.shape import ModelShape
from aligner.run import distributed
from aligner.run.distributed import ParallelConfig

RESULTS = Path(__file__).parent / "results" / "comm.csv"
COLUMNS = ["layout", "model", "trained", "dtype", "call", "ranks", "group", "operation", "content", "calls", "bytes"]
SEQUENCES = [(2, 7), (5, 11), (2, 1), (3, 9), (1, 3), (7, 4), (2, 14), (4, 2)]  # prompt and response
BUDGET, RANK = 33, 3  # tokens of a micro-batch; rank of the adapters
SIZES = {"num_layers": 4, "hidden": 40, "ffn": 56, "heads": 4, "kv_heads": 2, "head_dim": 12, "vocab": 312}
LAYOUTS = {
    2: {
        "TP2": ParallelConfig(tensor=2),
        "TP2 SP": ParallelConfig(tensor=2, sequence=True),
        "PP2": ParallelConfig(pipeline=2),
        "PP2 VPP2": ParallelConfig(pipeline=2, virtual_pipeline=2),
        "CP2": ParallelConfig(context=2),
        "DP2": ParallelConfig(),
        "DP2 distributed-optimizer": ParallelConfig(distributed_optimizer=True),
        "TP2 recompute-full": ParallelConfig(tensor=2, recompute="full"),
        "TP2 SP recompute-full": ParallelConfig(tensor=2, sequence=True, recompute="full"),
        "CP2 recompute-selective": ParallelConfig(context=2, recompute="selective"),
    },
    4: {
        "TP2 PP2": ParallelConfig(tensor=2, pipeline=2),
        "TP2 DP2": ParallelConfig(tensor=2),
        "TP2 SP CP2 distributed-optimizer": ParallelConfig(
            tensor=2, sequence=True, context=2, distributed_optimizer=True
        ),
    },
}
IN_BFLOAT16 = ("TP2 SP", "PP2", "DP2 distributed-optimizer")


@dataclass(frozen=True, kw_only=True)
class Case:
    layout: str
    parallel: ParallelConfig
    tied: bool
    lora: int
    dtype: torch.dtype = torch.float32

    @property
    def shape(self) -> ModelShape:
        return ModelShape(**SIZES, tied=self.tied, context=128, norm_eps=1e-5, rope=Rope())

    def words(self) -> list[str]:
        dtype = str(self.dtype).removeprefix("torch.")
        return [self.layout, "tied" if self.tied else "untied", "LoRA" if self.lora else "full", dtype]


@dataclass(frozen=True, kw_only=True)
class Result:
    """Of one call on all ranks: what was counted, and what the formulas say, by rank."""

    case: Case
    call: str
    counted: list[Counts] = field(default_factory=list)
    expected: list[Counts] = field(default_factory=list)


def cases(world: int) -> list[Case]:
    found = []
    for name, parallel in LAYOUTS[world].items():
        both = itertools.product((True, False) if parallel.recompute == "none" else (False,), (0, RANK))
        found += [Case(layout=name, parallel=parallel, tied=tied, lora=lora) for tied, lora in both]
        if name in IN_BFLOAT16:
            found.append(Case(layout=name, parallel=parallel, tied=False, lora=0, dtype=torch.bfloat16))
    return found


class Random:
    """Weights in place of a checkpoint's."""

    def window(self, _name: str, _start, size) -> torch.Tensor:
        return 0.1 * torch.randn(*size)


def batch() -> SupervisedBatch:
    counts = torch.tensor([0, *(prompt + response for prompt, response in SEQUENCES)])
    mask = torch.cat([torch.arange(prompt + response) >= prompt for prompt, response in SEQUENCES])
    tokens = torch.randint(SIZES["vocab"], (len(mask),), generator=torch.Generator().manual_seed(0))
    return SupervisedBatch(tokens_N=tokens, cu_seqlens=counts.cumsum(0, dtype=torch.int32), action_mask_N=mask)


def count(case: Case) -> dict[str, Counts]:
    """What this rank counts in one update and one inference."""
    policy = Policy(
        case.shape,
        Random(),
        lora=LoRAConfig(rank=case.lora),
        optimizer=OptimizerConfig(),
        tokens_per_micro_batch=BUDGET,
        seed=0,
        parallel=case.parallel,
        dtype=case.dtype,
    )
    whole = batch()
    tokens = float(whole.action_mask_N.sum())
    with counted() as update:
        policy.update(whole, lambda logprobs_N, _entropy_N, micro: supervised_loss(logprobs_N, micro, tokens))
    with counted() as infer:
        policy.infer(whole)
    return {"update": update, "infer": infer}


def run(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    found = []
    for layout, members in itertools.groupby(cases(world), lambda case: case.layout):
        store = f"file://{folder}/{layout.replace(' ', '-')}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
        distributed.initialize(1, LAYOUTS[world][layout])
        found += [count(case) for case in members]
        dist.barrier()
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    torch.save(found, f"{folder}/{rank}.pt")


def results(world: int) -> list[Result]:
    with tempfile.TemporaryDirectory() as folder:
        start_processes(run, (world, folder), nprocs=world, start_method="forkserver")
        found = [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(world)]
    return [
        Result(
            case=case,
            call=call,
            counted=[rank[number][call] for rank in found],
            expected=[formula(case, call, rank, world) for rank in range(world)],
        )
        for number, case in enumerate(cases(world))
        for call in ("update", "infer")
    ]


def formula(case: Case, call: str, rank: int, world: int) -> Counts:
    return expected(
        Work(
            shape=case.shape,
            parallel=case.parallel,
            lora=case.lora,
            width=case.dtype.itemsize,
            sequences=SEQUENCES,
            budget=BUDGET,
            rank=rank,
            world=world,
            forward_only=call == "infer",
        )
    )


def rows(result: Result) -> list[tuple[str, Kind, Amount, Amount]]:
    """(ranks, kind, counted, expected); ranks with the same amounts share a row."""
    none, found = Amount(0, 0), []
    kinds = sorted({kind for counts in result.counted + result.expected for kind in counts})
    for kind in kinds:
        by_amounts: dict[tuple[Amount, Amount], list[int]] = {}
        for rank, (got, want) in enumerate(zip(result.counted, result.expected, strict=True)):
            amounts = got.get(kind, none), want.get(kind, none)
            if amounts != (none, none):
                by_amounts.setdefault(amounts, []).append(rank)
        found += [(" ".join(map(str, ranks)), kind, *amounts) for amounts, ranks in by_amounts.items()]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=f"Count bytes between ranks; rows go to results/{RESULTS.name}.")
    parser.add_argument("--world", type=int, nargs="+", default=list(LAYOUTS), help="numbers of processes")
    parser.add_argument("--no-rows", action="store_true", help=f"leave {RESULTS.name} as it is")
    options = parser.parse_args()
    preload = ["torch._dynamo", "aligner.checkpoint.training", "megatron.core.models.gpt", "megatron.core.optimizer"]
    multiprocessing.set_forkserver_preload(preload)
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "KINETO_LOG_LEVEL": "99"}  # of the processes
    lines, differing = [], 0
    for result in itertools.chain.from_iterable(map(results, options.world)):
        print(", ".join([*result.case.words(), result.call]))
        for ranks, kind, got, want in rows(result):
            lines.append([*result.case.words(), result.call, ranks, *vars(kind).values(), got.calls, got.bytes])
            differing += got != want
            print(
                f"  ranks {ranks:8} {kind.group:18} {kind.operation:15} {kind.content:8} {got.calls:4} calls "
                f"{got.bytes:7} bytes; formula {want.calls:4} calls {want.bytes:7} bytes"
                + ("  DIFFERS" if got != want else "")
            )
    print(f"{len(lines)} amounts, {differing} differ from their formula")
    if not options.no_rows and not differing:
        with RESULTS.open("w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *lines])
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
