"""Wall time of the phases of a step, and the process's peak memory."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Timers:
    """Seconds spent in each named phase since the last `take`.

    with timers("sample"): ...
    """

    def __init__(self):
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """{"time/<phase>": seconds}, and start again from nothing."""
        seconds, self._seconds = self._seconds, {}
        return {f"time/{phase}": value for phase, value in seconds.items()}


def peak_memory_bytes() -> int:
    """The largest resident memory this process ever held, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():
        # getrusage also counts what the parent held before exec, so a small program under a large shell reads wrong.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
