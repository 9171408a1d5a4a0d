"""Training checkpoints: RUN/checkpoints/step-<k>/, each one atomic folder from which the run continues exactly.

The format is Megatron-core's `torch_dist`: every rank writes its own shards, and the checkpoint loads on any other
parallel layout. Only Megatron's own writer is not used: it starts a manager process and forks, which takes seconds even
for a tiny state and needs a `__main__` guard in every program. torch's writer makes the same files in this process.
"""

import os
import shutil
import warnings
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch.distributed as dist
from megatron.core import dist_checkpointing as megatron
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedObject, is_main_replica
from megatron.core.dist_checkpointing.serialization import (
    get_default_save_common_strategy,
    load_common_state_dict,
    load_sharded_metadata,
)
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess, save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner, mcore_to_pyt_state_dict
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from torch.distributed import checkpoint as torch_checkpoint

from aligner.run.atomic import atomic_folder

T = TypeVar("T")
Failed = Callable[[str], OSError]


def save(run: Path, step: int, state: dict[str, dict]) -> Path:
    """Write `state` as the checkpoint of `step` and return its folder. Every rank calls it.

    run: the run folder, the same one for every rank: with several machines, on a file system that they share.
    state: {part: nested dict of ShardedTensor, ShardedObject and plain values}; a part's name goes before its keys, and
        plain values are taken from rank 0. The ShardedTensors inside are renamed by it, so build the dict for the call.
    Raises OSError on every rank when any of them could not write; the older checkpoint is then untouched.
    """
    folder, first = Path(run) / "checkpoints" / f"step-{step}", dist.get_rank() == 0

    def failed(reason: str) -> OSError:
        return OSError(
            f"the checkpoint {folder} could not be written ({reason}); free some disk space and --resume from the "
            "older checkpoint, which is untouched."
        )

    with ExitStack() as stack:  # holds, on rank 0, the folder that is renamed at the end or removed
        sharded, plain = _together(failed, lambda: save_preprocess({"step": step, **_named(state)}))
        new = _together(failed, lambda: stack.enter_context(atomic_folder(folder)) if first else None)
        new = _gather(new)[0]
        _together(failed, lambda: _check_shared(new))
        _write_shards(failed, new, sharded)

        def finish() -> None:
            get_default_save_common_strategy().save_common(plain, new)
            save_config(CheckpointingConfig("torch_dist"), new)
            stack.close()

        _together(failed, lambda: finish() if first else None)
    return folder


def steps(run: Path) -> list[int]:
    """Steps of the checkpoints of a run, ascending."""
    folders = (Path(run) / "checkpoints").glob("step-*")
    return sorted(int(folder.name.removeprefix("step-")) for folder in folders if _is_complete(folder))


def latest(run: Path, step: int | None = None) -> Path:
    """The newest checkpoint of a run, or that of `step`. Raises ValueError when there is none."""
    found = steps(run)
    if not found:
        raise ValueError(
            f"{str(run)!r} has no checkpoints/step-*/metadata.json; give a run folder, or leave --resume out."
        )
    if step is not None and step not in found:
        raise ValueError(
            f"{str(run)!r} has no checkpoint of step {step}, only of {', '.join(map(str, found))}; choose one of them."
        )
    return Path(run) / "checkpoints" / f"step-{found[-1] if step is None else step}"


def set_aside(checkpoint: Path) -> None:
    """Rename the newer checkpoints of its run to left-<k>, so that what goes on from it finds none. On one rank."""
    folder, number = checkpoint.parent, int(checkpoint.name.removeprefix("step-"))
    for newer in (k for k in steps(folder.parent) if k > number):
        shutil.rmtree(folder / f"left-{newer}", ignore_errors=True)
        os.rename(folder / f"step-{newer}", folder / f"left-{newer}")


def read_plain(folder: Path) -> dict:
    """The plain values of a checkpoint, its "step" among them, without any tensor. Needs no process group."""
    if not _is_complete(folder):
        raise ValueError(
            f"{str(folder)!r} is not a training checkpoint: it has no metadata.json and common.pt; give a folder "
            "RUN/checkpoints/step-<k> that this version wrote."
        )
    return load_common_state_dict(str(folder))


def load(folder: Path, template: dict[str, dict]) -> dict:
    """The state written by save(), with its "step". Every rank calls it.

    template: what save() would take now, on the layout of now; tensors are filled in place and returned too.
    Raises ValueError, the same on every rank, when the checkpoint holds other tensors or other shapes.
    """
    folder, template = Path(folder), _named(template)
    read_plain(folder)

    def failed(reason: str) -> OSError:
        return OSError(f"the checkpoint {folder} could not be read ({reason}).")

    saved, mine = _together(
        failed, lambda: (_shapes(load_sharded_metadata(str(folder))), _shapes(load_preprocess(template)[0]))
    )
    wanted = {key: shape for shapes in _gather(mine) for key, shape in shapes.items()}
    differing = [key for key in sorted(wanted | saved) if not _fits(wanted.get(key), saved.get(key))]
    if differing:
        lines = [f"{k} is {_words(saved.get(k))} there and {_words(wanted.get(k))} here" for k in differing[:3]]
        more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise ValueError(
            f"the checkpoint {folder} holds another model or optimizer than this configuration: {'; '.join(lines)}"
            f"{more}; resume with the options that the run was started with (see its config.yaml)."
        )
    try:
        with warnings.catch_warnings():  # Megatron calls torch's reader by its former name
            warnings.simplefilter("ignore", FutureWarning)
            return megatron.load(template, str(folder))
    except torch_checkpoint.CheckpointException as error:
        raise failed(_reason({rank: cause for rank, (cause, _) in error.failures.items()})) from error


class Trained(Protocol):
    """A network: models.policy.Policy, models.critic.Critic."""

    def state_dict(self, *, loading: bool) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...


def restore(folder: Path, networks: dict[str, Trained]) -> None:
    """Let each network go on from its part of a checkpoint. Every rank calls it; raises as load() does."""
    state = load(folder, {part: network.state_dict(loading=True) for part, network in networks.items()})
    for part, network in networks.items():
        network.load_state_dict(state[part])


def _named(state: dict[str, dict]) -> dict[str, dict]:
    for part, content in state.items():
        add_prefix_for_sharding(content, f"{part}.")
    return state


def _write_shards(failed: Failed, new: Path, sharded: dict) -> None:
    shards = defaultdict(list)
    for shard in nested_values(sharded):
        if is_main_replica(shard.replica_id):
            shards[shard.unique_key if isinstance(shard, ShardedObject) else shard.key].append(shard)
    try:
        torch_checkpoint.save(
            mcore_to_pyt_state_dict(shards),
            storage_writer=torch_checkpoint.FileSystemWriter(new),
            planner=MCoreSavePlanner(flatten_state_dict=False),
        )
    except torch_checkpoint.CheckpointException as error:
        raise failed(_reason({rank: cause for rank, (cause, _) in error.failures.items()})) from error


def _check_shared(new: Path) -> None:
    if not new.is_dir():
        raise OSError("the run folder is not on a file system that all machines share")


def _together(failed: Failed, action: Callable[[], T]) -> T:
    """Run `action` on every rank; when it fails on any of them, `failed(reason)` is raised on all of them."""
    try:
        result, error = action(), None
    except Exception as raised:  # whatever it is, the other ranks must not wait for this one
        result, error = None, raised
    failures = {rank: text for rank, text in enumerate(_gather(error and str(error))) if text is not None}
    if failures:
        raise failed(_reason(failures)) from error
    return result


def _reason(failures: dict[int, object]) -> str:
    rank = min(failures)
    return f"rank {rank}: {failures[rank]}"


def _gather(value: T) -> list[T]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _is_complete(folder: Path) -> bool:
    return all((Path(folder) / name).is_file() for name in ("metadata.json", "common.pt"))


def _shapes(sharded: dict) -> dict[str, tuple[int | None, ...]]:
    """{key: global shape}; None for a size that may differ, the rows of an embedding padded for tensor parallelism."""
    shapes = {}
    for shard in nested_values(sharded):
        if isinstance(shard, ShardedBase):
            shape = tuple(shard.global_shape)
            shapes[shard.key] = (None, *shape[1:]) if getattr(shard, "allow_shape_mismatch", False) else shape
    return shapes


def _fits(wanted: tuple | None, saved: tuple | None) -> bool:
    if wanted is None or saved is None or len(wanted) != len(saved):
        return False
    return all(w is None or w == s for w, s in zip(wanted, saved, strict=True))


def _words(shape: tuple | None) -> str:
    return "missing" if shape is None else f"of shape {shape}"
