import subprocess
from pathlib import Path

import filelock
import pytest
import torch

from aligner import ops

ROOT = Path(__file__).parents[2]
CPU_ISAS = ["portable", "avx2", "avx512"]  # each machine has all up to its best


def use(isa):
    """Run the kernels with this instruction set until the end of the test."""
    detected = ops.cpu_isa("")
    if isa in CPU_ISAS and CPU_ISAS.index(isa) > CPU_ISAS.index(detected):
        pytest.skip(f"this machine has no {isa}")
    assert ops.cpu_isa(isa) == isa
    yield isa
    ops.cpu_isa("")


@pytest.fixture(scope="session")
def emulated_cuda() -> Path:
    """The library of the CUDA kernels, compiled for the CPU and loaded; kept in build/ for the next time."""
    folder = ROOT / "build" / "emulated-cuda"
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / "lock"):
        for command in (
            ["cmake", "-S", str(ROOT), "-B", str(folder), "-DALIGNER_TESTS=ON"],
            ["cmake", "--build", str(folder), "--target", "aligner_cuda_emulated", "-j", "2"],
        ):
            done = subprocess.run(command, capture_output=True, text=True)
            if "no emulated CUDA kernels" in done.stdout:
                pytest.skip("no CUDA headers on this machine")
            assert done.returncode == 0, done.stdout + done.stderr
    torch.ops.aligner.load_cuda_kernels(str(folder / "libaligner_cuda_emulated.so"))
    return folder


@pytest.fixture(params=CPU_ISAS)
def cpu_isa(request):
    """Runs a test once per instruction set of the CPU kernels."""
    yield from use(request.param)


@pytest.fixture(params=[*CPU_ISAS, "emulated-cuda"])
def isa(request):
    """Runs a test once per instruction set of the CPU kernels and once with the CUDA kernels, compiled for the CPU."""
    if request.param == "emulated-cuda":
        request.getfixturevalue("emulated_cuda")
    yield from use(request.param)
