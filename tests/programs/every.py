"""Every training program on a tiny model: what each needs to run, and runs of many in two processes.

`run(rank, world, work)` is for torch.multiprocessing; a program joins by a line in PROGRAMS, options by VARIATIONS.
"""

import contextlib
import os
import random
from dataclasses import dataclass, field, replace
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
    """kind: of its data. options: its own, next to those of all; {folder} in them is of `prepare`, {run} the run's.
    trained: groups of options of the trained networks.
    steps: options of a run of that many steps in all, an even number.
    """

    name: str
    kind: str
    options: dict = field(default_factory=dict)
    trained: tuple[str, ...] = ("",)
    steps: object = staticmethod(lambda n: {"steps": n})
    variation: str = ""

    @property
    def title(self) -> str:
        return f"{self.name}-{self.variation}" if self.variation else self.name

    @property
    def online(self) -> bool:
        return self.kind == "prompts"

    def command(self, folder: Path, n: int, *, rank: int, run: str = "") -> dict:
        """Options of a run of n steps, by LoRA of that rank; `folder` as of `prepare`, `run` names the run."""
        shared = {"model": folder / "model", "data": folder / f"{self.kind}.jsonl", "eval-every": 1, "save-every": 0}
        shared["eval-data"] = shared["data"]
        sampled = {"eval-prompts": 3, "sampling.max-tokens": 5, "reward.function": "tests.programs.rewards:digits"}
        sizes = {"batch.sequences": 8, "batch.minibatch-sequences": 8, "batch.samples-per-prompt": 2}
        shared |= sampled | sizes if self.online else {"batch.examples": 6, "eval-examples": 5}
        shared["batch.tokens-per-micro-batch"] = 24
        for group in self.trained:
            shared |= {f"{group}{name}": value for name, value in OPTIMIZER.items()} | {f"{group}lora.rank": rank}
        places = {"folder": folder, "run": run}
        own = {name: x.format(**places) if isinstance(x, str) else x for name, x in self.options.items()}
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
        {"critic.layers": 2, "batch.minibatch-sequences": 4, "batch.epochs": 2},
        trained=("policy.", "critic."),
    ),
    Program("grpo", "prompts", {"batch.minibatch-sequences": 4}),
    Program("reinforce", "prompts"),
    Program("rejection_sampling", "prompts"),
    Program("steerlm", "weighted", {"loss": "steerlm2"}),
    Program("distill", "supervised", {"teacher": "{folder}/teacher", "top-k": 5, "sft-coef": 0.1}),
]
PPO = next(program for program in PROGRAMS if program.name == "ppo")
TRUE_OR_FALSE = {"reward.function": "tests.programs.rewards:has_a_seven"}


def varied(program: Program, variation: str, **options) -> Program:
    options = {name.replace("__", ".").replace("_", "-"): value for name, value in options.items()}
    return replace(program, variation=variation, options=program.options | options)


VARIATIONS = [
    varied(PPO, "controller", kl_target=0.01, kl_horizon=20, critic_warmup_steps=1, reward__clip=0.5),
    varied(PPO, "judged", reward__model="{folder}/reward", reward__weights=(1.0, 0.5)),
    Program(
        "grpo", "prompts", TRUE_OR_FALSE | {"dynamic-sampling": 3, "overlong-buffer": 2, "kl-coef": 0}, variation="dapo"
    ),
    Program(
        "grpo",
        "prompts",
        {"ratio": "sequence", "average": "sequence", "dual-clip": 1.1, "batch.epochs": 2, "optimizer.lr": 1e-2},
        variation="gspo",
    ),
    Program(
        "grpo",
        "prompts",
        {"ratio": "cispo", "mask-unfinished": True, "correction": "tis", "entropy-bonus": 0.01},
        variation="cispo",
    ),
    Program(
        "reinforce",
        "prompts",
        {"baseline": "reinforce_pp", "optimizer.warmup-steps": 2, "optimizer.decay-steps": 5},
        variation="pp",
    ),
    Program("dpo", "pairs", {"loss": "rpo_fwd_kl", "reference-cache": "{folder}/{run}.npz"}, variation="cached"),
    Program("dpo", "pairs", {"loss": "simpo", "average": True}, variation="simpo"),
    Program("dpo", "pairs", {"loss": "orpo", "sft-coef": 1.0}, variation="orpo"),
    Program("steerlm", "supervised", variation="sft"),
    Program("sft", "supervised", {"eval-samples": 3, "sampling.max-tokens": 5}, variation="answers"),
]


def prepare(folder: Path) -> Path:
    """A model and data of every kind."""
    save_bandit(folder / "model", num_hidden_layers=2)
    save_bandit(folder / "teacher", num_hidden_layers=2, intermediate_size=96)
    for kind in {program.kind for program in PROGRAMS}:
        write(folder / f"{kind}.jsonl", rows(kind))
    judge = {"model": folder / "model", "data": folder / "pairs.jsonl", "steps": 2, "batch.examples": 4}
    runs.run("reward_model", folder / "reward", judge | {"optimizer.lr": 1e-2})
    return folder


def run_one(rank: int, world: int, meeting: Path, program: str, output: Path, options: dict) -> None:
    """One rank of a run of a program."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
    dist.init_process_group("gloo", init_method=f"file://{meeting}/meeting", rank=rank, world_size=world)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        runs.run(program, output, options)
    dist.barrier()
    dist.destroy_process_group()


def run(rank: int, world: int, folder: Path, layouts: dict[str, tuple[dict, int]]) -> None:
    """One rank of every program in every layout, of the variations with all weights; runs are folder/<layout>-<title>.

    layouts: (options, LoRA's rank) of each.
    """
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    for name, (options, lora) in layouts.items():
        dist.init_process_group("gloo", init_method=f"file://{folder}/{name}.meeting", rank=rank, world_size=world)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            for program in [*PROGRAMS, *([] if lora else VARIATIONS)]:
                command = program.command(folder, STEPS, rank=lora, run=f"{name}-{program.title}") | options
                runs.run(program.name, folder / f"{name}-{program.title}", command)
        dist.barrier()
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
