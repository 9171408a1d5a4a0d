"""Draw a run: `python -m aligner.report RUN` writes RUN/report.html and prints its path."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from aligner.run.config import parse, user_errors
from aligner.run.report import write_report


@dataclass(frozen=True, kw_only=True)
class Config:
    """Write the report of a run as one HTML file that needs no network."""

    run: tyro.conf.Positional[Path]
    """The run's folder."""


def main() -> int:
    """Write the report that the command line asks for."""
    print(write_report(parse(Config).run))
    return 0


if __name__ == "__main__":
    user_errors(main)
