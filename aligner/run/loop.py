"""The options every program shares, and the loop around a step: progress, metrics, checkpoints, Ctrl-C."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from aligner.run.directory import RunDirectory
from aligner.run.distributed import ParallelConfig, gather
from aligner.run.interrupt import Interrupt
from aligner.run.progress import Progress

INTERRUPTED = 130  # exit status of a process that SIGINT ended, by the shell's convention


@dataclass(frozen=True, kw_only=True)
class ProgramConfig:
    model: str = "SmolLM2-135M-Instruct"
    """Hugging Face model directory, or the default model's name."""
    data: str = ""
    """JSONL prompt files, comma-separated; empty takes openings of IMDb reviews."""
    eval_data: str = ""
    """JSONL files of held-out prompts; empty holds out reviews, or evaluates nothing when --data is given."""
    eval_prompts: int = 96
    """Held-out prompts answered before the first and after the last step; 0 evaluates nothing."""
    steps: int = 10
    """Steps of the whole run."""
    seed: int = 0
    """Of sampling, data order and new parameters."""
    output: Path | None = None
    """Run folder; default runs/<program>-<time>."""
    resume: bool = False
    """Go on from the newest checkpoint in --output."""
    save_every: int = 0
    """Steps between checkpoints; 0 saves at the end only."""
    threads: int = 0
    """CPU threads of each process; 0 takes torch's choice, one a core."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the trained weights; with bfloat16 the optimizer keeps float32 masters."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    dry_run: bool = False
    """Print which rank would hold what, and end."""

    def __post_init__(self):
        if min(self.steps, 1 + self.eval_prompts, 1 + self.save_every, 1 + self.threads) < 1:
            raise ValueError("steps must be 1 or more; eval-prompts, save-every and threads 0 or more.")


def repeat(
    config: ProgramConfig,
    directory: RunDirectory,
    start: int,
    *,
    evaluate: Callable[[int], tuple[dict[str, float], list[dict]]],
    step: Callable[[int], tuple[dict[str, float], list[dict]]],
    save: Callable[[int], None],
) -> int:
    """Run steps start + 1 ... config.steps; evaluate before the first and after the last. Returns the exit status.

    evaluate, step: step number -> (metrics, rows for samples.jsonl). save: step number -> writes a checkpoint.
    After Ctrl-C (or SIGTERM) the running step is finished and saved, and the status is 130.
    """
    saved = start
    with Interrupt() as interrupt, Progress(config.steps, start) as progress:

        def stopping() -> bool:  # the signal reaches the ranks at different steps, and they must leave after the same
            return any(gather(lambda: interrupt.requested))

        if start == 0:
            metrics, rows = evaluate(0)
            directory.log(0, metrics)
            directory.samples(rows)
        stop = stopping()
        for number in range(start + 1, config.steps + 1):
            if stop:
                break
            metrics, rows = step(number)
            if number == config.steps:
                final, held_out = evaluate(number)
                metrics, rows = metrics | final, rows + held_out
            directory.log(number, metrics)
            directory.samples(rows)
            progress.step(number, metrics)
            stop = stopping()
            if stop or number == config.steps or (config.save_every and number % config.save_every == 0):
                save(saved := number)
        if stop and saved == 0:  # Ctrl-C during the first evaluation
            save(0)
    return INTERRUPTED if stop else 0
