"""What happens to a served critic, and that a run of PPO ends with the weights of an undisturbed one all the same."""

import os
import signal
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from aligner.serving.access import AccessConfig
from aligner.serving.listen import DIED
from aligner.serving.remote import Patience, Remote
from aligner.serving.service import STATUS, VALUES, Sequences, ServiceStatus, ValuesRequest
from tests.programs import every
from tests.programs.runs import metrics, run
from tests.programs.services import FAULTS, ROOT, Service

pytestmark = pytest.mark.slow

STEPS = 4
PAGE = ROOT / "docs" / "serving.md"  # has a row for each fault


def supervised(folder: Path, output: Path, command: dict, fault: str = "", transport: str = "grpc") -> Service:
    names = [name for name in command if name.startswith("critic.")] + ["batch.tokens-per-micro-batch"]
    options = {name: command[name] for name in names} | {"model": folder / "model", "output": output, "resume": True}
    options |= {"serve.transport": transport}
    return Service("critic", options, output.with_suffix(".log"), fault=fault, restarts=True)


def values(service: Service) -> list[float]:
    """Of a fixed sequence, by the weights of now, and their version."""
    connection = AccessConfig().connect(service.address)
    status = ServiceStatus.of(connection.call(STATUS, {}, 10))
    mask = np.array([False, False, True, True, True, True])
    version = status.weights_version
    sequences = Sequences.pack([[5, 9, 3, 7, 11, 4]])
    request = ValuesRequest(sequences=sequences, action_mask_N=mask, weights_version=version)
    return [version, *connection.call(VALUES, request.arrays(), 10)["values_A"].tolist()]


@dataclass(frozen=True)
class Undisturbed:
    folder: Path
    command: dict
    metrics: list[dict]
    policy: bytes
    values: list[float]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Undisturbed:
    folder = every.prepare(tmp_path_factory.mktemp("faults"))
    program = next(p for p in every.PROGRAMS if p.name == "ppo")
    command = program.command(folder, STEPS, rank=2) | {"save-every": 2, "eval-every": 0}
    service = supervised(folder, folder / "critic", command)
    done = run("ppo", folder / "run", command | {"critic.url": service.address})
    last = values(service)
    assert service.end() == [0] and last[0] == STEPS
    return Undisturbed(folder, command, metrics(done), policy(done), last)


def policy(done: Path) -> bytes:
    return (done / "policy" / "model.safetensors").read_bytes()


OF_TRITON = [fault for fault in FAULTS if "Triton" in fault]
LONG = ("values", "answer", "of Triton", "SIGSTOP", "while it saves")  # half a minute each, and much like others
CASES = [("grpc", fault) for fault in FAULTS if fault not in OF_TRITON]
CASES += [
    pytest.param("pytriton", fault, marks=[pytest.mark.full] if any(word in fault for word in LONG) else [])
    for fault in FAULTS
    if not fault.startswith("SIGTERM")
]


@pytest.mark.parametrize(("transport", "fault"), CASES)
def test_a_fault_changes_nothing(undisturbed: Undisturbed, tmp_path, monkeypatch, capsys, transport: str, fault: str):
    service = supervised(undisturbed.folder, tmp_path / "critic", undisturbed.command, fault, transport)
    stops = fault.startswith("SIGSTOP")
    if stops:
        monkeypatch.setitem(Remote.__init__.__kwdefaults__, "patience", Patience(deadline_s=1.0))
        threading.Thread(target=wake, args=(service, tmp_path / "critic.happened")).start()
    try:
        done = run("ppo", tmp_path / "run", undisturbed.command | {"critic.url": service.address})
        assert (tmp_path / "critic.happened").exists()
        assert metrics(done) == undisturbed.metrics
        assert policy(done) == undisturbed.policy
        assert values(service) == undisturbed.values
    finally:
        service.end()
    first = DIED if fault in OF_TRITON else 0 if fault.startswith("SIGTERM") else -signal.SIGKILL
    assert service.ends == ([0] if stops else [first, 0])
    again = capsys.readouterr().err.count("the critic has fallen back: training ")
    row = f"| {fault} | {transport} | {len(service.ends) - 1} | {again} | same weights |"
    assert row in PAGE.read_text().splitlines(), row


def wake(service: Service, happened: Path) -> None:
    while not happened.exists():
        time.sleep(0.05)
    time.sleep(3)
    os.kill(service.process.pid, signal.SIGCONT)


class Proxy:
    """Passes bytes on to a port, and does something to them on the way.

    cut: hangs up on both sides in the middle of every fifth answer. twice: every fifth answer comes twice.
    requests twice: what a caller sends goes to a second connection too, whose answers nobody gets.
    """

    def __init__(self, port: int, what: str):
        self.to, self.what, self.happened, self.answers = port, what, 0, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return  # the test has ended
            try:
                far = [
                    socket.create_connection(("127.0.0.1", self.to)) for _ in range(1 + (self.what == "requests twice"))
                ]
            except OSError:
                near.close()
                continue
            threading.Thread(target=self._forward, args=(near, far), daemon=True).start()
            threading.Thread(target=self._back, args=(far[0], near), daemon=True).start()
            if len(far) > 1:
                threading.Thread(target=self._drop, args=(far[1],), daemon=True).start()

    def _forward(self, near: socket.socket, far: list[socket.socket]) -> None:
        with suppress(OSError):
            while data := near.recv(1 << 16):
                for each in far:
                    each.sendall(data)
        for each in far:
            each.close()

    def _drop(self, far: socket.socket) -> None:
        with suppress(OSError):
            while data := far.recv(1 << 16):
                self.happened += len(data) > 100

    def _back(self, far: socket.socket, near: socket.socket) -> None:
        with suppress(OSError):
            while data := far.recv(1 << 16):
                self.answers += len(data) > 100  # less is the protocol's own
                fifth = len(data) > 100 and self.answers % 5 == 0
                self.happened += fifth and self.what in ("cut", "twice")
                if fifth and self.what == "cut":
                    near.sendall(data[:50])
                    break
                near.sendall(2 * data if fifth and self.what == "twice" else data)
        near.close()
        far.close()


@pytest.mark.parametrize("what", ["cut", "twice", "requests twice"])
def test_a_wire_that_loses_and_repeats(undisturbed: Undisturbed, tmp_path, what: str):
    service = supervised(undisturbed.folder, tmp_path / "critic", undisturbed.command)
    proxy = Proxy(service.port, what)
    try:
        done = run("ppo", tmp_path / "run", undisturbed.command | {"critic.url": f"127.0.0.1:{proxy.port}"})
        assert proxy.happened >= 3
        assert metrics(done) == undisturbed.metrics and policy(done) == undisturbed.policy
        assert values(service) == undisturbed.values
    finally:
        proxy.listener.close()
        service.end()
    assert service.ends == [0]
