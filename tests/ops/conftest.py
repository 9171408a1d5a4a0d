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


GPU = ["gpu"] if torch.cuda.is_available() else []
NAMES = [name for name in ops.__all__ if name != "cpu_isa" and not name.endswith("_reference")]


def moved(x, device):
    """x with every tensor in it on `device`; gradients flow back."""
    if isinstance(x, torch.Tensor):
        return x.to(device)
    if isinstance(x, dict):
        return {key: moved(value, device) for key, value in x.items()}
    return type(x)(moved(value, device) for value in x) if isinstance(x, list | tuple) else x


def on(device, function):
    """`function` of aligner.ops, its compiled form on `device`, for tests that know CPU tensors alone."""

    def call(*arguments, **options):
        if options.get("impl") == "reference":
            return function(*arguments, **options)
        options |= {"impl": "cuda"} if options.get("impl") == "cpp" else {}
        there = moved(arguments, device)
        result = moved(function(*there, **moved(options, device)), "cpu")
        if function.__name__ == "refit_copy":
            for here, copied in zip(arguments[1], there[1], strict=True):
                here.copy_(copied)
        return result

    return call


@pytest.fixture(params=[*CPU_ISAS, "emulated-cuda", *GPU])
def isa(request, monkeypatch):
    """Runs a test once per instruction set of the CPU kernels, with the CUDA kernels compiled for the CPU, and with
    themselves where there is a GPU."""
    if request.param == "gpu":
        for name in NAMES:
            monkeypatch.setattr(ops, name, on("cuda", getattr(ops, name)))
        yield request.param
        return
    if request.param == "emulated-cuda":
        request.getfixturevalue("emulated_cuda")
    yield from use(request.param)
