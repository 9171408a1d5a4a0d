"""Hugging Face model directories: checked first, read in windows, written atomically and file by file."""

import json
import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from aligner.run.atomic import atomic_folder
from aligner.run.json_file import read_object

INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9
MAPPED_BYTES = 256 << 20  # a file is opened again after so much of it was read
# Weights in other formats and lists of their files: all that `write` does not take over from another directory.
_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")

Shape = tuple[int, ...]


class Weights:
    """The tensors of a model directory: `window(name, start, size)` reads a box of one, `weights(name)` all of it.

    Nothing is read before it is asked for, and what is returned is float32.

    expected: name -> shape that the network needs. Raises ValueError, before anything is loaded, unless the directory's
    safetensors are all there and hold these tensors, of these shapes, and no others.
    """

    def __init__(self, folder: Path, expected: dict[str, Shape]):
        folder = Path(folder)
        files, listed = _files(folder)
        self._homes: dict[str, tuple[Path, Shape]] = {}
        for file in files:
            reader = _open(file)
            for name in reader.keys():  # noqa: SIM118 - safe_open is not a mapping
                self._homes[name] = file, tuple(reader.get_slice(name).get_shape())
        absent = [name for name in listed if name not in self._homes]
        if absent:
            raise ValueError(
                f"{folder / INDEX}: {len(absent)} tensors that it lists are in none of its files, the first is "
                f"{absent[0]!r}; copy the index and the files again, from one model."
            )
        _check(folder, {name: shape for name, (_, shape) in self._homes.items()}, expected)
        self._last: tuple[Path, safe_open] | None = None
        self._mapped = 0

    def window(self, name: str, start: Sequence[int], size: Sequence[int]) -> Tensor:
        """The box of `size` at `start` of the tensor `name`; not to be written to."""
        file, shape = self._homes[name]
        if self._last is None or self._last[0] != file or self._mapped > MAPPED_BYTES:
            # What was read of a mapped file counts as this process's memory until the file is closed.
            self._last, self._mapped = None, 0
            self._last = file, _open(file)
        self._mapped += 4 * size[0] * math.prod(shape[1:])
        box = tuple(slice(first, first + count) for first, count in zip(start, size, strict=True))
        return self._last[1].get_slice(name)[box].to(torch.float32)

    def __call__(self, name: str) -> Tensor:
        _, shape = self._homes[name]
        return self.window(name, [0] * len(shape), shape)


def _files(folder: Path) -> tuple[list[Path], list[str]]:
    """The weight files, those that transformers would take, and the tensors that an index lists."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"], []
    index = folder / INDEX
    if not index.is_file():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ValueError(f"model folder {str(folder)!r} has no *.safetensors; convert the weights to safetensors.")
        return files, []
    homes = read_object(index).get("weight_map")
    if not isinstance(homes, dict) or not all(isinstance(file, str) for file in homes.values()):
        raise ValueError(f"{index}: it has no weight_map from tensors to files; copy it again.")
    names = sorted(set(homes.values()))
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise ValueError(
            f"{index}: {len(absent)} of its {len(names)} files are not there, {_some(absent)}; copy them beside it."
        )
    return [folder / name for name in names], list(homes)


def _open(file: Path) -> safe_open:
    try:
        return safe_open(file, "pt")
    except SafetensorError as error:
        raise ValueError(f"{file}: not a complete safetensors file ({error}); copy it again.") from error


def _check(folder: Path, got: dict[str, Shape], expected: dict[str, Shape]) -> None:
    missing = [name for name in expected if name not in got]
    if missing:
        raise ValueError(
            f"{folder}: {len(missing)} tensors of its config.json are missing, the first is {missing[0]!r}."
        )
    for name, shape in expected.items():
        if got[name] != tuple(shape):
            raise ValueError(
                f"{folder}: tensor {name!r} has shape {got[name]}, expected {tuple(shape)} by config.json."
            )
    # Old files hold rotary frequencies, which follow from the config; tied ones sometimes the embedding a second time.
    odd = [name for name in got if name not in expected and not name.endswith(".rotary_emb.inv_freq")]
    odd = [name for name in odd if name != "lm_head.weight"]
    if odd:
        raise ValueError(
            f"{folder}: {len(odd)} tensors are not of the network of its config.json, {_some(odd)}; "
            "give the config.json that belongs to the weights."
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def write(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    like: Path,
    *,
    changes: dict[str, dict] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Write a model directory atomically: `tensors` with the config and the tokenizer of the directory `like`.

    Of several ranks rank 0 writes; the others only exhaust their `tensors`, which send it their parts (as
    models.weights.export does), and return when the directory is there.

    tensors: (name, tensor), all of one dtype, which config.json will say. A file is written as soon as it is full.
    changes: {JSON file: {key: value}} in which it differs from `like`.
    max_shard_bytes: of a file's tensors; a larger tensor has a file of its own.
    group: the ranks; None for the default group, or for no other rank without it.
    Raises OSError on every rank when rank 0 cannot write.
    """
    tensors = iter(tensors)
    ranks = dist.get_world_size(group) if dist.is_initialized() else 1
    if ranks == 1:
        _write_folder(Path(folder), tensors, Path(like), changes or {}, max_shard_bytes)
        return
    failure = None
    if dist.get_rank(group) == 0:
        try:
            _write_folder(Path(folder), tensors, Path(like), changes or {}, max_shard_bytes)
        except OSError as error:
            failure = error
    for _ in tensors:  # also after a failure: the other ranks wait until what they send is taken
        pass
    words = [failure and str(failure)]
    dist.broadcast_object_list(words, group=group, group_src=0)
    if words[0] is not None:
        raise failure or OSError(words[0])


def _write_folder(
    folder: Path, tensors: Iterator[tuple[str, Tensor]], like: Path, changes: dict[str, dict], max_shard_bytes: int
) -> None:
    with atomic_folder(folder) as new:
        for file in like.iterdir():
            if file.is_file() and not file.name.endswith(_WEIGHT_FILES):
                shutil.copy(file, new / file.name)
        dtype = _write_shards(new, tensors, max_shard_bytes)
        config = read_object(new / "config.json")
        config.pop("torch_dtype", None)  # what dtype was called before
        config["dtype"] = str(dtype).removeprefix("torch.")
        (new / "config.json").write_text(json.dumps(config, indent=2))
        for name, values in changes.items():
            (new / name).write_text(json.dumps(read_object(new / name) | values, indent=2))


def _write_shards(folder: Path, tensors: Iterator[tuple[str, Tensor]], max_shard_bytes: int) -> torch.dtype:
    """Returns the tensors' dtype."""
    shard: dict[str, Tensor] = {}
    homes: dict[str, int] = {}
    count = total = size = 0

    def flush() -> None:
        nonlocal count, size
        try:
            save_file(shard, folder / f"model-{count:05d}.safetensors", metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"the model in {folder} could not be written ({error}); free some disk space.") from error
        shard.clear()
        count, size = count + 1, 0

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > max_shard_bytes:
            flush()
        shard[name], homes[name] = tensor, count
        size, total = size + tensor.nbytes, total + tensor.nbytes
    dtype = tensor.dtype
    flush()
    if count == 1:
        (folder / "model-00000.safetensors").rename(folder / "model.safetensors")
        return dtype
    for i in range(count):
        (folder / f"model-{i:05d}.safetensors").rename(folder / f"model-{i + 1:05d}-of-{count:05d}.safetensors")
    index = {name: f"model-{i + 1:05d}-of-{count:05d}.safetensors" for name, i in homes.items()}
    document = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / INDEX).write_text(json.dumps(document, indent=2))
    return dtype
