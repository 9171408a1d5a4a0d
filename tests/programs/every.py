"""Every training program on a tiny model: what each needs to run, and runs of many in two processes.

`run(rank, world, work)` is for torch.multiprocessing; a program joins by a line in PROGRAMS.
"""

import contextlib
import os
import random
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch._dynamo  # imported by custom operators; after init_process_group it would keep the group alive
import torch.distributed as dist
from megatron.core import parallel_state

from tests.programs import runs
from tests.programs.bandit import WORDS, save_bandit, write

STEPS = 4
# Where a gradient is close to 0, rounding would decide about the sign of a step that eps does not damp.
OPTIMIZER = {"optimizer.lr": 1e-3, "optimizer.eps": 1e-5}


def text(g: random.Random, most: int) -> str:
    return " ".join(g.choices(WORDS, k=g.randint(1, most)))


def rows(kind: str) -> list[dict]:
    g = random.Random(kind)
    made = {
        "prompts": lambda: {"text": text(g, 5)},
        "supervised": lambda: {"prompt": text(g, 5), "completion": text(g, 6)},
        "pairs": lambda: {
            "prompt": text(g, 5),
            "chosen": f"w1 {text(g, 6)}",
            "rejected": text(g, 6),
            "chosen_reward": 2.0,
            "rejected_reward": 1.0,
        },
        "judged": lambda: {"prompt": text(g, 5), "completion": text(g, 6), "label": g.random() < 0.5},
        "rated": lambda: {"prompt": text(g, 5), "response": text(g, 6), "label": [g.random(), g.random()]},
        "weighted": lambda: {
            "prompt_turns": [{"from": "User", "value": text(g, 5)}],
            "label": "w2:1",
            "responses": [answer(g) for _ in range(3)],
        },
    }
    return [made[kind]() for _ in range(12)]


def answer(g: random.Random) -> dict:
    logs = {name: -20 * g.random() for name in ("log(P(a|x,y))", "log(P(y|x))", "log(Q(y|a,x))")}
    return {"from": "Assistant", "value": text(g, 6)} | logs


@dataclass(frozen=True)
class Program:
    """kind: of its data. options: its own, next to those of all; {folder} in them is that of `prepare`.
    trained: groups of options of the trained networks.
    steps: options of a run of that many steps in all, an even number.
    """

    name: str
    kind: str
    options: dict = field(default_factory=dict)
    trained: tuple[str, ...] = ("",)
    steps: object = staticmethod(lambda n: {"steps": n})

    @property
    def online(self) -> bool:
        return self.kind == "prompts"

    def command(self, folder: Path, n: int, *, rank: int) -> dict:
        """Options of a run of n steps, by LoRA of that rank; `folder` as of `prepare`."""
        shared = {"model": folder / "model", "data": folder / f"{self.kind}.jsonl", "eval-every": 1, "save-every": 0}
        shared["eval-data"] = shared["data"]
        sampled = {"eval-prompts": 3, "sampling.max-tokens": 5, "reward.function": "tests.programs.rewards:digits"}
        sizes = {"batch.sequences": 8, "batch.minibatch-sequences": 8, "batch.samples-per-prompt": 2}
        shared |= sampled | sizes if self.online else {"batch.examples": 6, "eval-examples": 5}
        shared["batch.tokens-per-micro-batch"] = 24
        for group in self.trained:
            shared |= {f"{group}{name}": value for name, value in OPTIMIZER.items()} | {f"{group}lora.rank": rank}
        own = {name: x.format(folder=folder) if isinstance(x, str) else x for name, x in self.options.items()}
        return shared | self.steps(n) | own


PROGRAMS = [
    Program("sft", "supervised"),
    Program("dpo", "pairs", {"beta": 0.5}),
    Program("kto", "judged", {"beta": 0.5}),
    Program(
        "spin",
        "supervised",
        {"beta": 0.5, "sampling.max-tokens": 5},
        steps=lambda n: {"iterations": n // 2, "steps": 2},
    ),
    Program("reward_model", "pairs", {"loss": "margin", "centre": 0.01}),
    Program(
        "ppo",
        "prompts",
        {"critic.layers": 1, "batch.minibatch-sequences": 4, "batch.epochs": 2},
        trained=("policy.", "critic."),
    ),
    Program("grpo", "prompts", {"batch.minibatch-sequences": 4}),
    Program("reinforce", "prompts"),
    Program("rejection_sampling", "prompts"),
    Program("steerlm", "weighted", {"loss": "steerlm2"}),
    Program("distill", "supervised", {"teacher": "{folder}/teacher", "top-k": 5, "sft-coef": 0.1}),
]
NAMES = [program.name for program in PROGRAMS]


def prepare(folder: Path) -> Path:
    """A model and data of every kind."""
    save_bandit(folder / "model", num_hidden_layers=2)
    save_bandit(folder / "teacher", num_hidden_layers=1)
    for kind in {program.kind for program in PROGRAMS}:
        write(folder / f"{kind}.jsonl", rows(kind))
    return folder


def run(rank: int, world: int, folder: Path, layouts: dict[str, tuple[dict, int]]) -> None:
    """One rank of every program in every layout; the runs are folder/<layout>-<program>.

    layouts: (options, LoRA's rank) of each.
    """
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    for name, (options, lora) in layouts.items():
        dist.init_process_group("gloo", init_method=f"file://{folder}/{name}.meeting", rank=rank, world_size=world)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            for program in PROGRAMS:
                command = program.command(folder, STEPS, rank=lora) | options
                runs.run(program.name, folder / f"{name}-{program.name}", command)
        dist.barrier()
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
