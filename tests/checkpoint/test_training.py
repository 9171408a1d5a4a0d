"""Checkpoints: exact, whole or not there on every rank, and loadable on another layout."""

import resource
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor

from aligner.checkpoint import training

WORLD = 4
FULL = torch.arange(32.0).reshape(8, 4)


def state(step: int, value: torch.Tensor = FULL, *offsets: tuple[int, int, int]) -> dict:
    """Two parts with the same key; `offsets` are (axis, index, pieces) of this rank's piece."""
    rank = dist.get_rank()
    for axis, index, pieces in offsets:
        value = value.chunk(pieces, axis)[index]
    split = {"w": ShardedTensor.from_rank_offsets("w", value * step, *offsets, replica_id=0 if offsets else rank)}
    same = {"w": ShardedTensor.from_rank_offsets("w", torch.full((3,), 10.0 * step), replica_id=rank)}
    return {
        "policy": {"model": split, "schedule": {"lr": 0.1 * step}, "groups": [{"wd": 1.0}]},
        "critic": {"model": same, "order": ShardedObject("order", [step, "x"], (1,), (0,), replica_id=rank)},
    }


def check(loaded: dict, step: int, value: torch.Tensor) -> None:
    assert loaded["step"] == step
    assert torch.equal(loaded["policy"]["model"]["w"], value * step)
    assert loaded["policy"]["schedule"] == {"lr": 0.1 * step} and loaded["policy"]["groups"] == [{"wd": 1.0}]
    assert torch.equal(loaded["critic"]["model"]["w"], torch.full((3,), 10.0 * step))
    assert loaded["critic"]["order"] == [step, "x"]


def test_one_process_saves_and_loads(tmp_path):
    with pytest.raises(ValueError, match="no checkpoints"):
        training.latest(tmp_path)
    children = psutil.Process().children(recursive=True)
    for step in (9, 10, 2):
        assert training.save(tmp_path, step, state(step)).name == f"step-{step}"
    assert psutil.Process().children(recursive=True) == children
    newest = training.latest(tmp_path)
    assert newest.name == "step-10" and training.read_plain(newest)["step"] == 10
    check(training.load(newest, state(0)), 10, FULL)
    assert sorted(f.name for f in newest.parent.iterdir()) == ["step-10", "step-2", "step-9"]
    training.save(tmp_path, 10, state(3) | {"extra": {"x": 1}})  # the same step again replaces it
    assert training.load(newest, state(0))["extra"] == {"x": 1}


def test_another_model_is_refused_by_name(tmp_path):
    folder = training.save(tmp_path, 1, state(1))
    with pytest.raises(ValueError, match=r"policy\.w is of shape \(8, 4\) there and of shape \(8, 5\) here"):
        training.load(folder, state(0, torch.zeros(8, 5)))
    more = state(0)
    more["policy"]["model"]["b"] = ShardedTensor.from_rank_offsets("b", torch.zeros(2))
    with pytest.raises(ValueError, match=r"policy\.b is missing there and of shape \(2,\) here; resume with"):
        training.load(folder, more)
    with pytest.raises(ValueError, match=r"policy\.w is of shape \(8, 4\) there and missing here"):
        training.load(folder, {"critic": state(0)["critic"]})


def test_a_folder_without_metadata_is_refused(tmp_path):
    folder = training.save(tmp_path, 1, state(1))
    (folder / "metadata.json").unlink()
    with pytest.raises(ValueError, match="not a training checkpoint"):
        training.load(folder, state(0))
    with pytest.raises(ValueError, match="no checkpoints"):
        training.latest(tmp_path)


def test_a_truncated_file_is_an_error_that_names_the_checkpoint(tmp_path):
    folder = training.save(tmp_path, 1, state(1))
    (shard,) = folder.glob("*.distcp")
    shard.write_bytes(shard.read_bytes()[:40])
    with pytest.raises(OSError, match="step-1 could not be read"):
        training.load(folder, state(0))


def test_four_processes(tmp_path):
    training.save(tmp_path / "one", 1, state(1))
    mp.start_processes(four_processes, args=(tmp_path,), nprocs=WORLD, start_method="forkserver")
    check(training.load(training.latest(tmp_path / "four"), state(0)), 1, FULL)


def four_processes(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=WORLD)
    run = folder / "four"
    training.save(run, 1, state(1, FULL, (0, rank, WORLD)))
    # A full disk on one rank, at the shards and, for rank 0, at what is written after them.
    failures = [fail_to_save(run, rank == 2), fail_to_save(run, rank == 0)]
    with pytest.MonkeyPatch.context() as m:
        if rank == 0:
            m.setattr(training, "save_config", refuse)
        failures.append(fail_to_save(run, False))
    with pytest.MonkeyPatch.context() as m:
        if rank == 3:
            m.setattr(Path, "is_dir", lambda self: False)
        failures.append(fail_to_save(run, False))
    assert "(rank 2: [Errno 27]" in failures[0] and "(rank 0: [Errno 27]" in failures[1], failures
    assert "(rank 0: No space left)" in failures[2] and "(rank 3: the run folder is not on" in failures[3], failures
    messages = [None] * WORLD
    dist.all_gather_object(messages, failures)
    assert all(m == failures for m in messages)

    # Two by two, from four rows and from one process.
    for saved in (run, folder / "one"):
        offsets = (0, rank // 2, 2), (1, rank % 2, 2)
        loaded = training.load(training.latest(saved), state(0, FULL, *offsets))
        check(loaded, 1, FULL.chunk(2, 0)[rank // 2].chunk(2, 1)[rank % 2])
    template = state(0, FULL, (0, rank, WORLD))
    if rank == 3:
        template["policy"]["model"]["last"] = ShardedTensor.from_rank_offsets("last", torch.zeros(1))
    with pytest.raises(ValueError, match=r"policy\.last is missing there and of shape \(1,\) here"):
        training.load(training.latest(run), template)
    dist.barrier()
    dist.destroy_process_group()


def fail_to_save(run: Path, full_disk: bool) -> str:
    """The message of a save that fails; with `full_disk` this process may not write files of over 1 KB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if full_disk:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    with pytest.raises(OSError, match="step-2 could not be written .* older checkpoint, which is untouched") as error:
        training.save(run, 2, state(2, FULL, (0, dist.get_rank(), WORLD)))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    dist.barrier()  # rank 0 removes the temporary folder
    assert [f.name for f in (run / "checkpoints").iterdir()] == ["step-1"]
    return str(error.value)


def refuse(*_) -> None:
    raise OSError("No space left")
