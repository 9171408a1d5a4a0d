"""Look at data files before training: `python -m aligner.data FILE`.

Every line is read as training would read it. Exit status 0 when all are good, 1 when some are bad.
"""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from aligner.checkpoint.default_model import DEFAULT_MODEL, default_model
from aligner.data.dataset import DataConfig
from aligner.data.encoder import Encoder
from aligner.data.formats import USES, format_of
from aligner.data.jsonl import JsonLines
from aligner.data.reader import Reader, check_width
from aligner.data.tokenizer import load_tokenizer
from aligner.models.shape import ModelShape
from aligner.run.config import parse, user_errors

BINS, BAR = 10, 40  # rows of the histogram, characters of its longest bar


@dataclass(frozen=True, kw_only=True)
class Config:
    """Check JSONL files of training data, line by line, and say how long their examples are."""

    files: tyro.conf.Positional[str]
    """JSONL files, comma-separated."""
    use: Literal["prompts", "supervised", "pairs", "comparisons", "judged", "rated", "weighted", "taught"] | None = None
    """What the data is for; none guesses by the keys of the first line."""
    model: str = DEFAULT_MODEL
    """Folder of the model whose tokenizer, chat template and context count."""
    chat_template: Path | None = None
    """Jinja file used in place of the tokenizer's chat template."""


def guess_use(row: dict) -> list[str]:
    """Uses that have a format of this row, those first that take most of its keys. Raises ValueError if none has."""
    fitting = {}
    for name, use in USES.items():
        try:
            fitting[name] = len(format_of(use, row).keys)
        except ValueError:
            continue
    if not fitting:
        raise ValueError(f"got the keys {sorted(row)}, which no format has; docs/data.md lists all formats.")
    return sorted(fitting, key=lambda name: -fitting[name])


def validate(path: str, config: Config, encoder: Encoder, context: int) -> int:
    """Print what a file holds. Returns how many examples are bad."""
    lines = JsonLines(path)
    print(f"{path}: {len(lines)} lines")
    use = config.use
    if use is None:
        use, *others = _guess(lines)
        also = f" (its keys also fit {', '.join(others)}; --use takes another)" if others else ""
        print(f"  use: {use}{also}")
    reader = Reader(lines, USES[use], encoder, skip_bad=True)
    print(f"  format: {reader.format.name}: {', '.join(reader.format.keys)}")
    lengths, problems, first_width = [], [], None
    for i in range(len(reader)):
        try:
            example = reader.read(i)
            first_width = check_width(reader.where(i), example, first_width)
            lengths.append(example.length)
        except ValueError as error:
            problems.append(str(error))
    print(f"  examples: {len(reader)}, good {len(lengths)}, bad {len(problems)}")
    if lengths:
        _print_lengths(np.array(lengths), context)
    if problems:
        _print_problems(problems)
    return len(problems)


def _guess(lines: JsonLines) -> list[str]:
    """Uses of the first line that can be read and has a known format."""
    first_error = None
    for i in range(len(lines)):
        try:
            row = lines.row(i)
        except ValueError as error:
            first_error = first_error or error
            continue
        try:
            return guess_use(row)
        except ValueError as error:
            first_error = first_error or ValueError(f"{lines.where(i)}: {error}")
    raise ValueError(str(first_error))


def _print_lengths(lengths: np.ndarray, context: int) -> None:
    median, p95 = np.percentile(lengths, [50, 95])
    print(f"  tokens: min {lengths.min()}, median {median:.0f}, 95th percentile {p95:.0f}, max {lengths.max()}")
    edges = np.unique(np.linspace(lengths.min(), lengths.max() + 1, BINS + 1).astype(int))
    counts, _ = np.histogram(lengths, edges)
    for begin, end, count in zip(edges[:-1], edges[1:], counts, strict=True):
        bar = "#" * -(-BAR * int(count) // int(counts.max()))
        print(f"    {f'{begin}-{end - 1}':>13} {count:>9} {bar}".rstrip())
    print(f"  longer than the model's context of {context} tokens: {int((lengths > context).sum())}")


def _print_problems(problems: list[str]) -> None:
    print(f"  first bad line: {problems[0]}")
    print("  bad by reason:")
    for reason, count in Counter(map(_reason, problems)).most_common():
        print(f"    {count:>9} {reason}")


def _reason(problem: str) -> str:
    """A message without its line, its values and its advice, so that alike ones are counted together."""
    sentence = re.sub(r"^.*?:\d+: ", "", problem)
    sentence = re.split(r"; |, expected ", sentence)[0].rstrip(".")
    return re.sub(r"\[.*?\]|\(.*?\)|'[^']*'|-?\d+(\.\d+)?", "...", sentence)


def main(argv: list[str] | None = None) -> int:
    """Validate the files that the command line names."""
    config = parse(Config, argv)
    folder = Path(config.model) if Path(config.model).is_dir() else default_model(config.model)
    encoder = Encoder(load_tokenizer(folder), DataConfig(chat_template=config.chat_template).template())
    context = ModelShape.from_folder(folder).context
    bad = [validate(path, config, encoder, context) for path in config.files.split(",")]
    return 1 if any(bad) else 0


if __name__ == "__main__":
    user_errors(main)
