"""Services over plain gRPC: named arrays in one frame, a shared secret, TLS, deadlines.

A frame is 4 bytes, little-endian: the length of a JSON list of [name, dtype, shape]; the list; the arrays' bytes in its
order. Nothing in it is executed: no pickle. A frame above CHUNK comes as a stream of pieces, by the method whose name
ends in STREAMED. /grpc.health.v1.Health/Check answers whoever asks, with or without the token.
"""

import hmac
import json
import math
import struct
import sys
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from functools import partial

import grpc
import numpy as np

from aligner.serving.service import STATUS, Arrays, Code, Service, ServiceError, ServiceStatus, expect

MAX_BYTES = 256 << 20  # of a message; a frame in pieces may have more
CHUNK = 64 << 20
STREAMED = ".streamed"
ALIVE_S = 1800.0  # a service whose ranks have not met for so long is not healthy: no batch takes as long
SERVING, NOT_SERVING = b"\x08\x01", b"\x08\x02"  # grpc.health.v1.HealthCheckResponse, its field 1
MAX_WORDS = 1000  # of a message to a caller: gRPC sends no more than 16 kB of them
GRACE_S = 5.0  # for answers that are on their way when the service ends
LONGEST_S = 600.0  # of a call without a deadline of its own
DTYPES = ("int32", "int64", "uint16", "float32", "float64", "bool", "str")
PATH = "aligner"  # of a method: /aligner/<endpoint>
STATUS_OF = {
    Code.INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    Code.UNAUTHENTICATED: grpc.StatusCode.UNAUTHENTICATED,
    Code.BUSY: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Code.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    Code.DEADLINE: grpc.StatusCode.DEADLINE_EXCEEDED,
    Code.PRECONDITION: grpc.StatusCode.FAILED_PRECONDITION,
    Code.FAILED: grpc.StatusCode.INTERNAL,
}
OPTIONS = [
    ("grpc.max_receive_message_length", MAX_BYTES),
    ("grpc.max_send_message_length", MAX_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 20_000),
]
# Our own pauses decide when a service is looked for again, and no proxy of the environment sees what is sent.
CALLER_OPTIONS = [
    ("grpc.initial_reconnect_backoff_ms", 250),
    ("grpc.min_reconnect_backoff_ms", 5000),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.enable_http_proxy", 0),
]


@dataclass(frozen=True, kw_only=True)
class Tls:
    """PEM bytes. A server has key and chain, and an authority to ask its callers for certificates of it.

    A caller has the authority that signed the server's certificate, and key and chain to show its own.
    """

    key: bytes | None = None
    chain: bytes | None = None
    authority: bytes | None = None


def to_frame(arrays: Arrays) -> bytes:
    """The bytes of named arrays; texts are arrays of no dimension."""
    header, parts = [], []
    for name, array in arrays.items():
        text = array.dtype.kind == "U"
        data = array.item().encode() if text else np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        header.append([name, "str" if text else array.dtype.name, [*array.shape, len(data)]])
        parts.append(data)
    words = json.dumps(header).encode()
    return b"".join([struct.pack("<I", len(words)), words, *parts])


def from_frame(frame: bytes) -> Arrays:
    """The named arrays, which share the frame's memory. Raises ServiceError INVALID when it is no frame."""
    try:
        (length,) = struct.unpack_from("<I", frame)
        header, position, arrays = json.loads(frame[4 : 4 + length]), 4 + length, {}
        view = memoryview(frame)  # its slices are no copies
        for name, dtype, (*shape, num) in header:
            expect(dtype in DTYPES and min(shape, default=0) >= 0 and num >= 0, f"{name} is {dtype} {shape}")
            data, position = view[position : position + num], position + num
            if dtype == "str":
                arrays[str(name)] = np.array(bytes(data).decode())
            else:
                arrays[str(name)] = np.frombuffer(data, dtype, count=math.prod(shape)).reshape(shape)
                expect(arrays[str(name)].nbytes == num, f"{name} has {num} bytes for {dtype} {shape}")
    except (ValueError, TypeError, KeyError, struct.error, RecursionError, OverflowError) as error:
        raise ServiceError(Code.INVALID, f"not a frame of named arrays ({type(error).__name__}).") from None
    expect(position == len(frame), f"the frame has {len(frame)} bytes, its arrays end at {position}")
    return arrays


def check_token(shown: str, token: str) -> None:
    """Raise ServiceError UNAUTHENTICATED unless the header shows the token; an empty one lets everybody."""
    if token and not hmac.compare_digest(str(shown).encode(), f"Bearer {token}".encode()):
        raise ServiceError(Code.UNAUTHENTICATED, "the token is missing or wrong.")


@dataclass(frozen=True)
class GrpcServer:
    """A started server and its port."""

    server: grpc.Server
    port: int

    def alive(self) -> bool:
        return True  # it is of this process

    def stop(self, grace_s: float = GRACE_S) -> None:
        """Takes no more calls; those that are on their way have as long."""
        self.server.stop(grace_s).wait()


def serve(
    service: Service,
    endpoints: Sequence[str],
    *,
    host: str,
    port: int,
    token: str = "",
    tls: Tls | None = None,
    calls: int = 64,
    request_bytes: int = MAX_BYTES,
) -> GrpcServer:
    """A started server.

    token: that callers must show; empty lets everybody. tls: None listens in the clear.
    calls: at once, those that wait too; each holds a thread. request_bytes: of a frame, at most, in one piece or many.
    Raises ValueError when it cannot listen there.
    """

    def answer(endpoint: str, frame: bytes, context: grpc.ServicerContext) -> bytes:
        future: Future | None = None
        try:
            check_token(dict(context.invocation_metadata()).get("authorization", ""), token)
            future = service.call(endpoint, from_frame(frame))
            context.add_callback(future.cancel)  # whoever hung up is not answered
            reply = to_frame(future.result(min(context.time_remaining() or LONGEST_S, LONGEST_S)))
            service.metrics.requests.labels(endpoint, "OK").inc()
            return reply
        except ServiceError as error:
            code, words = error.code, str(error)
        except FutureTimeoutError:
            future.cancel()
            code, words = Code.DEADLINE, "not answered in time."
        except CancelledError:
            code, words = Code.UNAVAILABLE, "the call was given up."
        except Exception:  # gRPC would send what it says to the caller
            print(traceback.format_exc(), file=sys.stderr, flush=True)
            code, words = Code.FAILED, "the service failed; its log says why."
        service.metrics.requests.labels(endpoint, code.value).inc()
        context.abort(STATUS_OF[code], ascii(f"{code.value}: {words}")[1:-1][:MAX_WORDS])

    def answer_pieces(endpoint: str, pieces: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        held, size = [], 0
        for piece in pieces:
            held, size = [*held, piece], size + len(piece)
            if size > request_bytes:
                words = f"got a frame of more than {request_bytes} bytes; send less at once."
                context.abort(STATUS_OF[Code.INVALID], f"{Code.INVALID.value}: {words}")
        yield from in_pieces(answer(endpoint, b"".join(held), context))

    methods = {}
    for name in endpoints:
        methods[name] = grpc.unary_unary_rpc_method_handler(partial(answer, name))
        methods[name + STREAMED] = grpc.stream_stream_rpc_method_handler(partial(answer_pieces, name))
    health = {"Check": grpc.unary_unary_rpc_method_handler(lambda _asked, _context: _health(service))}
    pool = ThreadPoolExecutor(max_workers=calls, thread_name_prefix="grpc")
    # Without SO_REUSEPORT a second server on the port is an error, not a rival.
    longest = min(request_bytes, MAX_BYTES)
    options = [*OPTIONS[1:], ("grpc.max_receive_message_length", longest), ("grpc.so_reuseport", 0)]
    server = grpc.server(pool, options=options, maximum_concurrent_rpcs=calls)
    known = {PATH: methods, "grpc.health.v1.Health": health}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(*pair) for pair in known.items()])
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        if tls:
            asks = {"root_certificates": tls.authority, "require_client_auth": tls.authority is not None}
            credentials = grpc.ssl_server_credentials([(tls.key, tls.chain)], **asks)
            bound = server.add_secure_port(address, credentials)
        else:
            bound = server.add_insecure_port(address)
    except RuntimeError:
        bound = 0
    if not bound:
        secured = ", or certificate and key do not belong together" if tls else ""
        raise ValueError(
            f"cannot listen on {address}; the port is in use, or the address is not this machine's{secured}."
        )
    server.start()
    return GrpcServer(server, bound)


def in_pieces(frame: bytes) -> Iterator[bytes]:
    """The frame in messages of at most CHUNK bytes."""
    for start in range(0, len(frame), CHUNK):
        yield frame[start : start + CHUNK]


def _health(service: Service) -> bytes:
    status = ServiceStatus.of(service.call(STATUS, {}).result())
    return SERVING if status.beat_age_s < ALIVE_S and not status.draining else NOT_SERVING


class Connection:
    """Calls of one service; any thread may make them.

    address: host:port. token: of the service; empty for none. tls: None connects in the clear.
    """

    def __init__(self, address: str, *, token: str = "", tls: Tls | None = None):
        options = [*OPTIONS, *CALLER_OPTIONS]
        if tls is None:
            self._channel = grpc.insecure_channel(address, options)
        else:
            credentials = grpc.ssl_channel_credentials(tls.authority, tls.key, tls.chain)
            self._channel = grpc.secure_channel(address, credentials, options)
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()

    def call(self, endpoint: str, request: Arrays, deadline_s: float) -> Arrays:
        """The reply. Raises ServiceError."""
        frame, path, how = to_frame(request), f"/{PATH}/{endpoint}", {"timeout": deadline_s, "metadata": self._metadata}
        try:
            if len(frame) <= CHUNK:
                return from_frame(self._channel.unary_unary(path)(frame, **how))
            return from_frame(b"".join(self._channel.stream_stream(path + STREAMED)(in_pieces(frame), **how)))
        except grpc.RpcError as error:
            words, status = error.details() or "", error.code()
        code = next((code for code, known in STATUS_OF.items() if known is status), Code.FAILED)
        if code is Code.BUSY and not words.startswith((code.value, "Concurrent RPC limit")):
            code = Code.INVALID  # gRPC says that a frame is too large
        raise ServiceError(code, words.removeprefix(f"{code.value}: ") or status.name)

    def close(self) -> None:
        self._channel.close()
