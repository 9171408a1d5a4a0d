"""Hugging Face model directories: checked before they are read, written atomically."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from aligner.run.atomic import atomic_folder

_MAX_SHARD_BYTES = 5 * 1024**3


class Weights:
    """The tensors of a model directory, opened lazily: `weights(name) -> tensor` in float32.

    expected: name -> shape that the network needs. Raises ValueError, before anything is loaded, when the directory
    has no safetensors or a tensor is missing or of another shape.
    """

    def __init__(self, folder: Path, expected: dict[str, tuple[int, ...]]):
        folder = Path(folder)
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ValueError(f"model folder {str(folder)!r} has no *.safetensors; convert the weights to safetensors.")
        self._home = {}
        for file in files:
            try:
                reader = safe_open(file, "pt")
            except SafetensorError as error:
                raise ValueError(f"{file}: not a complete safetensors file ({error}); copy it again.") from error
            self._home |= {name: reader for name in reader.keys()}  # noqa: SIM118 - safe_open is not a mapping
        missing = [name for name in expected if name not in self._home]
        if missing:
            raise ValueError(
                f"{folder}: {len(missing)} tensors of its config.json are missing, the first is {missing[0]!r}."
            )
        for name, shape in expected.items():
            got = tuple(self._home[name].get_slice(name).get_shape())
            if got != tuple(shape):
                raise ValueError(f"{folder}: tensor {name!r} has shape {got}, expected {tuple(shape)} by config.json.")
        self._last: tuple[str, Tensor] | None = None

    def __call__(self, name: str) -> Tensor:
        # Neighbouring segments of a manifest often read the same tensor: keep the last one.
        if self._last is None or self._last[0] != name:
            self._last = (name, self._home[name].get_tensor(name).to(torch.float32))
        return self._last[1]


def write(folder: Path, tensors: Iterable[tuple[str, Tensor]], like: Path) -> None:
    """Write a model directory atomically: `tensors` with the config and the tokenizer of the directory `like`."""
    with atomic_folder(Path(folder)) as new:
        for file in Path(like).iterdir():
            if file.is_file() and not file.name.endswith((".safetensors", ".safetensors.index.json")):
                shutil.copy(file, new / file.name)
        config = json.loads((new / "config.json").read_text())
        (new / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2))
        _write_shards(new, tensors)


def _write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    shard: dict[str, Tensor] = {}
    homes: dict[str, int] = {}
    count = total = size = 0

    def flush() -> None:
        nonlocal shard, count, size
        try:
            save_file(shard, folder / f"model-{count:05d}.safetensors", metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"the model in {folder} could not be written ({error}); free some disk space.") from error
        shard, count, size = {}, count + 1, 0

    for name, tensor in tensors:
        num_bytes = tensor.numel() * tensor.element_size()
        if shard and size + num_bytes > _MAX_SHARD_BYTES:
            flush()
        shard[name], homes[name] = tensor, count
        size, total = size + num_bytes, total + num_bytes
    flush()
    if count == 1:
        (folder / "model-00000.safetensors").rename(folder / "model.safetensors")
        return
    for i in range(count):
        (folder / f"model-{i:05d}.safetensors").rename(folder / f"model-{i + 1:05d}-of-{count:05d}.safetensors")
    index = {name: f"model-{i + 1:05d}-of-{count:05d}.safetensors" for name, i in homes.items()}
    document = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(document, indent=2))
