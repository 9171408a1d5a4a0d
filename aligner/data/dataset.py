"""Data sets: files of examples, checked, measured, and drawn from in an order that seed and step alone decide."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, NamedTuple, TypeVar

import numpy as np

from aligner.data.encoder import Encoder
from aligner.data.formats import Use
from aligner.data.jsonl import JsonLines, Rows
from aligner.data.order import Blend, Order
from aligner.data.reader import Reader, check_width
from aligner.data.shorten import shorten

T = TypeVar("T")

UNREAD, GOOD, TRUNCATED, BAD, TOO_LONG = range(5)  # what is known of an example


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    files: str = ""
    """JSONL files, comma-separated; FILE:WEIGHT for each blends them by weight. --data FILE is short for it."""
    chat_template: Path | None = None
    """Jinja file used in place of the tokenizer's chat template."""
    max_tokens: int = 0
    """Tokens of an example; 0 for as many as the model has room for."""
    too_long: Literal["error", "skip", "truncate"] = "error"
    """What to do with an example of more tokens; truncating takes from the left of prompts first."""
    bad_lines: Literal["error", "skip"] = "error"
    """What to do with a line that makes no example."""
    check: bool = True
    """Read every line before training starts. Otherwise a line is checked when its turn comes; one that is bad or too
    long ends the run then, or is left out of its batch, as bad-lines and too-long say."""

    def __post_init__(self):
        if self.max_tokens < 0 or self.max_tokens == 1:
            raise ValueError(f"data.max-tokens is {self.max_tokens}, expected 2 or more, or 0 for the model's context.")

    def template(self) -> str | None:
        """The text of the chat template, if one is given. Raises ValueError when its file cannot be read."""
        if self.chat_template is None:
            return None
        try:
            return self.chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--data.chat-template {str(self.chat_template)!r} cannot be read: {error}.") from None


class Counts(NamedTuple):
    """What became of the examples that were read.

    read: all of them.
    bad, too_long: those left out.
    truncated: those cut to fit.
    """

    read: int
    bad: int
    too_long: int
    truncated: int


class Dataset(Generic[T]):
    """Examples of one or several files. `Dataset.open` makes one."""

    def __init__(
        self,
        readers: list[Reader],
        weights: list[float] | None,
        config: DataConfig,
        encoder: Encoder,
        limit: int,
        seed: int,
    ):
        self.readers, self._config, self._encoder, self._limit = readers, config, encoder, limit
        self._ends = np.cumsum([len(reader) for reader in readers])
        self._known = np.full(self._ends[-1], UNREAD, np.int8)
        self._first_problem, self._width = "", None
        self._read(0)
        if config.check:
            for i in range(1, len(self._known)):
                self._read(i)
        usable = [self._usable(file) for file in range(len(readers))]
        self._indices = np.concatenate(usable)
        if not len(self._indices):
            raise ValueError(f"no example is left of {self.report()}; the first left out was {self._first_problem}")
        if weights and not all(map(len, usable)):
            raise ValueError("a file of the blend has no example left; remove it from --data.files.")
        nums = [len(part) for part in usable]
        self._begins = np.cumsum([0, *nums])  # of each file, in _indices
        self._blend = Blend(nums, weights, seed) if weights else None
        self._order = Order(len(self._indices), seed)

    @classmethod
    def open(
        cls,
        files: str,
        config: DataConfig,
        use: Use,
        encoder: Encoder,
        *,
        room: int,
        seed: int,
        default: Callable[[], list[dict]] | None = None,
    ) -> "Dataset":
        """The examples of files, each of which is read once when `config.check` says so.

        files: as DataConfig.files; config.files itself is not looked at.
        use: the formats that the files may have, each file one of them.
        room: tokens. The most that an example may have.
        seed: of the order.
        default: gives the rows when `files` is empty.
        Raises ValueError: what is wrong with a file, a line, a weight or the limit.
        """
        if config.max_tokens > room:
            raise ValueError(
                f"data.max-tokens is {config.max_tokens}, but there is room for {room}; lower it or leave it out."
            )
        if not files and default is None:
            raise ValueError("--data.files is not given; name one or more JSONL files.")
        paths, weights = _paths(files) if files else ([], None)
        lines = [JsonLines(path) for path in paths] or [Rows("default data", default())]
        readers = [Reader(part, use, encoder, skip_bad=config.bad_lines == "skip") for part in lines]
        return cls(readers, weights, config, encoder, config.max_tokens or room, seed)

    def __len__(self) -> int:
        """Usable examples; those not read yet are taken for usable."""
        return len(self._indices)

    def __getitem__(self, i: int) -> T:
        """Usable example i in the order of the files. Raises ValueError when reading it shows that it is none."""
        example = self._read(int(self._indices[i]))
        if example is None:
            raise ValueError(f"example {i} was left out: {self._first_problem}")
        return example

    def batch(self, step: int, size: int) -> list[T]:
        """Examples of one step; what is found to be bad or too long only now is left out.

        step: 0-based number of the step.
        size: examples a step. Raises ValueError when there are fewer than that, or when none of them can be used.
        """
        if self._blend:
            places = [self._begins[file] + i for file, i in self._blend.batch(step, size)]
        else:
            places = self._order.batch(step, size)
        examples = [example for example in (self._read(int(i)) for i in self._indices[places]) if example is not None]
        if not examples:
            raise ValueError(f"all {size} examples of a step were left out; the first was {self._first_problem}")
        return examples

    def first(self, num: int) -> list[T]:
        """The first usable examples in the order of the files."""
        examples = []
        for i in self._indices:
            if len(examples) >= num:
                break
            example = self._read(int(i))
            examples += [] if example is None else [example]
        return examples

    @property
    def weighted(self) -> bool:
        """Whether it blends files by weight."""
        return self._blend is not None

    @property
    def counts(self) -> Counts:
        """What became of the examples that were read so far."""
        kinds = np.bincount(self._known, minlength=5)
        read = len(self._known) - int(kinds[UNREAD])
        return Counts(read, int(kinds[BAD]), int(kinds[TOO_LONG]), int(kinds[TRUNCATED]))

    def report(self) -> str:
        """One line: how many examples there are and what became of them."""
        counts = self.counts
        words = [f"{len(self._known)} examples ({', '.join(dict.fromkeys(r.format.name for r in self.readers))})"]
        words += [f"{counts.read} read"] if counts.read < len(self._known) else []
        words += [f"{counts.bad} bad ones left out"] if counts.bad else []
        words += [f"{counts.too_long} of more than {self._limit} tokens left out"] if counts.too_long else []
        words += [f"{counts.truncated} cut to {self._limit} tokens"] if counts.truncated else []
        return ", ".join(words)

    def _usable(self, file: int) -> np.ndarray:
        begin = int(self._ends[file]) - len(self.readers[file])
        return begin + np.flatnonzero(self._known[begin : self._ends[file]] < BAD)

    def _read(self, i: int) -> T | None:
        """Example i of all files, one after the other; None when it is left out, and why is known then."""
        if self._known[i] >= BAD:
            return None
        file = int(np.searchsorted(self._ends, i, side="right"))
        reader = self.readers[file]
        number = i - int(self._ends[file]) + len(reader)
        try:
            example = reader.read(number)
            self._width = check_width(reader.where(number), example, self._width)
        except ValueError as error:
            if self._config.bad_lines == "error":
                raise ValueError(str(error)) from None
            return self._leave_out(i, BAD, str(error))
        if example.length > self._limit:
            return self._too_long(i, reader.where(number), example)
        self._known[i] = GOOD
        return example

    def _too_long(self, i: int, where: str, example: T) -> T | None:
        problem = (
            f"{where}: the example has {example.length} tokens, the limit is {self._limit}; shorten it, remove the "
            "line, raise --data.max-tokens or say --data.too-long skip or truncate."
        )
        if self._config.too_long == "error":
            raise ValueError(problem)
        short = shorten(example, self._limit, self._encoder) if self._config.too_long == "truncate" else None
        if short is None:
            return self._leave_out(i, TOO_LONG, problem)
        self._known[i] = TRUNCATED
        return short

    def _leave_out(self, i: int, why: int, problem: str) -> None:
        self._known[i] = why
        self._first_problem = self._first_problem or problem


def load(
    config: DataConfig,
    eval_files: str,
    use: Use,
    encoder: Encoder,
    *,
    room: int,
    seed: int,
    default: Callable[[], tuple[list[dict], list[dict]]] | None = None,
) -> tuple[Dataset, Dataset | None]:
    """(training data, held-out data or None).

    eval_files: files of held-out examples, as DataConfig.files.
    use, encoder, room, seed: as of `Dataset.open`.
    default: gives (training rows, held-out rows) when `config.files` is empty.
    Raises ValueError as `Dataset.open` does, and when held-out files are given alone.
    """
    if not config.files and eval_files:
        raise ValueError(f"--eval-data is {eval_files!r}, but --data.files is not given; name the training files too.")

    def dataset(files: str, rows: list[dict] | None) -> Dataset:
        given = None if rows is None else lambda: rows
        return Dataset.open(files, config, use, encoder, room=room, seed=seed, default=given)

    train_rows, held_out_rows = default() if default and not config.files else (None, None)
    train = dataset(config.files, train_rows)
    return train, dataset(eval_files, held_out_rows) if eval_files or held_out_rows else None


def _paths(files: str) -> tuple[list[str], list[float] | None]:
    """The paths of --data.files, and their weights if they have any."""
    names = [name.strip() for name in files.split(",") if name.strip()]
    if not names:
        raise ValueError(f"--data.files is {files!r}; name one or more JSONL files.")
    pairs = [_weight(name) for name in names]
    weights = [weight for _, weight in pairs if weight is not None]
    if weights and len(weights) < len(names):
        raise ValueError(f"--data.files is {files!r}, where some files have a weight; give all of them one, or none.")
    return [path for path, _ in pairs], weights or None


def _weight(name: str) -> tuple[str, float | None]:
    path, colon, number = name.rpartition(":")
    if not colon or Path(name).is_file():
        return name, None
    try:
        weight = float(number)
    except ValueError:
        return name, None
    if not math.isfinite(weight) or weight <= 0:
        raise ValueError(f"--data.files gives {path!r} the weight {number}, expected a positive number.")
    return path, weight
