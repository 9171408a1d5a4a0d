"""The examples of one file: which lines make one, in which format, and where a mistake stands."""

from aligner.data.encoder import Encoder
from aligner.data.examples import Rated, Taught
from aligner.data.formats import Format, Use, format_of
from aligner.data.jsonl import JsonLines, Rows


class Reader:
    """One file as examples.

    lines: the rows.
    use: the formats that the file may have; its first row says which one it has, and all rows must have the same.
    encoder: makes tokens of text.
    skip_bad: whether a first row that cannot be read gives way to the next.
    Raises ValueError that names file and line.
    """

    def __init__(self, lines: JsonLines | Rows, use: Use, encoder: Encoder, *, skip_bad: bool = False):
        self.lines, self._use, self._encoder = lines, use, encoder
        self.format = self._first_format(skip_bad)
        if len(lines) % self.format.lines:
            raise ValueError(
                f"{lines.where(len(lines) - 1)}: the last of an odd number of lines, but the format of the file is "
                f"{self.format.name}; add the line that is missing or remove this one."
            )

    def __len__(self) -> int:
        return len(self.lines) // self.format.lines

    def where(self, i: int) -> str:
        """'path:line' of the first line of example i."""
        return self.lines.where(i * self.format.lines)

    def read(self, i: int):
        """Example i. Raises ValueError that names file and line when its lines make none."""
        numbers = range(i * self.format.lines, (i + 1) * self.format.lines)
        rows = [self.lines.row(number) for number in numbers]
        for number, row in zip(numbers, rows, strict=True):
            self._check_format(number, row)
        try:
            return self.format.example(rows, self._encoder)
        except ValueError as error:
            raise ValueError(f"{self.where(i)}: {error}") from None

    def _first_format(self, skip_bad: bool) -> Format:
        first_error = None
        for number in range(len(self.lines) if skip_bad else 1):
            try:
                return self._format(number, self.lines.row(number))
            except ValueError as error:
                first_error = first_error or error
        raise ValueError(str(first_error)) from None

    def _format(self, number: int, row: dict) -> Format:
        try:
            return format_of(self._use, row)
        except ValueError as error:
            raise ValueError(f"{self.lines.where(number)}: {error}") from None

    def _check_format(self, number: int, row: dict) -> None:
        found = self._format(number, row)
        if found is not self.format:
            names = [f"{f.name} ({', '.join(map(repr, f.keys))})" for f in (found, self.format)]
            raise ValueError(
                f"{self.lines.where(number)}: got the format {names[0]}, but the file began with {names[1]}; "
                "put the formats into files of their own."
            )


def check_width(where: str, example, first: str | None) -> str | None:
    """What every example must have as many of as the first one, whose answer is passed on; None before it.

    Raises ValueError when this one has more or fewer: they could not stand in one batch.
    """
    found = None
    if isinstance(example, Rated):
        found = f"{len(example.attributes)} mark(s)"
    elif isinstance(example, Taught):
        has = "without" if example.log_sum is None else "with"
        found = f"{len(example.topk_ids[0])} logit(s) a token {has} log-sum"
    if first and found != first:
        raise ValueError(f"{where}: got {found}, expected {first} as in the examples before; give all the same.")
    return first or found
