"""Times implementations against each other, interleaved, and appends one row each to results/<op>.csv."""

import argparse
import csv
import dataclasses
import datetime
import gc
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

TOKENS = (1 << 18, 1 << 19, 1 << 20)  # three sizes, to see that the cost grows linearly
RESULTS = pathlib.Path(__file__).parent / "results"
COLUMNS = ["date", "commit", "machine", "threads", "shape", "dtype", "impl"]
COLUMNS += ["seconds_median", "bytes", "gb_per_s", "peak_bytes"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One shape, and what is compared on it."""

    shape: str
    """Words for the results file."""
    dtype: str
    """Words for the results file."""
    inputs: Callable[[bool], tuple]
    """inputs(small) -> the arguments of every subject; small ones warm up before memory is measured."""
    subjects: dict[str, Callable[..., object]]
    """Name of the implementation -> call."""
    bytes: int
    """Bytes that the best possible implementation reads and writes."""


def machine() -> str:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str:
    git = ["git", "-C", str(RESULTS), "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(git, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "none"


def status_bytes(field: str) -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def measure_peak(case: Case, subject: str) -> int:
    """Bytes of resident memory that one call adds at its highest, its results included; for a fresh process."""
    call = case.subjects[subject]
    call(*case.inputs(True))
    inputs = case.inputs(False)
    gc.collect()
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = status_bytes("VmRSS")
    kept = call(*inputs)
    peak = status_bytes("VmHWM") - before
    del kept
    return peak


def peak_in_new_process(number: int, subject: str, threads: int) -> int:
    command = [sys.executable, sys.argv[0], "--peak", f"{number}:{subject}", "--threads", str(threads)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def time_interleaved(case: Case, rounds: int) -> dict[str, float]:
    """Median seconds of each subject; taking turns, they meet the same disturbances."""
    inputs = case.inputs(False)
    seconds: dict[str, list[float]] = {name: [] for name in case.subjects}
    for round_number in range(rounds + 1):
        for name, call in case.subjects.items():
            start = time.perf_counter()
            kept = call(*inputs)
            if round_number:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
            del kept
    return {name: statistics.median(values) for name, values in seconds.items()}


def main(op: str, cases: list[Case]) -> None:
    parser = argparse.ArgumentParser(description=f"Benchmark {op}; rows go to {RESULTS.name}/{op}.csv.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each implementation")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        number, subject = options.peak.split(":")
        print(measure_peak(cases[int(number)], subject))
        return
    path = RESULTS / f"{op}.csv"
    path.parent.mkdir(exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(COLUMNS)
        for number, case in enumerate(cases):
            for name, seconds in time_interleaved(case, options.rounds).items():
                peak = peak_in_new_process(number, name, options.threads)
                rate = case.bytes / seconds / 1e9
                where = [datetime.date.today().isoformat(), commit(), machine(), options.threads]
                writer.writerow(
                    [*where, case.shape, case.dtype, name, f"{seconds:.6g}", case.bytes, f"{rate:.3g}", peak]
                )
                print(f"{op} {case.shape} {case.dtype} {name}: {1e3 * seconds:.4g} ms, {rate:.3g} GB/s, +{peak} bytes")
