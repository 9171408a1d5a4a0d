"""What tools share that sample from a model and write data: prompts in order, the sampler, rewards, the file."""

import json
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

from aligner.data.dataset import Dataset
from aligner.data.examples import Prompt
from aligner.data.formats import PROMPTS
from aligner.data.movie_reviews import review_prompt_rows
from aligner.job.actor import Actor, load_rewards
from aligner.job.config import ToolConfig
from aligner.job.job import Job
from aligner.models.lora import LoRAConfig
from aligner.models.policy import Policy
from aligner.run.atomic import atomic_file
from aligner.run.distributed import agree, is_main

FROZEN = {"lora": LoRAConfig(rank=0), "optimizer": None, "reference": False}  # of policies that are never trained


def open_prompts(job: Job, count: int = 0, *, held_out: bool = False) -> list[list[Prompt]]:
    """The first `count` prompts of --data (0: all), in batches; by default openings of reviews, held out or not."""
    c: ToolConfig = job.config
    room, side = job.shape.context - c.sampling.max_tokens, int(held_out)
    default = lambda: review_prompt_rows(job.tokenizer)[side]  # noqa: E731
    data = Dataset.open(c.data.files, c.data, PROMPTS, job.encoder, room=room, seed=c.seed, default=default)
    prompts = data.first(count or len(data))
    return [prompts[i : i + c.batch.prompts] for i in range(0, len(prompts), c.batch.prompts)]


def sampling_actor(job: Job) -> Actor:
    """The run's model behind the sampler, and the rewards that --reward names."""
    return Actor(job, _model(job), None, [], load_rewards(job, job.config.reward))


def silent_actor(job: Job) -> Actor:
    """The run's model behind the sampler; nothing is scored."""
    return Actor(job, _model(job), None, [], None)


def _model(job: Job) -> Policy:
    return job.policy(temperature=job.config.sampling.temperature, **FROZEN)


def check_output(path: Path) -> None:
    """Raise ValueError, before any work, when the file is there already or cannot be written."""
    path = Path(path)
    if path.exists():
        raise ValueError(f"--output {str(path)!r} is there already; remove it or choose another file.")
    if not path.parent.is_dir():
        raise ValueError(f"--output {str(path)!r} is in no folder that exists; make {str(path.parent)!r} first.")


def write_rows(path: Path, rows: Iterable[dict]) -> int:
    """Write JSON lines as they come; the file is there once all are. Returns how many.

    Every rank exhausts `rows`, which the first one writes.
    """
    count, failure = 0, None
    with ExitStack() as stack:
        file = agree(lambda: stack.enter_context(atomic_file(Path(path))) if is_main() else None)
        for row in rows:
            count += 1
            if file is not None and failure is None:
                try:
                    file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
                except OSError as error:  # the other ranks wait for this one's part of the rows
                    failure = error

        def finish() -> None:
            if failure:
                raise failure
            stack.close()

        agree(finish)
    return count
