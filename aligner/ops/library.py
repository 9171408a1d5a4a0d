"""The compiled library `aligner/_C.so`: loading it, and choosing between it and an operator's reference."""

import logging
import pathlib
from collections.abc import Sequence

import torch
from torch import Tensor

log = logging.getLogger(__name__)
PATH = pathlib.Path(__file__).parent.parent / "_C.so"


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
_logged: set[str] = set()


def use_cpp(op: str, impl: str, tensors: dict[str, Tensor], dtypes: Sequence[torch.dtype] = (torch.float32,)) -> bool:
    """Whether `op` runs compiled: "cpp" always, "reference" never, "auto" for CPU tensors of a dtype in `dtypes`.

    Raises ValueError for another impl and for tensors that "cpp" cannot take, RuntimeError when the library is missing.
    """
    if impl not in ("auto", "reference", "cpp"):
        raise ValueError(f"{op}: impl is {impl!r}, expected auto, reference or cpp.")
    unfit = [
        f"{name} is {str(t.dtype).removeprefix('torch.')} on {t.device.type}"
        for name, t in tensors.items()
        if t.dtype not in dtypes or t.device.type != "cpu"
    ]
    if impl == "cpp" and unfit:
        names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{op}: {unfit[0]}, impl cpp takes {names} on cpu; convert it or pass impl='reference'.")
    cpp = impl == "cpp" or (impl == "auto" and not unfit)
    if cpp and MISSING:
        raise RuntimeError(
            f"{op}: the compiled library is missing ({MISSING}); "
            "build it with `pip install --no-build-isolation -e .`, or pass impl='reference'."
        )
    if impl == "auto" and not torch.compiler.is_compiling() and op not in _logged:
        _logged.add(op)
        log.debug("%s runs %s%s", op, "cpp" if cpp else "reference", f" ({unfit[0]})" if unfit else "")
    return cpp


def cpu_isa(force: str | None = None) -> str:
    """Instruction set the CPU kernels run with, "avx512", "avx2" or "portable".

    force: use this one from now on ("" goes back to detection). Raises RuntimeError where the machine lacks it.
    """
    return torch.ops.aligner.cpu_isa(force)
