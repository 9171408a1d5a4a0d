"""What the experiments of docs/ share: programs run one after the other, and what is there is not made again."""

import csv
import json
import subprocess
import sys
from pathlib import Path

from aligner.run.chart import COLORS, Series, picture

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"


def run(output: Path, program: str, *arguments: object) -> None:
    """`python -m aligner.PROGRAM ... --output OUTPUT`, its text in OUTPUT.log; nothing where its result is there."""
    if output.is_file() or (output / "policy").exists():
        return
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        f"aligner.{program}",
        *map(str, arguments),
        "--output",
        str(output),
    ]
    print(" ".join(["python", *command[3:]]), flush=True)
    with output.with_name(f"{output.name}.log").open("w") as log:
        subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=True)


def read(file: Path) -> list[dict]:
    """Rows of a JSONL file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def write(file: Path, rows: list[dict]) -> Path:
    """Rows as a JSONL file."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_results(name: str, rows: list[dict]) -> None:
    """benchmarks/results/NAME.csv."""
    with (ROOT / "benchmarks" / "results" / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def draw_curves(page: str, title: str, lines: list[tuple[Path, str, str]]) -> None:
    """docs/images/PAGE.svg; lines: (folder of a run, metric, label)."""
    series = []
    for i, (folder, metric, label) in enumerate(lines):
        rows = read(folder / "metrics.jsonl")
        if points := [(row["step"], row[metric]) for row in rows if metric in row]:
            series.append(Series(label=label, points=points, color=COLORS[i], dots="eval/" in metric))
    (IMAGES / f"{page}.svg").write_text(picture(title, "step", series))
