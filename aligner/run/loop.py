"""The loop around a step: progress, metrics, checkpoints, Ctrl-C."""

from collections.abc import Callable

from aligner.run.directory import RunDirectory
from aligner.run.distributed import gather
from aligner.run.interrupt import Interrupt
from aligner.run.progress import Progress

INTERRUPTED = 130  # exit status of a process that SIGINT ended, by the shell's convention


def repeat(
    *,
    steps: int,
    save_every: int,
    eval_every: int,
    directory: RunDirectory,
    start: int,
    evaluate: Callable[[int], tuple[dict[str, float], list[dict]]],
    step: Callable[[int], tuple[dict[str, float], list[dict]]],
    save: Callable[[int], None],
) -> int:
    """Run steps start + 1 ... steps; evaluate before the first and after the last. Returns the exit status.

    save_every, eval_every: steps between checkpoints, and between evaluations; 0 for the last step only.
    evaluate, step: step number -> (metrics, rows for samples.jsonl). save: step number -> writes a checkpoint.
    After Ctrl-C (or SIGTERM) the running step is finished and saved, and the status is 130.
    """
    saved = start
    with Interrupt() as interrupt, Progress(steps, start) as progress:

        def stopping() -> bool:  # the signal reaches the ranks at different steps, and they must leave after the same
            return any(gather(lambda: interrupt.requested))

        if start == 0:
            metrics, rows = evaluate(0)
            directory.log(0, metrics)
            directory.samples(rows)
        stop = stopping()
        for number in range(start + 1, steps + 1):
            if stop:
                break
            metrics, rows = step(number)
            if number == steps or (eval_every and number % eval_every == 0):
                final, held_out = evaluate(number)
                metrics, rows = metrics | final, rows + held_out
            directory.log(number, metrics)
            directory.samples(rows)
            progress.step(number, metrics)
            stop = stopping()
            if stop or number == steps or (save_every and number % save_every == 0):
                save(saved := number)
        if stop and saved == 0:  # Ctrl-C during the first evaluation
            save(0)
    return INTERRUPTED if stop else 0
