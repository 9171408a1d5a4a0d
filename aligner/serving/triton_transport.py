"""Services over PyTriton: each endpoint is a model of Triton whose one input and output is a frame of grpc_transport.

Triton listens with HTTP on loopback alone, where PyTriton controls it, and with gRPC, TLS and the secret outward. It is
the process of another program: what it does not check, such as who may see its command line, this cannot either.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import traceback
import urllib.request
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path

import numpy as np
import psutil

from aligner.serving.grpc_transport import LONGEST_S, MAX_WORDS, Tls, check_token, from_frame, to_frame
from aligner.serving.service import STATUS, Arrays, Code, Service, ServiceError

HEADER, DEADLINE, PROBED = "authorization", "deadline_ms", "probe"  # of a request, next to its frame
# Triton's own endpoints need a secret that PyTriton makes up: only it may use them. Ours is checked here, since Triton
# would be told of it on a command line that everybody on the machine can read.
RESTRICTED = ("shared-memory", "model-repository", "statistics", "trace", "logging")
OPTIONS = {
    "allow_http": True,  # PyTriton's own control needs it, and it has no TLS
    "allow_grpc": True,
    "grpc_keepalive_time": 30_000,
    "grpc_keepalive_timeout": 10_000,
    "grpc_keepalive_permit_without_calls": True,
    "grpc_http2_min_recv_ping_interval_without_data": 20_000,
    "allow_metrics": False,  # the service has its own
    "exit_timeout_secs": 5,
    "strict_readiness": True,
    "grpc_header_forward_pattern": HEADER,
}
# Kills Triton, and removes what it has left, when this process, which holds the other end of its input, has gone.
GUARD = 'read _; kill -9 $0; rm -rf "$1" /dev/shm/pytrtion$2-*'
EMPTY = {"name": "frame", "shape": [1, 1], "datatype": "BYTES", "data": [""]}
PROBE = json.dumps({"parameters": {PROBED: 1}, "inputs": [EMPTY]}).encode()
PROBE_S = 10.0
SHARED, LEAST_SHARED = "/dev/shm", 64 << 20
LARGEST = (1 << 31) - (1 << 20)  # of a message of Triton's gRPC, with room for what is around the frame
DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
TOGETHER = 64  # requests of an endpoint that Triton hands over at once


class TritonServer:
    """A started Triton in front of a service. Made in the main thread: Triton ends with the thread that started it.

    endpoints: STATUS last. host, port, token, tls: as of grpc_transport.serve.
    calls: of one endpoint that may wait in Triton.
    Raises ValueError when it cannot be started.
    """

    def __init__(
        self,
        service: Service,
        endpoints: Sequence[str],
        *,
        host: str,
        port: int,
        token: str = "",
        tls: Tls | None = None,
        calls: int = 64,
    ):
        self._folder, self._guard = tempfile.TemporaryDirectory(prefix="aligner-triton-"), None  # mode 0700
        _prepare_environment(self._folder.name)
        try:
            from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
            from pytriton.model_config.common import QueuePolicy, TimeoutAction
            from pytriton.triton import Triton, TritonConfig, TritonSecurityConfig
        except ImportError:
            raise ValueError(
                "PyTriton is not installed; pip install 'aligner[pytriton]', or serve with --serve.transport grpc."
            ) from None
        self.port = port or _free_port()
        _check_port(host, self.port)
        control = _free_port()
        where = {"grpc_address": host, "grpc_port": self.port, "http_address": "127.0.0.1", "http_port": control}
        self._probe = f"http://127.0.0.1:{control}/v2/models/{STATUS}/infer"
        secured = _tls_files(tls, Path(self._folder.name)) if tls else {}
        security = TritonSecurityConfig(restricted_endpoints=list(RESTRICTED))
        self._triton = Triton(config=TritonConfig(**OPTIONS, **where, **secured), security_config=security)
        policy = QueuePolicy(
            timeout_action=TimeoutAction.REJECT,
            default_timeout_microseconds=int(LONGEST_S * 1e6),
            allow_timeout_override=True,
            max_queue_size=calls,
        )
        batcher = DynamicBatcher(default_queue_policy=policy)
        frame = Tensor(name="frame", dtype=np.bytes_, shape=(1,))
        for endpoint in endpoints:
            model = ModelConfig(batching=True, max_batch_size=TOGETHER, batcher=batcher)
            self._triton.bind(endpoint, _answers(service, endpoint, token), [frame], [frame], config=model, strict=True)
        before = set(_servers())  # in front of other services of this process
        try:
            self._triton.run()
        except Exception as error:  # its own kinds, for a port in use as for anything else
            self.stop()
            raise ValueError(
                f"Triton did not start on {host}:{self.port} ({type(error).__name__}: {error}); its log says why."
            ) from None
        (server,) = set(_servers()) - before
        self._processes = [server, *server.children()]  # of each endpoint one
        # Without us Triton would hold port and callers as long as its own processes do.
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", GUARD, str(server.pid), self._folder.name, str(os.getpid())], stdin=subprocess.PIPE
        )

    def alive(self) -> bool:
        """Whether its processes are, and a question comes through them to this one: Triton says "ready" either way."""
        if not all(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in self._processes):
            return False
        asked = urllib.request.Request(self._probe, PROBE, {"Content-Type": "application/json"})
        try:
            with DIRECTLY.open(asked, timeout=PROBE_S):
                return True
        except OSError:
            return False

    def stop(self) -> None:
        self._triton.stop()
        self._folder.cleanup()
        if self._guard:
            self._guard.kill()
            self._guard.wait()


def _prepare_environment(folder: str) -> None:
    """What Triton's processes need; PyTriton's files go to the folder. Raises ValueError where they cannot work."""
    if int(np.__version__.partition(".")[0]) > 1:
        raise ValueError(
            f"PyTriton sends empty answers under numpy {np.__version__}; pip install 'numpy<2', or serve with "
            "--serve.transport grpc."
        )
    os.environ["PYTRITON_HOME"] = folder
    # Its model processes must find the libpython of this interpreter, not the system's.
    libraries = [sysconfig.get_config_var("LIBDIR"), os.environ.get("LD_LIBRARY_PATH")]
    os.environ["LD_LIBRARY_PATH"] = ":".join(filter(None, libraries))


def _check_port(host: str, port: int) -> None:
    """PyTriton would find out after two minutes."""
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        raise ValueError(
            f"PyTriton cannot listen on {host}:{port} ({error.strerror}); the port is in use, or the address is not "
            "this machine's."
        ) from None


def _servers() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if child.name() == "tritonserver"]


def most_bytes() -> int:
    """Of a request that fits into shared memory.

    Triton hands it on there, keeps twice as much, rounded up to a power of two, and so for the reply; where it is full
    Triton's processes die. Raises ValueError when there is hardly any.
    """
    free = shutil.disk_usage(SHARED).free
    if free < LEAST_SHARED:
        raise ValueError(
            f"{SHARED} has {free >> 20} MiB left, PyTriton needs {LEAST_SHARED >> 20} MiB and eight times the largest "
            "request; give the machine more (docker run --shm-size 8g), or serve with --serve.transport grpc."
        )
    return min(free // 8, LARGEST)


def _tls_files(tls: Tls, folder: Path) -> dict:
    """Triton reads files."""
    for name, content in vars(tls).items():
        if content:
            (folder / name).write_bytes(content)
    files = {"grpc_server_cert": folder / "chain", "grpc_server_key": folder / "key"}
    if tls.authority:
        return files | {"grpc_use_ssl_mutual": True, "grpc_root_cert": folder / "authority"}
    return files | {"grpc_use_ssl": True}


def _answers(service: Service, endpoint: str, token: str):
    """The callable behind a model of Triton: frames of several callers at once, answered together."""

    def infer(requests: list) -> list[dict[str, np.ndarray]]:
        came = time.monotonic()
        waiting = [_begin(service, endpoint, token, request) for request in requests]
        replies = [_end(service, endpoint, w, came + _deadline_s(r)) for w, r in zip(waiting, requests, strict=True)]
        return [{"frame": np.array([[reply]], dtype=object)} for reply in replies]

    return infer


def _deadline_s(request) -> float:
    """Seconds that the caller waits, as it says."""
    given = (request.parameters or {}).get(DEADLINE)
    return min(given / 1000, LONGEST_S) if isinstance(given, int) else LONGEST_S


def _begin(service: Service, endpoint: str, token: str, request) -> Future | ServiceError | None:
    """The future reply, why there is none, or None of a probe."""
    if PROBED in (request.parameters or {}):
        return None
    try:
        check_token((request.parameters or {}).get(HEADER, ""), token)
        return service.call(endpoint, from_frame(bytes(request["frame"].reshape(-1)[0])))
    except ServiceError as error:
        return error
    except Exception:
        print(traceback.format_exc(), file=sys.stderr, flush=True)
        return ServiceError(Code.FAILED, "the service failed; its log says why.")


def _end(service: Service, endpoint: str, waiting: Future | ServiceError | None, end: float) -> bytes:
    """The frame of the reply, or of what went wrong by the time `end`; whoever hung up is not worked for."""
    if waiting is None:
        return b""
    try:
        if isinstance(waiting, ServiceError):
            raise waiting
        reply = waiting.result(max(end - time.monotonic(), 0))
        service.metrics.requests.labels(endpoint, "OK").inc()
        return to_frame(reply)
    except ServiceError as error:
        code, words = error.code, str(error)
    except FutureTimeoutError:
        waiting.cancel()
        code, words = Code.DEADLINE, "not answered in time."
    except Exception:
        print(traceback.format_exc(), file=sys.stderr, flush=True)
        code, words = Code.FAILED, "the service failed; its log says why."
    service.metrics.requests.labels(endpoint, code.value).inc()
    return to_frame({"error": np.array(code.value), "words": np.array(words[:MAX_WORDS])})


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class TritonConnection:
    """Calls of one service behind Triton; any thread may make them. Arguments as of grpc_transport.Connection."""

    def __init__(self, address: str, *, token: str = "", tls: Tls | None = None):
        import tritonclient.grpc as triton

        self._triton, self._folder = triton, None
        secured = {}
        if tls:
            self._folder = tempfile.TemporaryDirectory(prefix="aligner-tls-")
            names = {"root_certificates": tls.authority, "private_key": tls.key, "certificate_chain": tls.chain}
            for name, content in names.items():
                if content:
                    (Path(self._folder.name) / name).write_bytes(content)
                    secured[name] = str(Path(self._folder.name) / name)
            secured["ssl"] = True
        alive = triton.KeepAliveOptions(
            keepalive_time_ms=30_000, keepalive_timeout_ms=10_000, keepalive_permit_without_calls=True
        )
        self._client = triton.InferenceServerClient(address, keepalive_options=alive, **secured)
        self._headers = {HEADER: f"Bearer {token}"} if token else None

    def call(self, endpoint: str, request: Arrays, deadline_s: float) -> Arrays:
        """The reply. Raises ServiceError."""
        frame = self._triton.InferInput("frame", [1, 1], "BYTES")
        frame.set_data_from_numpy(np.array([[to_frame(request)]], dtype=object))
        try:
            answer = self._client.infer(
                endpoint,
                [frame],
                client_timeout=deadline_s,
                timeout=int(deadline_s * 1e6),
                parameters={DEADLINE: int(deadline_s * 1e3)},
                headers=self._headers,
            )
        except self._triton.InferenceServerException as error:
            words = error.message() or ""
            if "unknown model" in words:
                raise self._unknown(endpoint, words) from None
            raise _said(error.status() or "", words) from None
        reply = from_frame(answer.as_numpy("frame").reshape(-1)[0])
        if "error" in reply:
            raise ServiceError(Code(reply["error"].item()), reply["words"].item())
        return reply

    def _unknown(self, endpoint: str, words: str) -> ServiceError:
        """Triton takes calls before it has all endpoints; once it has STATUS, which comes last, there are no more."""
        try:
            started = self._client.is_model_ready(STATUS, client_timeout=PROBE_S)
            known = not started or self._client.is_model_ready(endpoint, client_timeout=PROBE_S)
        except self._triton.InferenceServerException:
            known = True
        return ServiceError(Code.UNAVAILABLE if known else Code.INVALID, words)

    def close(self) -> None:
        self._client.close()


def _said(status: str, words: str) -> ServiceError:
    """What Triton itself answered."""
    code = {
        "StatusCode.DEADLINE_EXCEEDED": Code.DEADLINE,
        "StatusCode.INVALID_ARGUMENT": Code.INVALID,
        "StatusCode.RESOURCE_EXHAUSTED": Code.INVALID,
        "StatusCode.UNAVAILABLE": Code.UNAVAILABLE,
        "StatusCode.INTERNAL": Code.UNAVAILABLE,  # one of its processes has died; what fails in ours comes as a frame
    }.get(status, Code.FAILED)
    if "maximum queue size" in words:
        return ServiceError(Code.BUSY, words)
    if "Request timeout expired" in words:
        return ServiceError(Code.DEADLINE, words)
    return ServiceError(code, words)
