"""Weights of a GPU by their handles, with a stand-in of CUDA's driver, whose memory is POSIX shared memory."""

import ctypes
import gc
import subprocess
import time
import uuid
from pathlib import Path

import pytest
import torch

from aligner.models.low_rank import LowRank
from aligner.refit import device_memory
from aligner.refit.shared import ExportedWeights, SharedSource
from tests.refit.standin import Engine
from tests.refit.test_extension import SMALL, Trainer, TrainerRank, after, attach, is_at, refit, shape_of

HERE = Path(__file__).parent


class Device:
    """Memory of a GPU, as the stand-in has it."""

    def __init__(self, library: Path):
        self.driver = ctypes.CDLL(str(library))
        self.driver.fake_alloc.restype = ctypes.c_uint64
        self.names: list[str] = []

    def memory(self, size: int, shareable: bool = True) -> torch.Tensor:
        self.names.append(f"aligner-test-{uuid.uuid4().hex}")
        pointer = self.driver.fake_alloc(self.names[-1].encode(), ctypes.c_size_t(size), int(shareable))
        return torch.frombuffer((ctypes.c_uint8 * size).from_address(pointer), dtype=torch.uint8)

    def put(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copies in one allocation, as a trainer's parameters lie in one buffer."""
        memory, at, placed = self.memory(sum(4 * t.numel() + 256 for t in tensors.values())), 0, {}
        for name, t in tensors.items():
            at += 256
            placed[name] = memory[at : at + 4 * t.numel()].view(torch.float32).view(t.shape).copy_(t)
            at += 4 * t.numel()
        return placed


@pytest.fixture
def device(tmp_path, monkeypatch):
    library = tmp_path / "libcuda.so.1"
    subprocess.run(["gcc", "-shared", "-fPIC", "-Wall", "-Werror", HERE / "fake_driver.c", "-o", library], check=True)
    monkeypatch.setattr(device_memory, "LIBRARY", str(library))
    device_memory._driver.cache_clear()
    yield (made := Device(library))
    device_memory._driver.cache_clear()
    for name in made.names:
        Path("/dev/shm", name).unlink(missing_ok=True)


class OnDevice(TrainerRank):
    """A trainer's rank whose parameters are on the device."""

    device: Device
    adapters: dict[str, tuple] = {}

    def step(self, full: dict) -> None:
        super().step(full)
        if not hasattr(self, "placed"):
            self.placed = self.device.put(self.held)
        for name, t in self.held.items():
            self.placed[name].copy_(t)

    def weight(self, name: str):
        if name in self.adapters:
            return LowRank(self.placed[name], *self.adapters[name])
        return self.placed[name]


def on_device(device: Device, tp: int, pp: int) -> Trainer:
    """A trainer that publishes by handle."""
    rank = type("Rank", (OnDevice,), {"device": device, "adapters": {}})
    return type("OnDeviceTrainer", (Trainer,), {"rank": rank, "publisher": ExportedWeights})(SMALL, tp, pp)


@pytest.fixture
def trainer(device):
    yield (made := on_device(device, 2, 2))
    made.close()


def test_a_tensor_is_found_again_by_handle_and_offset(device):
    memory = device.memory(4096)
    tensor = memory[1024:1040].view(torch.float32)
    tensor.copy_(torch.arange(4.0))
    handle, begin, size = device_memory.handle_of(tensor)
    assert (len(handle), begin, size) == (64, 1024, 4096)
    opened, close = device_memory.open_handle(handle, size, torch.device("cpu"))
    assert opened.data_ptr() != memory.data_ptr() and opened[1024:1040].view(torch.float32).tolist() == [0, 1, 2, 3]
    tensor[0] = 7
    assert opened[1024:1028].view(torch.float32).item() == 7 and device.driver.fake_opened() == 1
    close()
    assert device.driver.fake_opened() == 0
    with pytest.raises(ValueError, match=r"CUDA error 1\); take expandable_segments:True out"):
        device_memory.handle_of(device.memory(64, shareable=False))
    with pytest.raises(ValueError, match="cannot open the trainer's memory .CUDA error 400."):
        device_memory.open_handle(b"/nobody" + bytes(57), 64, torch.device("cpu"))


def test_an_engine_reads_the_trainers_memory_where_it_lies(device, trainer):
    engine = Engine(shape_of(SMALL), 2)
    plans = attach(engine, trainer)
    for version in (0, 1, 2):
        trainer.publish(after(version), version)
        refit(engine, version, plans)
        assert is_at(engine, version)
    # Nothing of it was copied: the files hold headers only.
    sizes = [(Path("/dev/shm") / f"aligner-refit-{name}").stat().st_size for name in trainer.names]
    held = [sum(4 * t.numel() for t in rank.held.values()) for rank in trainer.ranks]
    header = [published._board._room for published in trainer.published]
    assert all(size <= room + 128 for size, room in zip(sizes, header, strict=True)) and min(held) > 1000
    # One handle a buffer, opened once by each engine rank.
    assert device.driver.fake_opened() == 2 * len(trainer.ranks)
    del engine
    gc.collect()
    end = time.monotonic() + 5
    while device.driver.fake_opened() and time.monotonic() < end:
        time.sleep(0.01)
    assert device.driver.fake_opened() == 0


def test_adapters_are_merged_by_who_reads(device, trainer):
    """The product goes straight into the engine, and equals the merged weight."""
    name, g = "decoder.layers.0.mlp.linear_fc2.weight", torch.Generator().manual_seed(3)
    for rank in trainer.ranks[:2]:
        rows, columns = rank.held[name].shape
        b, a = torch.randn(rows, 2, generator=g), torch.randn(2, columns, generator=g)
        placed = device.put({"b": b, "a": a})
        rank.adapters = {name: (placed["b"], placed["a"], 0.5)}
    engine = Engine(shape_of(SMALL), 1)
    plans = attach(engine, trainer)
    trainer.publish(after(0), 0)
    refit(engine, 0, plans)
    got = engine.workers[0].read("model.layers.0.mlp.down_proj.weight")
    parts = []
    for rank in trainer.ranks[:2]:
        b, a, scale = rank.adapters[name]
        parts.append(rank.held[name].double() + scale * b.double() @ a.double())
    assert (got - torch.cat(parts, 1)).abs().max() < 1e-5
    assert not torch.equal(got, torch.cat([rank.held[name] for rank in trainer.ranks[:2]], 1))


def test_parameters_that_moved_are_a_new_epoch(device, trainer):
    """The engine opens what is told anew; who still reads the old place is refused."""
    engine = Engine(shape_of(SMALL), 2)
    plans = attach(engine, trainer)
    trainer.publish(after(0), 0)
    refit(engine, 0, plans)
    rank = trainer.ranks[1]
    old = rank.placed
    rank.placed = device.put(rank.held)
    for t in old.values():
        t.fill_(torch.nan)
    trainer.publish(after(1), 1)
    refit(engine, 1, plans)
    assert is_at(engine, 1)
    source = SharedSource(trainer.names)
    source.wait(1)
    rank.placed = device.put(rank.held)
    trainer.publish(after(2), 1)
    with pytest.raises(RuntimeError, match="lies elsewhere now; ask for the version again"):
        source.weights(["1/" + next(iter(rank.held))])
    source.wait(1)
    assert torch.equal(source.weights(["1/" + next(iter(rank.held))])[0], next(iter(rank.held.values())))


def test_weights_that_cannot_be_exported(device):
    rank = on_device(device, 1, 1).ranks[0]
    name = next(n for n, t in rank.held.items() if t.dim() == 2)
    rank.placed[name] = rank.placed[name].T.contiguous().T
    with pytest.raises(ValueError, match="is not contiguous, and cannot be read by its handle"):
        ExportedWeights(uuid.uuid4().hex, rank)
