"""Where a model lies: a Hugging Face directory, a run that left one, or the default model."""

from pathlib import Path

from aligner.checkpoint.default_model import default_model
from aligner.run.atomic import recover_folder


def model_folder(model: str | Path) -> Path:
    """The Hugging Face directory that `model` means.

    model: such a directory, the folder of a run, which keeps one in policy/, or the default model's name.
    Raises ValueError when it is none of them.
    """
    folder = Path(model)
    if not folder.is_dir():
        return default_model(str(model))
    recover_folder(folder / "policy")
    if (folder / "policy" / "config.json").is_file():
        return folder / "policy"
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{str(folder)!r} is neither a run with a saved policy/ nor a model directory (config.json, "
            "*.safetensors, tokenizer.json); give the folder that a run printed."
        )
    return folder
