"""Weights that processes share: each trainer rank publishes its own, and a sampler in another process refits from them.

One file a rank in /dev/shm: the version (-1 while it is written), the epoch of the header, its length, the header, and,
of parameters in host memory, a copy of these. The header is JSON: the manifest, buffers, and the places of each
parameter in them. A buffer is the rest of the file ("file"), or a GPU's memory by its handle ("cuda"); then nothing is
copied, and a new epoch says that something lies elsewhere. The owner holds a lock on the file for as long as it lives,
so that a reader can tell a dead owner and the next owner can remove what a killed one left behind.
(multiprocessing.shared_memory is not used: its resource tracker unlinks a segment when any process that attached to it
ends.)
"""

import fcntl
import json
import mmap
import os
import struct
import time
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from aligner.models.low_rank import LowRank
from aligner.models.weights import join
from aligner.refit.device_memory import handle_of, open_handle
from aligner.refit.plan import Source, compile_plan

FOLDER, PREFIX = Path("/dev/shm"), "aligner-refit-"
ALIGNMENT = 64  # bytes; of a parameter's first one
FIXED = struct.Struct("<qqq")  # version, epoch, length of the header


class SharedWeights:
    """A trainer rank's parameters in shared memory, under a name that the sampler is told too.

    They are copied, adapters merged, so training may go on at once; the next version is published when the sampler has
    committed this one.
    """

    def __init__(self, name: str, source: Source):
        self.source, self._manifest = source, source.manifest()
        self._plan = compile_plan(self._manifest, self._manifest)
        places, end = {}, 0
        for item in self._manifest["tensors"]:
            places[item["name"]] = [{"buffer": 0, "begin": end, "shape": item["shape"], "dtype": item["dtype"]}]
            end += -(-_num_bytes(item) // ALIGNMENT) * ALIGNMENT
        header = {"manifest": self._manifest, "buffers": [{"kind": "file", "bytes": end}], "places": places}
        self._board = _Board(name, header, end)
        self.path = self._board.path
        self._tensors = {name: _tensor(self._board.data, place) for name, (place,) in places.items()}

    def publish(self, version: int) -> None:
        """Copy the source's weights as they are now; readers that wait for `version` go on."""
        self._plan.preflight(self.source, self._manifest, self._tensors)
        self._board.tell(-1)
        self._plan.execute(self.source, self._tensors)
        self._board.tell(version)

    def close(self) -> None:
        """Remove the file; who has it mapped keeps the memory. Also done when the process ends by itself."""
        self._board.close()


class ExportedWeights:
    """A trainer rank's parameters on its GPU, by handle: nothing is copied, and an adapter is merged by who reads.

    They must not change until the sampler has committed a version.
    """

    def __init__(self, name: str, source: Source):
        self.source, self._manifest = source, source.manifest()
        self._board = _Board(name, self._header(), 0)

    def _header(self) -> dict:
        buffers: dict[bytes, int] = {}
        listed, places = [], {}
        names = [item["name"] for item in self._manifest["tensors"]]
        for name, weight in zip(names, self.source.weights(names), strict=True):
            parts = [weight.base, weight.b, weight.a] if isinstance(weight, LowRank) else [weight]
            places[name] = []
            for t in parts:
                if not t.is_contiguous():
                    raise ValueError(f"refit: {name} is not contiguous, and cannot be read by its handle.")
                handle, begin, size = handle_of(t)
                if handle not in buffers:
                    buffers[handle] = len(buffers)
                    listed.append({"kind": "cuda", "handle": handle.hex(), "bytes": size})
                dtype = str(t.dtype).removeprefix("torch.")
                place = {"buffer": buffers[handle], "begin": begin, "shape": list(t.shape), "dtype": dtype}
                places[name].append(place)
            if isinstance(weight, LowRank):
                places[name].append({"scale": weight.scale})
        return {"manifest": self._manifest, "buffers": listed, "places": places}

    def publish(self, version: int) -> None:
        """The parameters as they are now are `version`; readers that wait for it go on."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # what is still being written is another version
        self._board.tell(-1)
        self._board.write(self._header())
        self._board.tell(version)

    def close(self) -> None:
        self._board.close()


class _Board:
    """A rank's file: who owns it writes here. data: what is behind the header, (bytes,) uint8."""

    def __init__(self, name: str, header: dict, data_bytes: int):
        room = 2 * len(json.dumps(header)) + 4096  # the next epoch's may be longer
        start = _data_start(FIXED.size + room)
        self.path, self._room, self._header = FOLDER / (PREFIX + name), start - FIXED.size, None
        self._file = _create(self.path, start + data_bytes)
        self._memory, self._epoch = mmap.mmap(self._file, 0), -1
        self.write(header)
        self.tell(-1)
        self.data = torch.frombuffer(self._memory, dtype=torch.uint8)[start:]
        _give_name(self._file, self.path)
        self.close = weakref.finalize(self, _remove, self.path, self._file, os.getpid())

    def tell(self, version: int) -> None:
        struct.pack_into("<q", self._memory, 0, version)

    def write(self, header: dict) -> None:
        """A new epoch, unless the header says what it said before."""
        text = json.dumps(header | {"start": FIXED.size + self._room}).encode()
        if text == self._header:
            return
        if len(text) > self._room:
            raise RuntimeError(f"refit: a header of {len(text)} bytes, {self._room} were reserved; attach again")
        self._header, self._epoch = text, self._epoch + 1
        self._memory[FIXED.size : FIXED.size + len(text)] = text
        FIXED.pack_into(self._memory, 0, -1, self._epoch, len(text))


class SharedSource:
    """The source of a refit: what all ranks have published, one name a rank in the order of the trainer's ranks.

    device: that reads it.
    """

    def __init__(self, names: Sequence[str], timeout_s: float = 60.0, device: torch.device | str = "cpu"):
        self._paths = [FOLDER / (PREFIX + name) for name in names]
        self._timeout_s, self._version, self._device = timeout_s, -1, torch.device(device)
        deadline = time.monotonic() + timeout_s
        self._ranks = [_attach(path, deadline, self._device) for path in self._paths]
        self._manifest = None

    def manifests(self) -> list[dict]:
        """What each rank has published."""
        return [rank.manifest for rank in self._ranks]

    def manifest(self) -> dict:
        if self._manifest is None:
            self._manifest = join(self.manifests())
        return self._manifest

    def wait(self, version: int) -> bool:
        """Wait until every rank has published `version`, of which weights() then reads. Returns whether any was lost.

        A rank that was started again is found again, and what lies elsewhere now too. Raises RuntimeError when one has
        died and stays dead, TimeoutError when one takes too long.
        """
        deadline, before = time.monotonic() + self._timeout_s, list(self._ranks)
        for i, path in enumerate(self._paths):
            if not self._ranks[i].alive():
                self._ranks[i] = _attach(path, deadline, self._device)
            while self._ranks[i].version() != version:
                self._ranks[i].check_alive()
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"refit: {path} holds version {self._ranks[i].version()} after {self._timeout_s:g} s, expected "
                        f"{version}; look at what that trainer rank is doing."
                    )
                time.sleep(0.001)
            if not self._ranks[i].current():
                self._ranks[i] = _attach(path, deadline, self._device)
        self._version, lost = version, self._ranks != before
        self._manifest = None if lost else self._manifest
        return lost

    def weights(self, names: Iterable[str]) -> list[Tensor | LowRank]:
        """These parameters, i/… of rank i, as they lie in shared memory; nothing is copied."""
        apart = [name.partition("/") for name in names]
        ranks = {rank: self._ranks[int(rank)] for rank, _, _ in apart}
        for rank in ranks.values():
            rank.check(self._version)
        return [ranks[rank].weights[own] for rank, _, own in apart]


class _Rank:
    """One rank's file, mapped, and the buffers that it names."""

    def __init__(self, path: Path, device: torch.device):
        self.path = path
        self._file = os.open(path, os.O_RDWR)
        weakref.finalize(self, os.close, self._file)
        self._memory = mmap.mmap(self._file, 0)
        _, self._epoch, length = FIXED.unpack_from(self._memory, 0)
        header = json.loads(self._memory[FIXED.size : FIXED.size + length])
        self.manifest, buffers = header["manifest"], []
        for buffer in header["buffers"]:
            if buffer["kind"] == "file":
                buffers.append(torch.frombuffer(self._memory, dtype=torch.uint8)[header["start"] :])
                continue
            opened, close = open_handle(bytes.fromhex(buffer["handle"]), buffer["bytes"], device)
            weakref.finalize(self, close)
            buffers.append(opened)
        self.weights = {name: _weight(buffers, places) for name, places in header["places"].items()}

    def version(self) -> int:
        return FIXED.unpack_from(self._memory, 0)[0]

    def current(self) -> bool:
        """Whether everything lies where the header said that was read."""
        return FIXED.unpack_from(self._memory, 0)[1] == self._epoch

    def alive(self) -> bool:
        return _locked(self._file)

    def check_alive(self) -> None:
        if not self.alive():
            raise RuntimeError(f"refit: the process that published {self.path} has died; start that rank again")

    def check(self, version: int) -> None:
        """Raise unless the weights are there and of `version`."""
        size = os.fstat(self._file).st_size
        if size < len(self._memory):  # reading beyond the end would end this process
            raise ValueError(f"refit: source {self.path} is cut short: {size} bytes of {len(self._memory)}.")
        self.check_alive()
        if self.version() != version:
            raise RuntimeError(
                f"refit: {self.path} holds version {self.version()}, expected {version}; a rank may publish the next "
                "version only when the sampler has committed this one"
            )
        if not self.current():
            raise RuntimeError(f"refit: what {self.path} publishes lies elsewhere now; ask for the version again")


def _num_bytes(item: dict) -> int:
    return torch.Size(item["shape"]).numel() * getattr(torch, item["dtype"]).itemsize


def _tensor(buffer: Tensor, place: dict) -> Tensor:
    """A parameter as a view of the buffer, which lives as long as it does."""
    return buffer[place["begin"] :][: _num_bytes(place)].view(getattr(torch, place["dtype"])).view(place["shape"])


def _weight(buffers: list[Tensor], places: list[dict]) -> Tensor | LowRank:
    parts = [_tensor(buffers[place["buffer"]], place) for place in places if "buffer" in place]
    return LowRank(*parts, places[-1]["scale"]) if len(parts) > 1 else parts[0]


def _data_start(before: int) -> int:
    return -(-before // ALIGNMENT) * ALIGNMENT


def _locked(file: int) -> bool:
    """Whether the owner of an open file lives. `file` must have been opened apart from the owner's."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(file, fcntl.LOCK_UN)
    return False


def _attach(path: Path, deadline: float, device: torch.device) -> _Rank:
    """Map a rank's file once it is there and its owner lives."""
    while True:
        try:
            rank = _Rank(path, device)
            if rank.alive():
                return rank
            reason = "belongs to a process that has died"
        except FileNotFoundError:
            reason = "is not there"
        if time.monotonic() > deadline:
            raise RuntimeError(f"refit: {path} {reason}; start the trainer rank that publishes it")
        time.sleep(0.01)


def _create(path: Path, size: int) -> int:
    """A locked file without a name yet, its memory reserved. Removes what dead owners left."""
    for left in FOLDER.glob(PREFIX + "*"):
        try:
            file = os.open(left, os.O_RDWR)
        except (FileNotFoundError, PermissionError):  # gone meanwhile, or another user's
            continue
        if not _locked(file):
            left.unlink(missing_ok=True)
        os.close(file)
    if path.exists():
        raise ValueError(f"refit: {path} belongs to a process that is alive; give this rank another name.")
    file = os.open(FOLDER, os.O_RDWR | os.O_TMPFILE, 0o600)
    fcntl.flock(file, fcntl.LOCK_EX)
    os.posix_fallocate(file, 0, size)  # too little memory is an error here, not a crash later
    return file


def _give_name(file: int, path: Path) -> None:
    """The file appears whole or not at all."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:  # with dst_dir_fd, or Python calls link(), which does not follow /proc's link
        os.link(f"/proc/self/fd/{file}", path.name, dst_dir_fd=folder, follow_symlinks=True)
    finally:
        os.close(folder)


def _remove(path: Path, file: int, owner: int) -> None:
    if os.getpid() == owner:  # not in a fork of it
        path.unlink(missing_ok=True)
        fcntl.flock(file, fcntl.LOCK_UN)  # the mapping holds the file open
    os.close(file)
