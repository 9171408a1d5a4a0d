"""Weights in shared memory: each trainer rank publishes its own, and a sampler in another process refits from them.

One file a rank in /dev/shm: the version (-1 while it is written), the length of the header, the header (manifest and
offsets, JSON), the parameters. Its owner holds a lock on the file for as long as it lives, so that a reader can tell a
dead owner and the next owner can remove what a killed one left behind. (multiprocessing.shared_memory is not used: its
resource tracker unlinks a segment when any process that attached to it ends.)
"""

import fcntl
import json
import mmap
import os
import struct
import time
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from aligner.models.weights import join
from aligner.refit.plan import Source, compile_plan

FOLDER, PREFIX = Path("/dev/shm"), "aligner-refit-"
ALIGNMENT = 64  # bytes; of a parameter's first one
FIXED = struct.Struct("<qq")  # version, length of the header


class SharedWeights:
    """A trainer rank's parameters in shared memory, under a name that the sampler is told too.

    They are copied, adapters merged, so training may go on at once; the next version is published when the sampler has
    committed this one.
    """

    def __init__(self, name: str, source: Source):
        self.source, self._manifest = source, source.manifest()
        self._plan = compile_plan(self._manifest, self._manifest)
        offsets, end = {}, 0
        for item in self._manifest["tensors"]:
            end = -(-end // ALIGNMENT) * ALIGNMENT
            offsets[item["name"]] = end
            end += _num_bytes(item)
        header = json.dumps({"manifest": self._manifest, "offsets": offsets}).encode()
        self.path = FOLDER / (PREFIX + name)
        self._file = _create(self.path, _data_start(FIXED.size + len(header)) + end)
        self._memory = mmap.mmap(self._file, 0)
        FIXED.pack_into(self._memory, 0, -1, len(header))
        self._memory[FIXED.size : FIXED.size + len(header)] = header
        self._tensors = _tensors(self._memory, len(header), self._manifest, offsets)
        _give_name(self._file, self.path)
        self._close = weakref.finalize(self, _remove, self.path, self._file, os.getpid())

    def publish(self, version: int) -> None:
        """Copy the source's weights as they are now; readers that wait for `version` go on."""
        self._plan.preflight(self.source, self._manifest, self._tensors)
        struct.pack_into("<q", self._memory, 0, -1)
        self._plan.execute(self.source, self._tensors)
        struct.pack_into("<q", self._memory, 0, version)

    def close(self) -> None:
        """Remove the file; who has it mapped keeps the memory. Also done when the process ends by itself."""
        self._close()


class SharedSource:
    """The source of a refit: what all ranks have published, one name a rank in the order of the trainer's ranks."""

    def __init__(self, names: Sequence[str], timeout_s: float = 60.0):
        self._paths = [FOLDER / (PREFIX + name) for name in names]
        self._timeout_s, self._version = timeout_s, -1
        deadline = time.monotonic() + timeout_s
        self._ranks = [_attach(path, deadline) for path in self._paths]
        self._manifest = join([rank.manifest for rank in self._ranks])

    def manifest(self) -> dict:
        return self._manifest

    def wait(self, version: int) -> None:
        """Wait until every rank has published `version`, of which weight() then reads.

        A rank that was started again is found again. Raises RuntimeError when one has died and stays dead, TimeoutError
        when one takes too long.
        """
        deadline = time.monotonic() + self._timeout_s
        for i, path in enumerate(self._paths):
            if not self._ranks[i].alive():
                self._ranks[i] = _attach(path, deadline)
            while self._ranks[i].version() != version:
                self._ranks[i].check_alive()
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"refit: {path} holds version {self._ranks[i].version()} after {self._timeout_s:g} s, expected "
                        f"{version}; look at what that trainer rank is doing."
                    )
                time.sleep(0.001)
        self._manifest = join([rank.manifest for rank in self._ranks])
        self._version = version

    def weight(self, name: str) -> Tensor:
        """The parameter `name`, i/… of rank i, as it lies in shared memory; nothing is copied."""
        rank, _, own = name.partition("/")
        return self._ranks[int(rank)].weight(own, self._version)


class _Rank:
    """One rank's file, mapped."""

    def __init__(self, path: Path):
        self.path = path
        self._file = os.open(path, os.O_RDWR)
        weakref.finalize(self, os.close, self._file)
        self._memory = mmap.mmap(self._file, 0)
        _, length = FIXED.unpack_from(self._memory, 0)
        header = json.loads(self._memory[FIXED.size : FIXED.size + length])
        self.manifest = header["manifest"]
        self._tensors = _tensors(self._memory, length, self.manifest, header["offsets"])

    def version(self) -> int:
        return FIXED.unpack_from(self._memory, 0)[0]

    def alive(self) -> bool:
        return _locked(self._file)

    def check_alive(self) -> None:
        if not self.alive():
            raise RuntimeError(f"refit: the process that published {self.path} has died; start that rank again")

    def weight(self, name: str, version: int) -> Tensor:
        size = os.fstat(self._file).st_size
        if size < len(self._memory):  # reading beyond the end would end this process
            raise ValueError(f"refit: source {self.path} is cut short: {size} bytes of {len(self._memory)}.")
        self.check_alive()
        if self.version() != version:
            raise RuntimeError(
                f"refit: {self.path} holds version {self.version()}, expected {version}; a rank may publish the next "
                "version only when the sampler has committed this one"
            )
        return self._tensors[name]


def _num_bytes(item: dict) -> int:
    return torch.Size(item["shape"]).numel() * getattr(torch, item["dtype"]).itemsize


def _tensors(memory: mmap.mmap, header: int, manifest: dict, offsets: dict[str, int]) -> dict[str, Tensor]:
    """The parameters as views of the mapping, which live as long as it does."""
    data = torch.frombuffer(memory, dtype=torch.uint8)[_data_start(FIXED.size + header) :]
    return {
        item["name"]: data[offsets[item["name"]] :][: _num_bytes(item)]
        .view(getattr(torch, item["dtype"]))
        .view(item["shape"])
        for item in manifest["tensors"]
    }


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


def _attach(path: Path, deadline: float) -> _Rank:
    """Map a rank's file once it is there and its owner lives."""
    while True:
        try:
            rank = _Rank(path)
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
