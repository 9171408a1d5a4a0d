"""Times implementations against each other, interleaved, and appends one row each to results/<op>.csv.

On a machine with a GPU everything runs there: the compiled subject is the CUDA kernel (or Triton's), seconds wait for
the device, peak bytes are the device's.
"""

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
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COMPILED = "cuda" if DEVICE == "cuda" else "cpp"  # impl and subject name
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
    flops: float = 0
    """Floating-point operations that it needs, of matrix products."""


def machine() -> str:
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str:
    git = ["git", "-C", str(RESULTS), "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(git, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "none"


def status_bytes(field: str) -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def on_device(x):
    """Tensors, alone or in a list, on DEVICE; still leaves when they were."""
    if isinstance(x, list):
        return [on_device(t) for t in x]
    if not isinstance(x, torch.Tensor) or DEVICE == "cpu":
        return x
    return x.detach().to(DEVICE).requires_grad_(x.requires_grad)


def make_inputs(case: Case, small: bool) -> tuple:
    return tuple(on_device(x) for x in case.inputs(small))


def wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def measure_peak(case: Case, subject: str) -> int:
    """Bytes of memory that one call adds at its highest, its results included; for a fresh process."""
    call = case.subjects[subject]
    call(*make_inputs(case, True))
    inputs = make_inputs(case, False)
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = call(*inputs)
        return torch.cuda.max_memory_allocated() - before
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
    inputs = make_inputs(case, False)
    seconds: dict[str, list[float]] = {name: [] for name in case.subjects}
    for round_number in range(rounds + 1):
        for name, call in case.subjects.items():
            wait()
            start = time.perf_counter()
            kept = call(*inputs)
            wait()
            if round_number:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
            del kept
    return {name: statistics.median(values) for name, values in seconds.items()}


def median_seconds(call: Callable[[], object], rounds: int = 5) -> float:
    return time_interleaved(Case(shape="", dtype="", inputs=lambda _: (), subjects={"": call}, bytes=0), rounds)[""]


def print_roof() -> None:
    """What one large copy and one large matrix product of torch's reach, beside which the rows are to be read."""
    n = 1 << (28 if DEVICE == "cuda" else 26)
    pair = torch.ones(2, n, device=DEVICE)
    copy = 8 * n / median_seconds(lambda: pair[0].copy_(pair[1])) / 1e9
    size, rates = (8192 if DEVICE == "cuda" else 2048), []
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(size, size, device=DEVICE, dtype=dtype)
        rates.append(f"{2 * size**3 / median_seconds(lambda a=a: a @ a) / 1e12:.3g} TFLOP/s {dtype}")
    print(f"{machine()}: copy {copy:.3g} GB/s, matmul {', '.join(rates)}".replace("torch.", ""))


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
    print_roof()
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
                products = f", {case.flops / seconds / 1e12:.3g} TFLOP/s" if case.flops else ""
                timing = f"{1e3 * seconds:.4g} ms, {rate:.3g} GB/s{products}"
                print(f"{op} {case.shape} {case.dtype} {name}: {timing}, +{peak} bytes", flush=True)
