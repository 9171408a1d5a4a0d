"""A whole run of the offline programs that train a policy on examples: what differs is their step and evaluation."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from aligner.data.dataset import Dataset, load
from aligner.job.config import OfflineConfig
from aligner.job.job import Job, Logged
from aligner.job.reference import Reference
from aligner.models.parallel import NetworkPlan
from aligner.models.policy import Policy

Default = Callable[[], tuple[list[dict], list[dict]]]


def load_examples(job: Job, use, default: Default | None = None) -> tuple[Dataset, list]:
    """Training examples, and --eval-examples held-out ones.

    use: formats of data.formats. default: (training rows, held-out rows) where no --data is given.
    """
    c: OfflineConfig = job.config
    if not c.data.files and default is None:
        raise ValueError(f"{job.program} has no default data; give --data FILE (docs/data.md has the formats).")
    train, held_out = load(c.data, c.eval_data, use, job.encoder, room=job.shape.context, seed=c.seed, default=default)
    print(train.report(), flush=True)
    train.batch(0, c.batch.examples)
    return train, held_out.first(c.eval_examples) if held_out and c.eval_examples else []


def steps_of(config: OfflineConfig, train: Dataset) -> int:
    """--steps, or as many as one pass takes; examples that fill no whole step are left for the next pass."""
    return config.steps or max(1, len(train) // config.batch.examples)


@dataclass(frozen=True)
class OfflineRun:
    """What a step uses. config: the program's own."""

    config: Any
    job: Job
    policy: Policy
    train: Dataset
    held_out: list
    reference: Reference | None

    def examples(self, number: int) -> list:
        """Of the step with this number, 1-based."""
        return self.train.batch(number - 1, self.config.batch.examples)


def train_offline(
    program: str,
    config: OfflineConfig,
    use,
    step: Callable[[OfflineRun, int], Logged],
    evaluate: Callable[[OfflineRun, int], Logged],
    *,
    default: Default | None = None,
    reference: bool = False,
    cache: Path | None = None,
    pack: Callable[[list], Any] | None = None,
) -> int:
    """Train the policy by `step(run, number) -> (metrics, rows for samples.jsonl)`. Returns the exit status.

    reference: whether a step asks for the reference.
    cache: file that keeps what the reference says of every example, as `pack` packs them; None to ask it every time.
    """
    job = Job(program, config)
    if job.dry_run(NetworkPlan(name="policy", shape=job.shape, lora=config.lora)):
        return 0
    train, held_out = load_examples(job, use, default)
    job.begin()
    policy = job.policy(config.lora, config.optimizer, reference=reference and cache is None)
    run = OfflineRun(config, job, policy, train, held_out, Reference(policy, job.folder, cache) if reference else None)
    if run.reference and cache:  # the policy still is the model that the run starts from
        size = config.batch.examples
        starts = range(0, len(train), size)
        chunks = ([train[i] for i in range(s, min(s + size, len(train)))] for s in starts)
        run.reference.precompute(pack(chunk) for chunk in chain(chunks, [held_out] if held_out else []))
    job.restore(policy=policy)
    return job.repeat(
        step=partial(step, run),
        evaluate=partial(evaluate, run),
        networks={"policy": policy},
        export=policy.hugging_face,
        steps=steps_of(config, train),
    )
