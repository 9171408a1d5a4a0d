"""The folder of a run: config.yaml, metrics.jsonl, samples.jsonl, tensorboard/, and whatever the program adds."""

import json
import math
import shutil
import time
from pathlib import Path

from aligner.run.atomic import atomic_write
from aligner.run.distributed import gather, is_main

CONFIG, METRICS, SAMPLES, TENSORBOARD = "config.yaml", "metrics.jsonl", "samples.jsonl", "tensorboard"


class RunDirectory:
    """An open run folder; `path` is its pathlib.Path. Make one with `RunDirectory.create`."""

    def __init__(self, path: Path):
        self.path = path
        self._files = {}
        self._tensorboard = None
        self._purge_step = None

    @staticmethod
    def create(path: Path | None, program: str, config_yaml: str, resume: bool, needed_bytes: int) -> "RunDirectory":
        """Make or reopen the folder, after checking now what would otherwise fail after hours.

        All ranks call it; the first one does it, and later writes what any of them logs.

        path: the folder; None for runs/<program>-<time>.
        program: its name in that default.
        config_yaml: the resolved config, saved as config.yaml.
        resume: go on with the run that the folder holds.
        needed_bytes: bytes of free disk that the whole run will want.
        Raises ValueError: not creatable or writable, too little space, holds a run (or none, with resume).
        """
        return RunDirectory(
            gather(lambda: _create(path, program, config_yaml, resume, needed_bytes) if is_main() else None)[0]
        )

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append one line to metrics.jsonl and the same scalars to TensorBoard.

        step: 1-based number of the finished step.
        metrics: names to numbers. Raises ValueError, and writes nothing, when one of them is not finite.
        """
        numbers = {name: float(value) for name, value in metrics.items()}
        for name, value in numbers.items():
            if not math.isfinite(value):
                raise ValueError(
                    f"metric {name!r} is {value} at step {step}, expected a finite number; "
                    "resume from the last checkpoint with a lower learning rate."
                )
        if not is_main():
            return
        self._append(METRICS, [{"step": step, **numbers}])
        writer = self._writer()
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    def samples(self, rows: list[dict]) -> None:
        """Append rows to samples.jsonl, each with step, split ("train" or "eval"), prompt, response and reward."""
        if is_main():
            self._append(SAMPLES, rows)

    def truncate(self, step: int) -> None:
        """Forget everything logged after `step`, and a last line that a crash cut short: call it on resume."""
        self._close_files()
        self._purge_step = step + 1
        for name in (METRICS, SAMPLES):
            if is_main() and (self.path / name).exists():
                rows = [row for row in read_jsonl(self.path / name) if row["step"] <= step]
                atomic_write(self.path / name, "".join(json.dumps(row) + "\n" for row in rows))

    def close(self) -> None:
        """Close the files; nothing can be logged after."""
        self._close_files()
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None

    def _append(self, name: str, rows: list[dict]) -> None:
        if name not in self._files:
            self._files[name] = (self.path / name).open("a", encoding="utf-8")
        self._files[name].write("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
        self._files[name].flush()

    def _writer(self):
        if self._tensorboard is None:
            from torch.utils.tensorboard import SummaryWriter  # imported late: it takes a second

            self._tensorboard = SummaryWriter(str(self.path / TENSORBOARD), purge_step=self._purge_step)
        return self._tensorboard

    def _close_files(self) -> None:
        for file in self._files.values():
            file.close()
        self._files = {}


def read_jsonl(path: Path) -> list[dict]:
    """The objects of a JSON-lines file; a last line that a crash cut short is left out.

    Raises ValueError that names file and line when any other line is not JSON.
    """
    rows, lines = [], Path(path).read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError:
            if number < len(lines):
                raise ValueError(f"{path}:{number} is not valid JSON; remove that line.") from None
    return rows


def _create(path: Path | None, program: str, config_yaml: str, resume: bool, needed_bytes: int) -> Path:
    if resume and path is None:
        raise ValueError("--resume needs the folder of the run to go on with; add --output FOLDER.")
    path = Path(path) if path is not None else Path("runs") / f"{program}-{time.strftime('%Y%m%d-%H%M%S')}"
    holds_run = any((path / name).exists() for name in (CONFIG, METRICS))
    if holds_run and not resume:
        raise ValueError(
            f"{str(path)!r} already holds a run; add --resume to go on with it or choose another --output."
        )
    if resume and not holds_run:
        raise ValueError(f"{str(path)!r} holds no run to resume; check --output or leave --resume out.")
    _check_writable(path)
    free = shutil.disk_usage(path).free
    if free < needed_bytes:
        raise ValueError(
            f"{str(path)!r} is on a disk with {free / 1e9:.1f} GB free, the run needs {needed_bytes / 1e9:.1f} GB; "
            "free some space or choose another --output."
        )
    atomic_write(path / CONFIG, config_yaml)
    return path


def _check_writable(path: Path) -> None:
    probe = path / ".probe"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"probe")
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"cannot write to the run folder {str(path)!r} ({error.strerror}); choose another --output."
        ) from error
