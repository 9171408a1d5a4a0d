"""Ranks exchange what the formulas of docs/parallelism.md say, to the byte."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_comm.py"


@pytest.mark.slow
def test_two_processes_exchange_what_the_formulas_say():
    command = [sys.executable, str(SCRIPT), "--world", "2", "--no-rows"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
