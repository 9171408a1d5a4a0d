"""Opening a large JSONL file: the first time, again, and one line at random; a row each in results/jsonl.csv.

Writes a file of about 1 GB to the temporary folder, and an index of it to a cache folder there.
"""

import csv
import datetime
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

from aligner.data.jsonl import JsonLines

RESULTS = Path(__file__).parent / "results" / "jsonl.csv"
LINES, REPEATS, READS = 1_100_000, 5, 20_000


def seconds(action) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        file = Path(folder) / "lines.jsonl"
        line = json.dumps({"prompt": "word " * 60, "completion": "word " * 110}) + "\n"
        with file.open("w") as out:
            for _ in range(LINES):
                out.write(line)
        first, again = [], []
        for _ in range(REPEATS):
            os.utime(file)  # another time: another index
            first.append(seconds(lambda: JsonLines(file)))
            again.append(seconds(lambda: JsonLines(file)))
        lines, draw = JsonLines(file), random.Random(0)
        read = seconds(lambda: [lines.row(draw.randrange(len(lines))) for _ in range(READS)]) / READS
        size = file.stat().st_size
    rows = {"first opening": statistics.median(first), "opening again": statistics.median(again), "one line": read}
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as out:
        writer = csv.writer(out)
        if new:
            writer.writerow(["date", "bytes", "lines", "what", "seconds", "gb_per_s"])
        for what, value in rows.items():
            speed = f"{size / value / 1e9:.2f}" if what == "first opening" else ""
            writer.writerow([datetime.date.today(), size, LINES, what, f"{value:.3g}", speed])
            print(f"{what}: {value:.3g} s {speed and speed + ' GB/s'}")


if __name__ == "__main__":
    main()
