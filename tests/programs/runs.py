"""Runs of programs within this process, and what they leave."""

import importlib
import json
from pathlib import Path

NOT_REPRODUCIBLE = ("time/", "tokens_per_second", "sampled_tokens_per_second", "peak_memory_bytes")


def words(options: dict) -> list[str]:
    """The command line of {option: value}: a tuple has several values, True none."""
    line = []
    for name, value in options.items():
        values = value if isinstance(value, (tuple, list)) else [] if value is True else [value]
        line += [f"--{name}", *map(str, values)]
    return line


def start(program: str, output: Path, options: dict) -> int:
    """The exit status of `python -m aligner.<program>`."""
    return importlib.import_module(f"aligner.{program}").main(words({"threads": 1, **options, "output": output}))


def run(program: str, output: Path, options: dict) -> Path:
    """A run that ends well: its folder."""
    assert start(program, output, options) == 0
    return output


def metrics(folder: Path) -> list[dict]:
    """The reproducible ones of each step."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(NOT_REPRODUCIBLE)} for row in rows]


def samples(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
