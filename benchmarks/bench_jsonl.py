"""Opening a large JSONL file: the first time, again, and one line at random; a row each in results/jsonl.csv.

`bench_jsonl.py [GB]` writes a file of 1 GB, or of so many, to the temporary folder, and an index of it to a cache
folder there. What the system holds of the file in memory is dropped before it is opened from disk.
"""

import csv
import datetime
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

from aligner.data.jsonl import JsonLines

RESULTS = Path(__file__).parent / "results" / "jsonl.csv"
LINES_OF_A_GB, REPEATS, READS = 1_100_000, 3, 5_000


def seconds(action) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def drop_from_memory(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    num_lines = LINES_OF_A_GB * int(sys.argv[1] if len(sys.argv) > 1 else 1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        file = Path(folder) / "lines.jsonl"
        line = json.dumps({"prompt": "word " * 60, "completion": "word " * 110}) + "\n"
        with file.open("w") as out:
            for _ in range(num_lines):
                out.write(line)
        cold, first, again = [], [], []
        for _ in range(REPEATS):
            os.utime(file)  # another time: another index
            drop_from_memory(file)
            cold.append(seconds(lambda: JsonLines(file)))
            os.utime(file)
            first.append(seconds(lambda: JsonLines(file)))
            again.append(seconds(lambda: JsonLines(file)))
        lines, draw = JsonLines(file), random.Random(0)
        read = seconds(lambda: [lines.row(draw.randrange(len(lines))) for _ in range(READS)]) / READS
        size = file.stat().st_size
    rows = {"first opening, from disk": statistics.median(cold), "first opening": statistics.median(first)}
    rows |= {"opening again": statistics.median(again), "one line": read}
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as out:
        writer = csv.writer(out)
        if new:
            writer.writerow(["date", "bytes", "lines", "what", "seconds", "gb_per_s"])
        for what, value in rows.items():
            speed = f"{size / value / 1e9:.2f}" if what.startswith("first") else ""
            writer.writerow([datetime.date.today(), size, num_lines, what, f"{value:.3g}", speed])
            print(f"{what}: {value:.3g} s {speed and speed + ' GB/s'}")


if __name__ == "__main__":
    main()
