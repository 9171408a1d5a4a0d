"""The GPU kernels compile for every architecture and use what benchmarks/results/cuda_resources.csv says."""

import csv
import pathlib
import shutil
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "benchmarks" / "cuda_resources.py"
TABLE = SCRIPT.parent / "results" / "cuda_resources.csv"
SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90a": 227 * 1024, "sm_100": 227 * 1024, "sm_100a": 227 * 1024}
MMA = {"sm_80": "mma.sync", "sm_90a": "wgmma.mma_async", "sm_100a": "tcgen05.mma"}


def read(path: pathlib.Path, compiler: str) -> dict[tuple, dict]:
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["compiler"].split()[0] == compiler]
    table = {(row["kernel"], row["source"], row["arch"]): row for row in rows}
    assert len(table) == len(rows), f"{path} has a row twice: run python benchmarks/cuda_resources.py"
    return table


def compiled(compiler: str, folder: pathlib.Path) -> dict[tuple, dict]:
    path = folder / "now.csv"
    command = [sys.executable, str(SCRIPT), "--compiler", compiler, "--output", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return read(path, compiler)


def check(now: dict[tuple, dict], table: dict[tuple, dict]) -> None:
    for key, row in now.items():
        assert row["spill_bytes"] == "0", f"{key} spills {row['spill_bytes']} bytes"
        assert int(row["shared_bytes"]) <= SHARED_BYTES[row["arch"]], (
            f"{key} takes {row['shared_bytes']} bytes of shared memory"
        )
    # Another version of a compiler allocates registers its own way.
    same_compiler = {row["compiler"] for row in now.values()} == {row["compiler"] for row in table.values()}
    keys = sorted(now.keys() | table.keys())
    changed = [key for key in keys if (key in now) != (key in table) or (same_compiler and now[key] != table[key])]
    assert not changed, f"run python benchmarks/cuda_resources.py and look at the change of {changed}"


def test_triton(tmp_path):
    now = compiled("triton", tmp_path)
    check(now, read(TABLE, "triton"))
    dots = {"statistics", "d_logits", "d_weight", "d_hidden"}
    for arch, mma in MMA.items():
        on_tensor_cores = {kernel for (kernel, _, a), row in now.items() if a == arch and row["mma"] == mma}
        assert on_tensor_cores == {f"linear_logprobs_{name}<bfloat16>" for name in dots}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH: csrc/*.cu are not compiled")
def test_nvcc(tmp_path):
    check(compiled("nvcc", tmp_path), read(TABLE, "nvcc"))


def test_a_change_is_caught():
    table = read(TABLE, "triton")
    key = next(iter(table))
    check(dict(table), table)
    for other in ({key: table[key] | {"registers": "1"}}, {key: table[key] | {"spill_bytes": "8"}}):
        with pytest.raises(AssertionError, match="look at the change|spills 8 bytes"):
            check({**table, **other}, table)
    with pytest.raises(AssertionError, match="look at the change"):
        check(table, {k: row for k, row in table.items() if k != key})
