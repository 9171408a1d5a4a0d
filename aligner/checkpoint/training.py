"""Training checkpoints: RUN/checkpoints/step-<k>/, each one atomic folder from which the run continues exactly."""

from pathlib import Path

import torch

from aligner.run.atomic import atomic_folder


def save(run: Path, step: int, state: dict) -> Path:
    """Write `state` (nested dicts of tensors and plain values) as the checkpoint of `step` and return its folder."""
    folder = Path(run) / "checkpoints" / f"step-{step}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder) as new:
        try:
            torch.save({"step": step, **state}, new / "state.pt")
        except RuntimeError as error:  # torch's writer reports a full disk as an iostream error
            raise OSError(
                f"the checkpoint {folder} could not be written ({error}); free some disk space and --resume from the "
                "older checkpoint, which is untouched."
            ) from error
    return folder


def latest(run: Path) -> Path:
    """The newest checkpoint of a run. Raises ValueError when there is none."""
    folders = [f for f in (Path(run) / "checkpoints").glob("step-*") if (f / "state.pt").is_file()]
    if not folders:
        raise ValueError(f"{str(run)!r} has no checkpoints/step-*/state.pt; give a run folder, or leave --resume out.")
    return max(folders, key=lambda folder: int(folder.name.removeprefix("step-")))


def load(folder: Path) -> dict:
    """The state written by save(), with its "step"."""
    return torch.load(Path(folder) / "state.pt", weights_only=True)
