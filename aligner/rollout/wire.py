"""An engine in a process of another environment: its requests and answers are JSON, authenticated by a shared key.

A connection is a request: {"method", ...} there, then {} as long as it takes, and back one message a response,
{"result"} at the end, or {"error", "kind"}. Closing it cancels what has not finished. Weights do not come this way.
Both sides are here; neither imports Megatron-core or TensorRT-LLM.
"""

import contextlib
import json
import os
import queue
import secrets
import socket
import struct
import subprocess
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing import AuthenticationError
from multiprocessing import connection as connections
from multiprocessing.connection import Connection
from pathlib import Path

from aligner.data.batch import Rollout
from aligner.models.shape import ModelShape
from aligner.rollout.sampling import Response, Sampling, check_prompts, pack_responses
from aligner.rollout.trtllm import TrtllmSampler
from aligner.rollout.trtllm_api import EngineConfig

BEAT_S, SILENCE_S = 5.0, 60.0  # an engine that works says so; one that has been silent for so long is gone
STRANGER_S = 10  # that a caller has to prove that it has the key
MOST_BYTES = 1 << 30  # of a message
KINDS = {kind.__name__: kind for kind in (ValueError, TimeoutError, RuntimeError)}
# What torchrun tells its processes is not for an engine, whose ranks are its own.
NOT_FOR_ENGINES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "GROUP_NAME"),
    *("ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "PYTHONPATH"),
    *("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_USE_AGENT_STORE"),
)
FOR_ENGINES = (
    # Upstream's reload would copy from a pool of threads, each on a stream of its own.
    "TRT_LLM_DISABLE_LOAD_WEIGHTS_IN_PARALLEL=True",
    # The next replica's engine would join the first one's Ray cluster, whose GPUs are taken.
    "TLLM_RAY_FORCE_LOCAL_CLUSTER=1",
)


@dataclass(frozen=True, kw_only=True)
class TrtllmConfig(EngineConfig):
    python: str = ""
    """Python of TensorRT-LLM's environment; each replica starts an engine of its own on its GPUs."""
    url: tuple[str, ...] = ()
    """host:port of engines on GPUs of their own, one a replica (python -m aligner.trtllm)."""
    key_file: str = ""
    """File with the key of the engines at those addresses."""
    start_s: float = 1200.0
    """Seconds that an engine may take to start."""
    node_gb_s: float = 400.0
    """GB/s between GPUs of a node, for --dry-run's prediction."""
    network_gb_s: float = 50.0
    """GB/s of a GPU's network card, for the same."""

    def __post_init__(self):
        if min(self.tensor, self.max_batch, self.max_tokens) < 1 or min(self.drain_s, self.start_s) <= 0:
            raise ValueError("trtllm.tensor, max-batch, max-tokens, drain-s and start-s must be positive.")
        if not 0 < self.kv_fraction < 1 or min(self.node_gb_s, self.network_gb_s) <= 0:
            raise ValueError("trtllm.kv-fraction must be between 0 and 1, node-gb-s and network-gb-s positive.")
        if bool(self.url) != bool(self.key_file):
            raise ValueError("trtllm.url and trtllm.key-file come together; give both.")


def place_of(address: str) -> str | tuple[str, int]:
    """host:port, or the path of a local socket. Raises ValueError for what is neither."""
    if address.startswith("/"):
        return address
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"engine address {address!r} is neither host:port nor the path of a socket.")
    return host, int(port)


def serve(sampler: TrtllmSampler, address: str, key: bytes, known: dict) -> None:
    """Answer for ever, each request in threads of its own. known: what `describe` answers."""
    with connections.Listener(place_of(address), backlog=64) as listener:
        while True:
            connection = listener.accept()
            threading.Thread(target=_answer, args=(connection, sampler, key, known), daemon=True).start()


def _answer(connection: Connection, sampler: TrtllmSampler, key: bytes, known: dict) -> None:
    with connection:
        try:
            _patience(connection, STRANGER_S)
            connections.deliver_challenge(connection, key)
            connections.answer_challenge(connection, key)
            _patience(connection, 0)
            request = json.loads(connection.recv_bytes(MOST_BYTES))
            call = _Call(request, sampler, known)
            for work in (call.run, lambda: call.watch(connection)):
                threading.Thread(target=work, daemon=True).start()
            while (message := call.next()) is not None:
                connection.send_bytes(json.dumps(message).encode())
        except (AuthenticationError, OSError, EOFError, ValueError):  # a stranger, or one who has left
            return


def _patience(connection: Connection, seconds: int) -> None:
    """Reading raises OSError when nothing comes for so long; 0 for ever."""
    with socket.socket(fileno=os.dup(connection.fileno())) as same:
        same.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", seconds, 0))


class _Call:
    """A request that is worked on. next() gives its messages, None after the last."""

    def __init__(self, request: dict, sampler: TrtllmSampler, known: dict):
        self._request, self._sampler, self._known = request, sampler, known
        self._messages: queue.SimpleQueue[dict | None] = queue.SimpleQueue()
        self._stream, self._left = None, False

    def next(self) -> dict | None:
        try:
            return self._messages.get(timeout=BEAT_S)
        except queue.Empty:
            return {}

    def run(self) -> None:
        try:
            self._messages.put({"result": self._work(**self._request)})
        except Exception as error:
            kind = next((name for name, kind in KINDS.items() if isinstance(error, kind)), "RuntimeError")
            self._messages.put({"error": str(error) or repr(error), "kind": kind})
        self._messages.put(None)

    def _work(self, method: str, **given):
        if method == "describe":
            return self._known | {"version": self._sampler.weights_version}
        if method == "stream":
            sampling = {name: tuple(v) if isinstance(v, list) else v for name, v in given["sampling"].items()}
            self._stream = self._sampler.stream(given["prompts"], Sampling(**sampling), given["n"])
            if self._left:
                self._stream.close()
            for response in self._stream:
                self._messages.put({"response": asdict(response), "version": self._sampler.weights_version})
            return None
        if method in ("where", "attach", "pull", "sleep"):
            return getattr(self._sampler, method)(**given)
        raise ValueError(f"engine: asked for {method!r}, expected describe, stream, where, attach, pull or sleep.")

    def watch(self, connection: Connection) -> None:
        """Wait for who asks to leave, and cancel then."""
        with contextlib.suppress(OSError, EOFError):
            connection.recv_bytes(1)
        self._left = True
        if self._stream is not None:
            self._stream.close()


class EngineSampler:
    """The Sampler of an engine in another process, whose workers pull the weights.

    context: tokens of a sequence, at most. log: where the process, if it is ours, writes what it has to say.
    """

    def __init__(self, address: str, key: bytes, context: int, process: subprocess.Popen | None = None, log: str = ""):
        self._address, self._key, self._context = address, key, context
        self._process, self._log = process, log
        self.weights_version = -1

    def describe(self) -> dict:
        """What serves: model, tensor ranks, version of TensorRT-LLM."""
        return self._ask("describe")

    def where(self) -> list[str]:
        """As of rollout.trtllm.TrtllmSampler; so are attach(), pull() and sleep()."""
        return self._ask("where")

    def attach(self, shape: dict, ranks: list[dict], meeting: dict | None = None) -> list[dict]:
        return self._ask("attach", shape=shape, ranks=ranks, meeting=meeting)

    def pull(self, version: int) -> list[dict]:
        told = self._ask("pull", version=version)
        self.weights_version = version
        return told

    def sleep(self) -> None:
        self._ask("sleep")

    def generate(self, prompts: list[list[int]], sampling: Sampling, n: int = 1) -> Rollout:
        """As of rollout.sampling.Sampler."""
        return pack_responses(prompts, list(self.stream(prompts, sampling, n)), self.weights_version)

    def stream(self, prompts: list[list[int]], sampling: Sampling, n: int = 1) -> Iterator[Response]:
        """As of rollout.sampling.Sampler. Closing the iterator cancels what has not finished."""
        check_prompts(prompts, sampling, n, self._context)
        request = {"prompts": [list(map(int, p)) for p in prompts], "sampling": asdict(sampling), "n": n}
        for message in self._messages("stream", **request):
            if "response" in message:
                if message["version"] != self.weights_version:
                    raise RuntimeError(
                        f"sampler: a response of version {message['version']}, expected {self.weights_version}; "
                        "somebody else gives this engine weights."
                    )
                yield Response(**message["response"])

    def _ask(self, method: str, **given):
        *_, last = self._messages(method, **given)
        return last["result"]

    def _messages(self, method: str, **given) -> Iterator[dict]:
        """All but beats. Raises what the engine raised; RuntimeError when it is gone."""
        try:
            with connections.Client(place_of(self._address), authkey=self._key) as connection:
                connection.send_bytes(json.dumps({"method": method} | given).encode())
                while True:
                    if not connection.poll(SILENCE_S):
                        raise EOFError
                    message = json.loads(connection.recv_bytes(MOST_BYTES))
                    if "error" in message:
                        raise KINDS[message["kind"]](message["error"])
                    if message:
                        yield message
                    if "result" in message:
                        return
        except (OSError, EOFError) as error:
            if isinstance(error, TimeoutError):
                raise
            raise RuntimeError(f"sampler: the engine {self._lost(error)}") from None
        except AuthenticationError:
            raise ValueError(f"sampler: the engine at {self._address} has another key; give both the same.") from None

    def _lost(self, error: Exception) -> str:
        if self._process is None:
            return f"at {self._address} does not answer ({error or 'it went silent'}); is it still running?"
        try:
            status = self._process.wait(5)
        except subprocess.TimeoutExpired:
            return f"has gone silent; look into {self._log}."
        return f"has ended with status {status}; its last words: {last_words(self._log)} (all of them: {self._log})"

    def wait_until_ready(self, seconds: float) -> dict:
        """What describe() answers once it does. Raises ValueError when the process ends before, TimeoutError."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                return self.describe()
            except RuntimeError as error:
                if self._process is not None and self._process.poll() is not None:
                    raise ValueError(str(error)) from None
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"sampler: the engine {self._lost(OSError('not yet'))} It had {seconds:g} s to start "
                    "(--trtllm.start-s)."
                )
            time.sleep(0.2)


def check_model(known: dict, shape: ModelShape) -> None:
    """Raise ValueError unless the engine that describes itself so has this model and takes its sequences."""
    ours, theirs = json.loads(json.dumps(asdict(shape))), known["shape"]
    odd = [name for name in ours if name != "context" and theirs.get(name) != ours[name]]
    if odd:
        words = ", ".join(f"{name} {theirs.get(name)} for {ours[name]}" for name in odd)
        raise ValueError(f"the engine has another model than the trainer ({words}); start it with --model of this run.")
    if known["context"] < shape.context:
        raise ValueError(
            f"the engine takes {known['context']} tokens, the model {shape.context}; start it with --context "
            f"{shape.context}."
        )


def last_words(log: str) -> str:
    lines = [line for line in Path(log).read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "none"


def start_engine(config: TrtllmConfig, model: Path, context: int, log: Path, devices: Sequence[str]) -> EngineSampler:
    """An engine of this replica, which ends with this process.

    devices: GPUs it may use, as CUDA_VISIBLE_DEVICES names them; none for all.
    """
    folder = tempfile.TemporaryDirectory(prefix="aligner-engine-")
    key, key_file, address = secrets.token_hex(32), Path(folder.name) / "key", f"{folder.name}/socket"
    key_file.touch(0o600)
    key_file.write_text(key)
    clean = [word for name in NOT_FOR_ENGINES for word in ("-u", name)]
    seen = [f"CUDA_VISIBLE_DEVICES={','.join(devices)}"] if devices else []
    command = ["env", *clean, *FOR_ENGINES, *seen, config.python, "-m", "aligner.trtllm", "--with-parent"]
    command += ["--model", str(model), "--context", str(context), "--listen", address, "--key-file", str(key_file)]
    for name in EngineConfig.__dataclass_fields__:
        command += [f"--{name.replace('_', '-')}", str(getattr(config, name))]
    with log.open("ab") as file:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT)
    engine = EngineSampler(address, key.encode(), context, process, str(log))
    weakref.finalize(engine, _end, process, folder)
    return engine


def _end(process: subprocess.Popen, folder: tempfile.TemporaryDirectory) -> None:
    process.stdin.close()  # it ends by itself then
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
    folder.cleanup()
