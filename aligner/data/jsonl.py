"""Lines of JSONL files, read one by one: a file of any size is indexed once and never held in memory."""

import hashlib
import io
import json
import os
import weakref
from pathlib import Path

import numpy as np
from filelock import FileLock

from aligner.run.atomic import atomic_write
from aligner.run.cache import user_cache

CHUNK_BYTES = 1 << 20  # fits a core's cache: 16 MB chunks scan a quarter slower
KEEP_INDEX_BYTES = 64 << 20  # a smaller file is scanned faster than its index is looked up
BLANK = b" \t\r\v\f"


class JsonLines:
    """The rows of one JSONL file, found through an index of bytes; blank lines are no rows.

    path: the file. Only b"\\n" ends a line, as JSONL says.
    The index of a large file is kept in the user's cache folder and mapped when the file is opened again; a file whose
    size or time has changed is scanned again, and without a writable cache the index stays in memory.
    Raises ValueError when the file does not exist or has no row.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"data file {str(path)!r} does not exist; give a JSONL file.")
        self._file = os.open(self.path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        state = os.fstat(self._file)
        self._end = state.st_size
        # [number of rows, offset of each row, number of rows before each blank line]
        index = _kept_index(self.path, self._file, state) if self._end >= KEEP_INDEX_BYTES else _scan(self._file)
        self._starts, self._before_blank = index[1 : 1 + int(index[0])], index[1 + int(index[0]) :]
        if not len(self._starts):
            raise ValueError(f"data file {str(path)!r} is empty; expected at least one JSON object a line.")

    def __len__(self) -> int:
        return len(self._starts)

    def where(self, i: int) -> str:
        """'path:line' of row i; lines count from 1, blank ones too."""
        return f"{self.path}:{i + 1 + int(np.searchsorted(self._before_blank, i, side='right'))}"

    def row(self, i: int) -> dict:
        """The object of row i. Raises ValueError that names file and line when it is none."""
        begin = int(self._starts[i])
        end = int(self._starts[i + 1]) if i + 1 < len(self._starts) else self._end
        line = _pread(self._file, end - begin, begin).split(b"\n", 1)[0]
        try:
            row = json.loads(line.decode("utf-8-sig" if begin == 0 else "utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self.where(i)}: not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8."
            ) from None
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{self.where(i)}: not valid JSON ({error.msg} at column {error.colno}); write one object a line."
            ) from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.where(i)}: JSON that cannot be read ({error}); simplify the line.") from None
        if not isinstance(row, dict):
            raise ValueError(
                f'{self.where(i)}: got a JSON {type(row).__name__}, expected an object such as {{"text": "..."}}.'
            )
        return row


class Rows:
    """Rows that are already in memory, with the methods of JsonLines.

    name: what messages call them.
    rows: JSON objects.
    """

    def __init__(self, name: str, rows: list[dict]):
        if not rows:
            raise ValueError(f"{name}: no rows; expected at least one.")
        self.name, self._rows = name, rows

    def __len__(self) -> int:
        return len(self._rows)

    def where(self, i: int) -> str:
        """'name:row', counted from 1."""
        return f"{self.name}:{i + 1}"

    def row(self, i: int) -> dict:
        """Row i."""
        return self._rows[i]


def _kept_index(path: Path, file: int, state: os.stat_result) -> np.ndarray:
    """The index of a large file, from the cache folder if it is there, else scanned and put there."""
    folder = user_cache() / "lines"
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]
    kept = folder / f"{name}-{state.st_size}-{state.st_mtime_ns}.npy"
    index = _load(kept)
    if index is None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(str(folder / f"{name}.lock")):  # of many ranks one scans
                index = _load(kept)
                if index is None:
                    index = _scan(file)
                    content = io.BytesIO()
                    np.save(content, index)
                    atomic_write(kept, content.getbuffer())
                    for stale in set(folder.glob(f"{name}-*.npy")) - {kept}:
                        stale.unlink(missing_ok=True)
        except OSError:  # a full or a read-only disk costs the next opening a scan, nothing else
            index = _scan(file) if index is None else index
    return index


def _load(kept: Path) -> np.ndarray | None:
    if not kept.is_file():
        return None
    try:
        index = np.load(kept, mmap_mode="r")
    except (ValueError, EOFError):  # not what this library wrote
        return None
    return index if index.dtype == np.int64 and index.ndim == 1 and 0 <= index[0] < len(index) else None


def _scan(file: int) -> np.ndarray:
    """The index of an open file, from one pass over its bytes."""
    white = np.isin(np.arange(256), list(b"\n" + BLANK))
    buffer, position, line_begins = bytearray(CHUNK_BYTES), 0, True
    starts, suspects = [], []
    while num := os.preadv(file, [buffer], position):
        chunk = np.frombuffer(buffer, np.uint8, num)
        begins = np.flatnonzero(chunk == 10) + 1
        if line_begins:
            begins = np.concatenate([[0], begins])
        line_begins = chunk[-1] == 10
        if line_begins:
            begins = begins[:-1]  # the next chunk's, if there is one
        starts.append(begins + position)
        suspects.append(starts[-1][white[chunk[begins]]])
        position += num
    starts = np.concatenate([*starts, np.array([position])])
    # Few lines begin with white space; these alone are looked at again.
    lines = np.searchsorted(starts[:-1], np.concatenate([*suspects, np.array([], np.int64)]))
    blank = np.array([i for i in lines if _is_blank(file, int(starts[i]), int(starts[i + 1]))], np.int64)
    rows = np.delete(starts[:-1], blank)
    return np.concatenate([[len(rows)], rows, blank - np.arange(len(blank))]).astype(np.int64)


def _is_blank(file: int, begin: int, end: int) -> bool:
    return not _pread(file, end - begin, begin).strip(b"\n" + BLANK)


def _pread(file: int, num: int, position: int) -> bytes:
    parts = []
    while num and (part := os.pread(file, num, position)):  # one call reads 2 GB at most
        parts.append(part)
        num, position = num - len(part), position + len(part)
    return b"".join(parts)
