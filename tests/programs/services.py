"""Services in processes of their own, which something may happen to."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from aligner import serve as program
from aligner.checkpoint import training
from aligner.models.critic import Critic
from aligner.serving.critic_service import CriticService
from tests.programs.runs import words

PROCESSES = multiprocessing.get_context("forkserver")
ROOT = Path(__file__).parent.parent.parent
# What is patched, the call at which it happens, whether after it, the signal, and who under the process gets it, if not
# the process itself.
FAULTS = {
    "kill -9 while it computes values": (CriticService, "_stale", 6, False, signal.SIGKILL),
    "kill -9 in the middle of a training": (Critic, "update", 7, False, signal.SIGKILL),
    "kill -9 between a training and its answer": (CriticService, "_train", 2, True, signal.SIGKILL),
    "kill -9 while it saves": (training, "_write_shards", 2, True, signal.SIGKILL),
    "kill -9 between a save and its answer": (CriticService, "_save", 1, True, signal.SIGKILL),
    "SIGTERM during a training": (Critic, "update", 6, False, signal.SIGTERM),
    "SIGSTOP for longer than the deadline": (CriticService, "_train", 3, False, signal.SIGSTOP),
    "kill -9 of Triton during a training": (CriticService, "_train", 2, False, signal.SIGKILL, "tritonserver"),
    "kill -9 of Triton's model processes": (
        CriticService,
        "_train",
        2,
        False,
        signal.SIGKILL,
        "triton_python_backend_stub",
    ),
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serve(argv: list[str], log: Path, fault: str) -> None:
    """`python -m aligner.serve` of a forked process, its words in a file."""
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.stdout = sys.stderr = log.open("a", buffering=1)
    if fault:
        _plant(log.with_suffix(".happened"), *FAULTS[fault])
    sys.exit(program.main(argv))


def _plant(
    mark: Path, owner: object, name: str, number: int, after: bool, what: signal.Signals, whom: str = ""
) -> None:
    """Signal this process, or those under it of a name, at that call of a function; never once `mark` is there."""
    whole: Callable = getattr(owner, name)
    calls: list[None] = []

    def call(*arguments, **named):
        calls.append(None)
        happens = len(calls) == number and not mark.exists()
        if happens and not after:
            mark.touch()
            _signal(what, whom)
        result = whole(*arguments, **named)
        if happens and after:
            mark.touch()
            _signal(what, whom)
        return result

    setattr(owner, name, call)


def _signal(what: signal.Signals, whom: str) -> None:
    this = psutil.Process()
    found = [p for p in this.children(recursive=True) if p.name() == whom] if whom else [this]
    assert found, f"there is no {whom}"
    for process in found:
        process.send_signal(what)


class Service:
    """`aligner.serve KIND` with these options in one process, until end(). `process` is of multiprocessing.

    fault: a name of FAULTS. restarts: it is started again by the same command line whenever it ends.
    """

    def __init__(self, kind: str, options: dict, log: Path, *, fault: str = "", restarts: bool = False):
        self.log, self.ends, self.stopped = log, [], threading.Event()
        self.port = options.get("serve.port") or free_port()
        self.prefix = "triton://" if options.get("serve.transport") == "pytriton" else ""
        argv = [kind, *words({"threads": 1} | options | {"serve.port": self.port})]
        self.arguments, self.restarts = (argv, log, fault), restarts
        self._start()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        end = time.monotonic() + 60
        while "ready: " not in self.words() and self.process.is_alive() and time.monotonic() < end:
            time.sleep(0.02)
        assert f"ready: {self.address}" in self.words(), self.words()

    def _start(self) -> None:
        self.process = PROCESSES.Process(target=serve, args=self.arguments)
        self.process.start()

    def _watch(self) -> None:
        while True:
            self.process.join()
            self.ends.append(self.process.exitcode)
            if self.stopped.is_set() or not self.restarts:
                return
            self._start()

    @property
    def address(self) -> str:
        return f"{self.prefix}127.0.0.1:{self.port}"

    def words(self) -> str:
        """What it has printed."""
        return self.log.read_text() if self.log.exists() else ""

    def kill(self) -> None:
        """At once, and wait for it."""
        os.kill(self.process.pid, signal.SIGKILL)
        self.thread.join(30)

    def end(self) -> list[int]:
        """Told to stop: the exit statuses of all its processes."""
        self.stopped.set()
        if self.process.is_alive():
            os.kill(self.process.pid, signal.SIGCONT)
            self.process.terminate()
        self.thread.join(30)
        if self.process.is_alive():
            self.process.kill()
        return self.ends


class Launched:
    """The same by torchrun, in several processes."""

    def __init__(self, kind: str, options: dict, processes: int):
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        options = {"threads": 1} | options | {"serve.port": 0}
        command = [sys.executable, "-W", "ignore", *launcher, "-m", "aligner.serve", kind, *words(options)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)
        for line in self.process.stdout:
            if line.startswith("ready: "):
                self.address = line.split()[1]
                return
        raise AssertionError(self.process.stderr.read())

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()
