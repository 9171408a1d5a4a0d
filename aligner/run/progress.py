"""The state of a run on the terminal: a bar with the step's key numbers, or one plain line a step."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

KEY_NUMBERS = (
    ("reward/mean", "reward", "{:+.3f}"),
    ("kl/mean", "kl", "{:.3f}"),
    ("loss", "loss", "{:.4f}"),
    ("loss/policy", "loss", "{:+.4f}"),
    ("tokens_per_second", "tokens/s", "{:,.0f}"),
)


class Progress:
    """with Progress(total_steps, start) as progress: progress.step(step, metrics)

    total_steps: steps of the whole run.
    start: steps already done, when a run is resumed.
    """

    def __init__(self, total_steps: int, start: int = 0):
        self.total, self.start, self.done = total_steps, start, start
        self._bar = None

    def __enter__(self) -> "Progress":
        self._began = time.monotonic()
        if sys.stdout.isatty():
            columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.description}"))
            self._bar = Bar(*columns, TimeElapsedColumn(), console=Console(file=sys.stdout))
            self._task = self._bar.add_task("first step ...", total=self.total, completed=self.start)
            self._bar.start()
        return self

    def __exit__(self, *_):
        if self._bar is not None:
            self._bar.stop()

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Show a finished step.

        step: its 1-based number.
        metrics: the step's numbers; those of KEY_NUMBERS are shown.
        """
        self.done = step
        named = {label: form.format(metrics[name]) for name, label, form in reversed(KEY_NUMBERS) if name in metrics}
        numbers = [f"{label} {named.pop(label)}" for _, label, _ in KEY_NUMBERS if label in named]
        numbers.append(f"ETA {self._remaining()}")
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description="  ".join(numbers))
        else:
            print(f"step {step}/{self.total}  " + "  ".join(numbers), flush=True)

    def message(self, text: str) -> None:
        """Print a line without tearing the bar."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)

    def _remaining(self) -> str:
        mean = (time.monotonic() - self._began) / max(self.done - self.start, 1)
        seconds = round(mean * (self.total - self.done))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
