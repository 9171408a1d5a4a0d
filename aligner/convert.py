"""Write a model in another dtype or in other files: `python -m aligner.convert --model FOLDER --output FOLDER`."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from aligner.checkpoint import huggingface
from aligner.models.shape import ModelShape
from aligner.run import config as options


@dataclass(frozen=True, kw_only=True)
class Config:
    model: Path
    """A Hugging Face model directory."""
    output: Path
    """The directory to write; it must be new or empty."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights that are written."""
    max_shard_gb: float = huggingface.MAX_SHARD_BYTES / 1e9
    """Size limit of a file, 1e9 bytes."""

    def __post_init__(self):
        if self.max_shard_gb <= 0:
            raise ValueError(f"--max-shard-gb is {self.max_shard_gb}, expected a number above 0.")


def cast(tensors: Iterator[tuple[str, Tensor]], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Raises ValueError for a number that becomes infinite."""
    for name, tensor in tensors:
        if dtype == torch.float16 and tensor.abs().max() > torch.finfo(dtype).max:
            raise ValueError(f"{name} holds {tensor.abs().max():g}, which float16 cannot; take --dtype bfloat16.")
        yield name, tensor.to(dtype)


def main(argv: list[str] | None = None) -> int:
    config, start = options.parse(Config, argv), time.monotonic()
    if config.output.exists() and (not config.output.is_dir() or any(config.output.iterdir())):
        raise ValueError(f"--output {str(config.output)!r} is there already and not empty; choose another folder.")
    shape = ModelShape.from_folder(config.model)
    read = huggingface.Weights(config.model, shape.tensors())
    huggingface.write(
        config.output,
        cast(((name, read(name)) for name in shape.tensors()), getattr(torch, config.dtype)),
        like=config.model,
        max_shard_bytes=int(config.max_shard_gb * 1e9),
    )
    written = sum(file.stat().st_size for file in config.output.glob("*.safetensors"))
    seconds = time.monotonic() - start
    print(f"{config.output}: {len(shape.tensors())} tensors, {written:,} bytes in {config.dtype}, {seconds:.1f} s")
    return 0


if __name__ == "__main__":
    options.user_errors(main)
