"""Files and folders that are either wholly written or not there, whenever the process or the machine dies."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def atomic_write(path: Path, content: str | bytes | memoryview) -> None:
    """Write a file through a temporary sibling: readers see the old content or the new, never a part.

    path: the file; its folder must exist.
    content: text (written as UTF-8) or bytes.
    """
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """The same for content that comes piece by piece: the file takes its name at the end, or is gone on failure."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Fill a temporary sibling folder; on success it is flushed to disk and takes the name, on failure it is removed.

    An existing folder is moved aside to `.<name>.old` just before the new one takes its name, and deleted after. A
    crash between these two renames leaves only the `.old` one: `recover_folder` (called here too) gives it its name
    back.
    One writer at a time.

    path: the folder to create or to replace.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(path)
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for entry in temporary.rglob("*"):
            _sync(entry)
        _sync(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    old = _old(path)
    if path.exists():
        os.rename(path, old)
    os.rename(temporary, path)
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(path: Path) -> None:
    """Undo what a crash in the middle of `atomic_folder` left: call it before reading `path`."""
    path = Path(path)
    if _old(path).exists():
        if path.exists():
            shutil.rmtree(_old(path))
        else:
            os.rename(_old(path), path)


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
