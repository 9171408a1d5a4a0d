"""The compiled libraries, `aligner/_C.so` and `aligner/libaligner_cuda.so`: loading them, and choosing an impl."""

import logging
import pathlib
from collections.abc import Sequence

import torch
from torch import Tensor

log = logging.getLogger(__name__)
PATH = pathlib.Path(__file__).parent.parent / "_C.so"
CUDA_PATH = PATH.with_name("libaligner_cuda.so")
FLOAT32 = (torch.float32,)


def _load() -> str:
    """Why the library cannot be used; empty once it is loaded."""
    if not PATH.exists():
        return f"{PATH} does not exist"
    try:
        torch.ops.load_library(str(PATH))
    except OSError as error:
        return f"{PATH} does not load: {error}"
    return ""


# At import, so that torch.compile finds the operators; a library that is missing is an error only when it is asked for.
MISSING = _load()
LOADED = not MISSING
CUDA_LOADED = LOADED and CUDA_PATH.exists()
if CUDA_LOADED:
    torch.ops.aligner.load_cuda_kernels(str(CUDA_PATH))
_logged: set[str] = set()


def _unfit(impl: str, tensors: dict[str, Tensor], dtypes: Sequence[torch.dtype]) -> str:
    """What keeps `impl` from taking the tensors; empty when nothing does."""
    device = "cuda" if impl == "cuda" and cpu_isa() != "emulated-cuda" else "cpu"
    for name, t in tensors.items():
        if t.dtype not in dtypes or t.device.type != device:
            names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
            got = f"{str(t.dtype).removeprefix('torch.')} on {t.device.type}"
            return f"{name} is {got}, impl {impl} takes {names} on {device}"
    return ""


def use_compiled(
    op: str,
    impl: str,
    tensors: dict[str, Tensor],
    dtypes: Sequence[torch.dtype] = FLOAT32,
    impls: Sequence[str] = ("cpp", "cuda"),
) -> bool:
    """Whether `op` runs compiled: each of `impls` always, "reference" never, "auto" where a compiled kernel fits.

    Raises ValueError for another impl and for tensors that the impl cannot take, RuntimeError when the library that
    holds it is missing.
    """
    if impl not in ("auto", "reference", *impls):
        raise ValueError(f"{op}: impl is {impl!r}, expected auto, reference or {' or '.join(impls)}.")
    if impl == "reference":
        return False
    on_cuda = any(t.is_cuda for t in tensors.values())
    wanted = impl if impl != "auto" else "cuda" if on_cuda else "cpp"
    if MISSING and (impl != "auto" or not on_cuda):
        raise RuntimeError(
            f"{op}: the compiled library is missing ({MISSING}); "
            "build it with `pip install --no-build-isolation -e .`, or pass impl='reference'."
        )
    unfit = _unfit(wanted, tensors, dtypes) if LOADED else MISSING
    if impl != "auto":
        if unfit:
            raise ValueError(f"{op}: {unfit}; convert it or pass impl='reference'.")
        return True
    if on_cuda and not (CUDA_LOADED and "cuda" in impls):
        unfit = unfit or "there is no CUDA kernel"
    if not torch.compiler.is_compiling() and op not in _logged:
        _logged.add(op)
        log.debug("%s runs %s", op, f"reference ({unfit})" if unfit else wanted)
    return not unfit


def cpu_isa(force: str | None = None) -> str:
    """Instruction set the CPU kernels run with: "avx512", "avx2" or "portable".

    force: use this one from now on ("" goes back to detection; "emulated-cuda" sends CPU tensors to CUDA kernels that
    were compiled for the CPU, for tests). Raises RuntimeError where the machine lacks it.
    """
    return torch.ops.aligner.cpu_isa(force)
