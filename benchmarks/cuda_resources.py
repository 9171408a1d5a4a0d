"""What the compilers make of the GPU kernels, into results/cuda_resources.csv; needs no GPU.

Triton's kernels are launched on CPU tensors under a driver that compiles and stops there, so the versions in the table
are those of a real launch with aligned sizes. Every csrc/*.cu is compiled by nvcc.

registers, stack_bytes: per thread. shared_bytes: per block; for nvcc without what a launch adds. spill_bytes: stores
and loads of registers that did not fit. mma: what a tl.dot became; empty for a kernel without one and for nvcc.
"""

import argparse
import concurrent.futures
import contextlib
import csv
import io
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

os.environ.pop("TRITON_INTERPRET", None)  # its kernels are not compiled

import torch
import triton
from aligner_kernels import linear_logprobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

ROOT = pathlib.Path(__file__).parents[1]
TABLE = ROOT / "benchmarks" / "results" / "cuda_resources.csv"
COLUMNS = ["kernel", "source", "arch", "compiler", "registers", "shared_bytes", "spill_bytes", "stack_bytes", "mma"]
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}  # A100, H100, B200
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # the most a block may have
NVCC_ARCHS = ("80", "90a", "100")
NVCC_FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", f"-I{ROOT / 'csrc'}", "-Xptxas", "-v"]


def read_ptxas(log: str) -> list[dict]:
    """Rows of the kernels that `ptxas -v` reports, with mangled names."""
    rows = []
    for report in log.split("Compiling entry function ")[1:]:
        name, arch = re.match(r"'(\w+)' for '(\w+)'", report).groups()
        stack, stores, loads = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report
        ).groups()
        shared = re.search(r"(\d+) bytes smem", report)
        rows.append(
            {
                "kernel": name,
                "arch": arch,
                "registers": int(re.search(r"Used (\d+) registers", report)[1]),
                "shared_bytes": int(shared[1]) if shared else 0,
                "spill_bytes": int(stores) + int(loads),
                "stack_bytes": int(stack),
            }
        )
    return rows


class CompileOnly(DriverBase):
    """A device of the given architecture on which every launch compiles and does nothing; also its own `utils`."""

    def __init__(self, arch: int):
        self.arch, self.utils = arch, self

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # a kernel caches what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> None:
        return None  # nothing is timed here

    def get_device_properties(self, device: int) -> dict:
        return {"multiprocessor_count": MULTIPROCESSORS[device], "max_shared_mem": SHARED_BYTES[device]}

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple:
        return None, None, 0, 0, 1024  # module, function, registers, spills, threads a block may have

    def launcher_cls(self, source, metadata):
        return lambda *arguments: None


def launch_linear_logprobs(dtype: torch.dtype) -> None:
    n, h, v = 64, 128, 512
    hidden, weight, targets = torch.zeros(n, h, dtype=dtype), torch.zeros(v, h, dtype=dtype), torch.zeros(n).long()
    inputs = (hidden, weight, targets, None, 1.0, 0, v)
    _, entropy, largest, log_sum = linear_logprobs.linear_logprobs(*inputs)
    g = torch.ones(n)
    linear_logprobs.linear_logprobs_backward(*inputs, largest, log_sum, entropy, g, g, True, True)


LAUNCHES = {linear_logprobs: launch_linear_logprobs}  # module -> a launch of all of its kernels


def kernels_of(module) -> list[triton.JITFunction]:
    jit = [f for f in vars(module).values() if isinstance(f, triton.JITFunction)]
    return [f for f in jit if f.__module__ == module.__name__]


def compiled_row(compiled, source: str, reports: dict[str, dict]) -> dict:
    """compiled: what Triton made. reports: what ptxas said of it, by kernel and data type of its first argument."""
    name, dtype = compiled.name, "bfloat16" if next(iter(compiled.src.signature.values())) == "*bf16" else "float32"
    mma = re.search(r"tcgen05\.mma|wgmma\.mma_async|mma\.sync", compiled.asm["ptx"])
    return reports[name, dtype] | {
        "kernel": f"{name}<{dtype}>",
        "source": source,
        "compiler": f"triton {triton.__version__}",
        "shared_bytes": compiled.metadata.shared,
        "mma": mma[0] if mma else "",
    }


def triton_rows() -> list[dict]:
    rows = []
    triton.knobs.nvidia.dump_ptxas_log = True
    with tempfile.TemporaryDirectory() as cache:
        triton.knobs.cache.dir = cache  # a kernel found in a cache would come without its log
        for arch in MULTIPROCESSORS:
            triton.runtime.driver.set_active(CompileOnly(arch))
            reports = {}
            for launch in LAUNCHES.values():
                for dtype in (torch.float32, torch.bfloat16):
                    with contextlib.redirect_stdout(io.StringIO()) as log:
                        launch(dtype)
                    word = str(dtype).removeprefix("torch.")
                    reports |= {(row["kernel"], word): row for row in read_ptxas(log.getvalue())}
            for module in LAUNCHES:
                source = str(pathlib.Path(module.__file__).relative_to(ROOT))
                compiled = [c for kernel in kernels_of(module) for c in kernel.device_caches[arch][0].values()]
                rows += [compiled_row(c, source, reports) for c in compiled]
    return rows


def readable(mangled: str) -> str:
    """Kernel and template arguments, without return type, namespaces of ours and parameters."""
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    name = name.replace("(anonymous namespace)::", "").replace("aligner::", "").removeprefix("void ")
    depth = 0
    for at in range(len(name) - 1, -1, -1):  # parameters are the last pair of parentheses; template arguments have some
        depth += {")": 1, "(": -1}.get(name[at], 0)
        if depth == 0:
            return name[:at] if name[at] == "(" else name
    return name


def nvcc_version() -> str:
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return "nvcc " + re.search(r"V([\d.]+)", text)[1]


def nvcc_rows_of(path: pathlib.Path, compiler: str) -> list[dict]:
    archs = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in NVCC_ARCHS]
    command = ["nvcc", *NVCC_FLAGS, *archs, "-fatbin", str(path), "-o", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    own = {"source": str(path.relative_to(ROOT)), "compiler": compiler, "mma": ""}
    return [row | own | {"kernel": readable(row["kernel"])} for row in read_ptxas(done.stderr)]


def nvcc_rows() -> list[dict]:
    compiler = nvcc_version()
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda path: nvcc_rows_of(path, compiler), sorted(ROOT.glob("csrc/*.cu")))
        return [row for rows in found for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description="Write what the compilers make of the GPU kernels.")
    parser.add_argument("--compiler", choices=("triton", "nvcc"), help="only this one's rows; the others stay")
    parser.add_argument("--output", type=pathlib.Path, default=TABLE)
    options = parser.parse_args()
    compilers = [options.compiler] if options.compiler else ["triton", "nvcc"]
    if "nvcc" in compilers and not shutil.which("nvcc"):
        sys.exit("nvcc is not on PATH: install the CUDA toolkit, or pass --compiler triton")
    rows = []
    if options.output.exists():
        with options.output.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["compiler"].split()[0] not in compilers]
    rows += triton_rows() if "triton" in compilers else []
    rows += nvcc_rows() if "nvcc" in compilers else []
    with options.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            sorted(rows, key=lambda row: (row["source"], row["kernel"], int(re.sub(r"\D", "", row["arch"]))))
        )


if __name__ == "__main__":
    main()
