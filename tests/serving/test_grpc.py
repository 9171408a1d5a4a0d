"""The contract and its transport: frames, checks, secrets, TLS, deadlines, callers that try again."""

import json
import pickle
import socket
import struct
import subprocess
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace

import grpc
import numpy as np
import psutil
import pytest
import trustme
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from tritonclient.grpc import service_pb2, service_pb2_grpc

from aligner.serving import grpc_transport, triton_transport
from aligner.serving.access import AccessConfig
from aligner.serving.grpc_transport import Connection, Tls, from_frame, to_frame
from aligner.serving.metrics import ServiceMetrics
from aligner.serving.remote import Patience, RemoteReward
from aligner.serving.service import (
    REWARD,
    STATUS,
    Code,
    Limits,
    RewardRequest,
    Sequences,
    ServiceError,
    ServiceStatus,
    resolved,
)
from aligner.serving.triton_transport import TritonServer

LIMITS = Limits(vocabulary=100, context=6, tokens=12)
STATE = ServiceStatus(
    kind="reward",
    model="a model",
    tokenizer="the same",
    vocabulary=100,
    attributes=2,
    request_tokens=12,
    request_bytes=1 << 20,
    context=6,
    weights_version=0,
    queue=0,
    beat_age_s=0.5,
    draining=False,
)
SECRET = "0123456789abcdef0123456789abcdef"
NUMBERS = st.sampled_from(["int32", "int64", "uint16", "float32", "float64", "bool"]).flatmap(
    lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
)
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")).map(np.array)


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), NUMBERS | TEXTS, max_size=4))
def test_frames_give_back_what_was_put_in(named):
    back = from_frame(to_frame(named))
    assert list(back) == list(named)
    for name, array in named.items():
        assert back[name].dtype.kind == array.dtype.kind and back[name].shape == array.shape
        assert back[name].tobytes() == array.tobytes()


def framed(header: object, data: bytes = b"") -> bytes:
    words = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<I", len(words)) + words + data


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xff\xff\xff\xff",
        framed(b"{"),
        framed(b"[" * 100_000),
        framed([["x"]]),
        framed([["x", "int64", [2, 8]]], bytes(8)),
        framed([["x", "int64", [1, 16]]], bytes(16)),
        framed([["x", "int64", [-1, 8]]], bytes(8)),
        framed([["x", "int64", [1.5, 8]]], bytes(8)),
        framed([["x", "int64", [2**70, 8]]], bytes(8)),
        framed([["x", "int64", [1, 8]]], bytes(9)),
        framed([["x", "object", [1, 8]]], bytes(8)),
        framed([["x", "str", [1]]], b"\xff"),
        pickle.dumps({"x": 1}),
        to_frame({"x": np.arange(5)})[:-1],
    ],
)
def test_what_is_no_frame_is_refused(frame: bytes):
    with pytest.raises(ServiceError) as error:
        from_frame(frame)
    assert error.value.code is Code.INVALID


@given(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=6), min_size=1, max_size=2))
def test_sequences_are_packed_and_joined(sequences):
    packed = [Sequences.of(Sequences.pack(part).arrays(), LIMITS) for part in (sequences, sequences[:1])]
    joined, whole = Sequences.join(packed), [*sequences, *sequences[:1]]
    assert [x.tolist() for x in np.split(joined.tokens_N, joined.cu_seqlens[1:-1])] == whole
    assert joined.cu_seqlens.tolist() == np.cumsum([0, *map(len, whole)]).tolist()


def request(tokens, ends, dtype="int32") -> dict:
    return {"tokens_N": np.array(tokens, dtype), "cu_seqlens": np.array(ends, dtype)}


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({}, r"got \[\], expected tokens_N and cu_seqlens"),
        (request([1], [0, 1]) | {"x": np.array(1)}, "got .*'x'"),
        (request([1.0], [0, 1], "float32"), "tokens_N is float32"),
        (request([[1]], [0, 1]), r"tokens_N is int32 of shape \(1, 1\)"),
        (request([], [0]), "cu_seqlens does not begin"),
        (request([1], [1, 1]), "cu_seqlens does not begin"),
        (request([1, 2], [0, 1]), "cu_seqlens ends with 1, but tokens_N has 2 tokens"),
        (request([1, 2], [0, 2, 2]), "every sequence needs a token"),
        (request([1, 2], [0, 3, 2]), "every sequence needs a token"),
        (request([1] * 7, [0, 7]), "the longest sequence has 7 tokens, the model's context is 6"),
        (request([1] * 13, [0, 6, 12, 13]), "got 13 tokens, a request may have 12"),
        (request([1] * 10**7, range(0, 10**7 + 1, 5)), "got 10000000 tokens, a request may have 12"),
        (request([1, 100], [0, 2]), "ids from 1 to 100, expected 0 to 99"),
        (request([-1, 3], [0, 2]), "ids from -1 to 3"),
    ],
)
def test_requests_that_ask_for_too_much_or_make_no_sense(asked: dict, words: str):
    with pytest.raises(ServiceError, match=words) as error:
        Sequences.of(asked, LIMITS)
    assert error.value.code is Code.INVALID


class Sums:
    """Two rewards a response, the sum and the number of its tokens; `faults` come first, one a call."""

    def __init__(self, *faults):
        self.faults, self.calls, self.futures = list(faults), [], []
        self.metrics = ServiceMetrics()

    def call(self, endpoint: str, asked: dict) -> Future:
        future: Future = Future()
        self.futures.append(future)
        if endpoint == STATUS:
            future.set_result(STATE.arrays())
            return future
        self.calls.append(asked)
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, Exception):
            raise fault
        if fault == "silence":
            return future
        sequences = RewardRequest.of(asked, LIMITS).sequences
        parts = np.split(sequences.tokens_N, sequences.cu_seqlens[1:-1])
        rewards = np.array([[part.sum(), len(part)] for part in parts], np.float32)
        names = {name: np.array(getattr(STATE, name)) for name in ("model", "tokenizer")}
        future.set_result({"rewards_BK": rewards, "weights_version": np.array(0), **names})
        return future


@pytest.fixture
def served():
    """serve(service, **options) -> address."""
    servers = []

    def serve(service, port: int = 0, **options) -> str:
        servers.append(grpc_transport.serve(service, (REWARD, STATUS), host="127.0.0.1", port=port, **options))
        return f"127.0.0.1:{servers[-1].port}"

    serve.stop = lambda: servers.pop().stop(0)
    yield serve
    for server in servers:
        server.stop(0)


class Switch:
    """A service that passes on to another one, since Triton takes seconds to start."""

    def __init__(self):
        self.target = Sums()

    @property
    def metrics(self) -> ServiceMetrics:
        return self.target.metrics

    def call(self, endpoint: str, asked: dict) -> Future:
        return self.target.call(endpoint, asked)


@pytest.fixture(scope="module")
def triton(tmp_path_factory):
    switch = Switch()
    server = TritonServer(switch, (REWARD, STATUS), host="127.0.0.1", port=0, token=SECRET)
    address = f"triton://127.0.0.1:{server.port}"
    (secret := tmp_path_factory.mktemp("triton") / "secret").write_text(SECRET)
    remote(address, token_file=str(secret), patience=PATIENT).score([[1]])  # the first calls of a model take longer
    yield switch, address
    server.stop()


@pytest.fixture(params=["grpc", pytest.param("pytriton", marks=pytest.mark.slow)])
def both(request, served, tmp_path):
    """connect(service, **options) -> RemoteReward, over each transport."""
    (tmp_path / "secret").write_text(SECRET)

    def connect(service, **options) -> RemoteReward:
        if request.param == "grpc":
            address = served(service, token=SECRET)
        else:
            switch, address = request.getfixturevalue("triton")
            switch.target = service
            options = {"patience": PATIENT} | options
        return remote(address, **{"token_file": str(tmp_path / "secret")} | options)

    return connect


QUICK = Patience(deadline_s=0.5, total_s=8.0, start_s=8.0)
PATIENT = Patience(deadline_s=3.0, total_s=60.0, start_s=60.0)  # of several processes on a busy machine


def remote(address: str, *, patience: Patience = QUICK, weights=(1.0, 0.0), **options) -> RemoteReward:
    reward = RemoteReward(address, weights, AccessConfig(**options), patience)
    reward.check("the same")
    return reward


def test_a_served_reward_is_the_weighted_sum_of_its_attributes(both):
    service = Sums()
    reward = both(service, weights=(0.5, 10.0))
    assert reward.score([[1, 2], [3], [4, 5, 6, 7, 8, 9], [1, 1, 1, 1]]) == [21.5, 11.5, 79.5, 42.0]
    assert [len(asked["tokens_N"]) for asked in service.calls] == [9, 4]  # requests of at most 12 tokens


@pytest.mark.parametrize(
    "fault",
    [ServiceError(Code.BUSY, "full."), ServiceError(Code.UNAVAILABLE, "leaving."), "silence"],
    ids=["busy", "leaving", "silence"],
)
def test_what_may_help_is_tried_again(both, fault):
    service = Sums(fault, fault)
    assert both(service).score([[1, 2]]) == [3.0]
    assert len(service.calls) == 3
    if fault == "silence":  # whoever has hung up is not worked for
        assert [future.cancelled() for future in service.futures[1:3]] == [True, True]


def test_a_service_that_starts_later_or_again_is_found(served):
    address = served(Sums())
    port = int(address.rpartition(":")[2])
    reward = remote(address)
    served.stop()
    timer = threading.Timer(1.0, served, (Sums(), port))
    timer.start()
    assert reward.score([[1, 2], [50]]) == [3.0, 50.0]
    timer.join()


def test_a_service_that_stays_away_is_named(served):
    address = served(Sums())
    reward = remote(address, patience=Patience(deadline_s=0.2, total_s=1.0))
    served.stop()
    began = time.monotonic()
    with pytest.raises(
        ValueError, match=rf"reward model at {address} has not answered since \d\d:\d\d:\d\d \(\d tries"
    ):
        reward.score([[1]])
    assert time.monotonic() - began < 5
    with pytest.raises(ValueError, match="check that `python -m aligner.serve reward` runs there"):
        remote(address, patience=Patience(start_s=0.5))


def test_what_the_service_refuses_is_told_at_once(both):
    service = Sums(ServiceError(Code.INVALID, "no such thing."), RuntimeError("secret path /home/x"))
    reward = both(service)
    with pytest.raises(ValueError, match=r"refused: no such thing\. \(INVALID\)"):
        reward.score([[1]])
    with pytest.raises(ValueError, match="refused: the service failed; its log says why") as error:
        reward.score([[1]])  # what went wrong inside stays there
    assert "secret" not in str(error.value) and len(service.calls) == 2


@pytest.mark.slow
def test_a_service_that_is_back_is_found_soon(served):
    """gRPC's own pauses between connections grow to two minutes."""
    address = served(Sums())
    reward = remote(address, patience=Patience(total_s=60.0))
    served.stop()
    back = []
    timer = threading.Timer(
        12.0, lambda: (served(Sums(), int(address.rpartition(":")[2])), back.append(time.monotonic()))
    )
    timer.start()
    assert reward.score([[1, 2]]) == [3.0]
    assert time.monotonic() - back[0] < 9.5
    timer.join()


def test_after_one_request_was_given_up_the_others_are(served):
    address = served(Sums())
    reward = remote(address, patience=Patience(total_s=1.5))
    served.stop()
    began = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        failures = [future.exception() for future in [pool.submit(reward.score, [[1]]) for _ in range(20)]]
    assert time.monotonic() - began < 5
    assert "has not answered since" in str(failures[0]) and "has not answered another request" in str(failures[-1])


def test_a_proxy_of_the_environment_is_not_used(served, monkeypatch):
    address = served(Sums())
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert remote(address).score([[1, 2]]) == [3.0]


def test_as_many_calls_as_are_allowed_and_no_more(served):
    service = Sums(*["silence"] * 3)
    address = served(service, calls=3)
    reward = remote(address, patience=Patience(deadline_s=1.0, total_s=1.2))
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(reward.score, [[1]]) for _ in range(3)]
        end = time.monotonic() + 5
        while len(service.calls) < 3 and time.monotonic() < end:
            time.sleep(0.01)
        with pytest.raises(ServiceError) as error:
            Connection(address).call(STATUS, {}, 5.0)
        assert error.value.code is Code.BUSY
        assert all(future.exception() or future.result() == [1.0] for future in waiting)


def test_a_frame_that_is_too_large_is_not_sent_again(served):
    service = Sums()
    reward = remote(served(service, request_bytes=100))
    with pytest.raises(ValueError, match="refused: .*larger than max"):
        reward.score([[1] * 6, [1] * 6] * 3)


def test_another_model_in_the_middle_of_a_run(both, monkeypatch):
    reward = both(Sums())
    assert reward.score([[1]]) == [1.0]
    monkeypatch.setitem(globals(), "STATE", replace(STATE, model="another model"))
    with pytest.raises(ValueError, match="serves another reward model than when this run began"):
        reward.score([[1]])


def test_nan_is_not_a_reward(both, monkeypatch):
    reward = both(Sums())
    monkeypatch.setattr(np, "split", lambda *a: [np.array([np.nan])])
    with pytest.raises(ValueError, match="not finite"):
        reward.score([[1]])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokenizer": "another"}, "has another tokenizer than the model"),
        ({"kind": "critic"}, "serves a critic, expected a reward model"),
        ({"attributes": 3}, "has 2 numbers, the reward model at .* gives 3 attributes"),
    ],
)
def test_a_service_that_does_not_fit_is_refused(both, monkeypatch, change: dict, words: str):
    monkeypatch.setitem(globals(), "STATE", replace(STATE, **change))
    with pytest.raises(ValueError, match=words):
        both(Sums())


def test_callers_without_the_secret_are_refused(both, tmp_path):
    service = Sums()
    wrong = tmp_path / "wrong"
    wrong.write_text(SECRET.upper())
    assert both(service).score([[7]]) == [7.0]
    for file in ("", str(wrong)):
        with pytest.raises(ValueError, match=r"the token is missing or wrong\. \(UNAUTHENTICATED\); give --reward"):
            both(service, token_file=file)
    assert len(service.futures) == 2  # nothing of theirs came through
    counted = service.metrics.registry.get_sample_value
    assert counted("aligner_requests_total", {"endpoint": REWARD, "code": "OK"}) == 1
    assert counted("aligner_requests_total", {"endpoint": STATUS, "code": "UNAUTHENTICATED"}) == 2
    with pytest.raises(ValueError, match="--reward.token-file '.*' cannot be read"):
        both(service, token_file=str(tmp_path / "none"))
    wrong.write_text("short")
    with pytest.raises(ValueError, match="holds no secret of 16 or more printable characters"):
        both(service, token_file=str(wrong))


def test_many_callers_at_once_get_their_own_answers(both):
    reward = both(Sums(), patience=Patience(deadline_s=30.0, total_s=60.0))
    draws = [[[n, i] for i in range(1, 1 + n % 6)] for n in range(1, 80)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(reward.score, draws))
    assert answers == [[float(n + i) for n, i in draw] for draw in draws]


@pytest.mark.slow
def test_triton_keeps_the_secret_and_what_it_is_not_asked_for_to_itself(triton):
    _, address = triton
    host, port = address.removeprefix("triton://").split(":")
    lines = subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True, check=True).stdout
    assert SECRET not in lines
    started = next(line for line in lines.splitlines() if "/tritonserver " in line and port in line)
    assert "--http-address 127.0.0.1 " in started and "0.0.0.0" not in started
    channel = grpc.insecure_channel(f"{host}:{port}")
    client = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    for call, asked in (
        (client.RepositoryIndex, service_pb2.RepositoryIndexRequest()),
        (client.RepositoryModelLoad, service_pb2.RepositoryModelLoadRequest(model_name="reward_v1")),
        (client.SystemSharedMemoryStatus, service_pb2.SystemSharedMemoryStatusRequest()),
        (client.TraceSetting, service_pb2.TraceSettingRequest()),
        (client.LogSettings, service_pb2.LogSettingsRequest()),
        (client.ModelStatistics, service_pb2.ModelStatisticsRequest()),
    ):
        with pytest.raises(grpc.RpcError, match="restricted"):
            call(asked, timeout=5)
    channel.close()


def test_triton_needs_shared_memory(monkeypatch):
    """As much as docker gives is little."""
    for free, wanted in ((64 << 20, 8 << 20), (1 << 50, (1 << 31) - (1 << 20))):
        monkeypatch.setattr(triton_transport.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        assert triton_transport.most_bytes() == wanted
    monkeypatch.setattr(triton_transport.shutil, "disk_usage", lambda _: SimpleNamespace(free=5 << 20))
    with pytest.raises(ValueError, match="/dev/shm has 5 MiB left, PyTriton needs 64 MiB"):
        triton_transport.most_bytes()


@pytest.mark.slow
def test_triton_lives_on_after_garbage(triton, tmp_path):
    """Frames that are none, protobufs that are cut off or not what they claim, other protocols, other endpoints."""
    switch, address = triton
    switch.target, (host, port) = Sums(), address.removeprefix("triton://").split(":")
    (tmp_path / "secret").write_text(SECRET)
    connection = AccessConfig(token_file=str(tmp_path / "secret")).connect(address)
    channel = grpc.insecure_channel(f"{host}:{port}")
    metadata = (("authorization", f"Bearer {SECRET}"),)

    def model_infer(frame: bytes, **changes) -> service_pb2.ModelInferRequest:
        given = {"name": "frame", "datatype": "BYTES", "shape": [1, 1]} | changes
        asked = service_pb2.ModelInferRequest(
            model_name=REWARD, raw_input_contents=[struct.pack("<I", len(frame)) + frame]
        )
        asked.inputs.append(service_pb2.ModelInferRequest.InferInputTensor(**given))
        return asked

    @given(st.binary(max_size=200) | st.binary(max_size=60).map(lambda data: to_frame(request([1], [0, 1])) + data))
    @settings(max_examples=40, deadline=None)
    def frames(frame: bytes):
        infer = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer
        reply = from_frame(infer(model_infer(frame), timeout=5, metadata=metadata).raw_output_contents[0][4:])
        assert "rewards_BK" in reply or reply["error"].item() == "INVALID"

    frames()
    whole = model_infer(to_frame(request([1, 2], [0, 2])))
    raw = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
    for bad in (
        *(whole.SerializeToString()[:end] for end in (1, 20, 40)),
        model_infer(b"x", datatype="INT32").SerializeToString(),
        model_infer(b"x", shape=[1, 2]).SerializeToString(),
        model_infer(b"x", name="other").SerializeToString(),
    ):
        with pytest.raises(grpc.RpcError):
            raw(bad, timeout=5, metadata=metadata)
    for garbage in (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01" + bytes(200), bytes(1000)):
        with socket.create_connection((host, int(port)), timeout=5) as other:
            other.sendall(garbage)
    with pytest.raises(ServiceError, match="reward_v0") as error:
        connection.call("reward_v0", {}, 5)
    assert error.value.code is Code.INVALID
    channel.close()
    assert connection.call(REWARD, request([1, 2], [0, 2]), 5)["rewards_BK"].tolist() == [[3, 2]]


@pytest.mark.slow
def test_triton_s_probe_tells_a_dead_model_process(monkeypatch):
    """Triton itself says that it is ready; a frame of more than 64 MiB passes before."""
    server = TritonServer(Large(), (REWARD, STATUS), host="127.0.0.1", port=0)
    connection = AccessConfig().connect(f"triton://127.0.0.1:{server.port}")
    try:
        sent = np.arange(17 << 20, dtype=np.int32)
        assert np.array_equal(connection.call(REWARD, {"x": sent}, 60)["x"], sent)
        assert server.alive()
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
        assert server.alive()
        (stub, *_) = (p for p in psutil.Process().children(recursive=True) if "python_backend_stub" in p.name())
        stub.kill()
        end = time.monotonic() + 10
        while server.alive() and time.monotonic() < end:
            time.sleep(0.1)
        assert not server.alive()
        for endpoint in (REWARD, STATUS):
            with suppress(ServiceError):
                connection.call(endpoint, {"x": np.zeros(1, np.int32)}, 5)
        with pytest.raises(ServiceError) as error:  # whichever endpoint it was, its callers try again
            for endpoint in (REWARD, STATUS):
                connection.call(endpoint, {"x": np.zeros(1, np.int32)}, 5)
        assert error.value.code is Code.UNAVAILABLE
    finally:
        server.stop()


class Large:
    """Gives back what it gets."""

    def __init__(self):
        self.metrics = ServiceMetrics()

    def call(self, endpoint: str, asked: dict) -> Future:
        return resolved(asked)


@pytest.mark.slow
def test_tls_of_triton(tmp_path):
    ours, others = trustme.CA(), trustme.CA()
    for name, authority in (("ours", ours), ("others", others)):
        authority.cert_pem.write_to_path(tmp_path / name)
    tls, _ = tls_of(ours, tmp_path, "server")
    _, mine = tls_of(ours, tmp_path, "mine")
    asking = replace(tls, authority=ours.cert_pem.bytes())
    server = TritonServer(Sums(), (REWARD, STATUS), host="127.0.0.1", port=0, tls=asking)
    address, trusted = f"triton://127.0.0.1:{server.port}", {"tls_ca": str(tmp_path / "ours")}
    try:
        assert remote(address, **trusted, **mine).score([[7]]) == [7.0]
        for options in (trusted, {"tls_ca": str(tmp_path / "others"), **mine}, {}):
            with pytest.raises(ValueError, match="has not answered since"):
                remote(address, patience=Patience(start_s=0.5), **options)
    finally:
        server.stop()


@pytest.mark.slow
def test_triton_on_a_port_in_use(served):
    address = served(Sums())
    with pytest.raises(ValueError, match=f"PyTriton cannot listen on {address} .*; the port is in use"):
        TritonServer(Sums(), (STATUS,), host="127.0.0.1", port=int(address.rpartition(":")[2]))


def test_triton_is_not_started_where_its_answers_would_be_empty(monkeypatch):
    monkeypatch.setattr(np, "__version__", "2.0.2")
    with pytest.raises(ValueError, match="PyTriton sends empty answers under numpy 2.0.2; pip install 'numpy<2'"):
        TritonServer(Sums(), (STATUS,), host="127.0.0.1", port=0)


def tls_of(authority: trustme.CA, folder, name: str) -> tuple[Tls, dict]:
    """A certificate for 127.0.0.1: what a server is given, and the options of a caller that shows it."""
    certificate = authority.issue_cert("127.0.0.1")
    key, chain = certificate.private_key_pem.bytes(), b"".join(pem.bytes() for pem in certificate.cert_chain_pems)
    (folder / f"{name}.key").write_bytes(key)
    (folder / f"{name}.pem").write_bytes(chain)
    return Tls(key=key, chain=chain), {"tls_cert": str(folder / f"{name}.pem"), "tls_key": str(folder / f"{name}.key")}


def test_tls(served, tmp_path):
    ours, others = trustme.CA(), trustme.CA()
    server, shown = tls_of(ours, tmp_path, "server")
    address = served(Sums(), tls=server, token=SECRET)
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    for name, authority in (("ours", ours), ("others", others)):
        authority.cert_pem.write_to_path(tmp_path / name)
    reward = remote(address, token_file=str(secret), tls_ca=str(tmp_path / "ours"))
    assert reward.score([[7]]) == [7.0]
    with pytest.raises(ValueError, match="or certificate and key do not belong together"):
        served(Sums(), tls=replace(server, key=b"no key"))
    for options in ({"tls_ca": str(tmp_path / "others")}, {}):
        with pytest.raises(ValueError, match="has not answered since"):
            remote(address, token_file=str(secret), patience=Patience(start_s=0.5), **options)
    with pytest.raises(ValueError, match="reward.tls-cert and reward.tls-key and reward.tls-ca come together"):
        remote(address, token_file=str(secret), **shown)


def test_callers_without_a_certificate_are_refused_where_one_is_asked_for(served, tmp_path):
    ours, others = trustme.CA(), trustme.CA()
    ours.cert_pem.write_to_path(tmp_path / "ours")
    server, _ = tls_of(ours, tmp_path, "server")
    address = served(Sums(), tls=replace(server, authority=ours.cert_pem.bytes()))
    trusted = {"tls_ca": str(tmp_path / "ours")}
    _, mine = tls_of(ours, tmp_path, "mine")
    assert remote(address, **trusted, **mine).score([[7]]) == [7.0]
    _, foreign = tls_of(others, tmp_path, "foreign")
    for shown in ({}, foreign):
        with pytest.raises(ValueError, match="has not answered since"):
            remote(address, patience=Patience(start_s=0.5), **trusted, **shown)


def test_the_server_with_the_fewest_outstanding_tokens_is_asked(served):
    """Of two of the same model; one that is gone is left alone."""
    slow, quick = Sums(), Sums()
    addresses = [served(slow), served(quick)]
    reward = remote("+".join(addresses), patience=Patience(deadline_s=5.0, total_s=8.0, start_s=8.0))
    hold, called = threading.Event(), slow.call
    slow.call = lambda *asked: hold.wait(10) and called(*asked)  # works until it is let go
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(reward.score, [[1] * 6])
        time.sleep(0.2)
        assert [reward.score([[2]]) for _ in range(5)] == [[2.0]] * 5
        assert len(quick.calls) == 5
        hold.set()
        assert waiting.result(10) == [6.0]
    served.stop()  # the quick one
    assert [reward.score([[3]]) for _ in range(4)] == [[3.0]] * 4
    assert len(slow.calls) == 1 + 4


def test_a_port_in_use(served):
    address = served(Sums())
    with pytest.raises(
        ValueError, match=f"cannot listen on {address}; the port is in use, or the address is not this machine's\\."
    ):
        served(Sums(), int(address.rpartition(":")[2]))


def test_a_large_frame_goes_in_pieces_both_ways(served, monkeypatch):
    monkeypatch.setattr(grpc_transport, "CHUNK", 1000)
    service = Sums()
    connection = Connection(served(service, request_bytes=60_000, token=SECRET), token=SECRET)
    sent, received = [], grpc_transport.in_pieces
    monkeypatch.setattr(grpc_transport, "in_pieces", lambda frame: sent.append(len(frame)) or received(frame))
    monkeypatch.setitem(globals(), "LIMITS", Limits(vocabulary=100, context=6, tokens=50_000))
    sequences = [[n % 100, 7] for n in range(3000)]
    reply = connection.call(REWARD, Sequences.pack(sequences).arrays(), 30.0)
    assert reply["rewards_BK"].tolist() == [[n % 100 + 7, 2] for n in range(3000)]
    assert len(sent) == 2 and min(sent) > 20_000  # request and reply
    with pytest.raises(ServiceError, match="got a frame of more than 60000 bytes") as error:
        connection.call(REWARD, Sequences.pack(sequences * 3).arrays(), 30.0)
    assert error.value.code is Code.INVALID
    stranger = Connection(served(service, token=SECRET))
    with pytest.raises(ServiceError, match="the token is missing") as error:
        stranger.call(REWARD, Sequences.pack(sequences).arrays(), 30.0)
    assert error.value.code is Code.UNAUTHENTICATED


def test_health_is_told_to_everybody(served, monkeypatch):
    """In the encoding of grpc.health.v1: field 1, 1 for SERVING and 2 for NOT_SERVING."""
    channel = grpc.insecure_channel(served(Sums(), token=SECRET))
    check = channel.unary_unary("/grpc.health.v1.Health/Check")
    assert check(b"", timeout=5) == bytes([0x08, 1])
    for change in ({"draining": True}, {"beat_age_s": 10_000.0}):
        with monkeypatch.context() as patch:
            patch.setitem(globals(), "STATE", replace(STATE, **change))
            assert check(b"\x0a\x06reward", timeout=5) == bytes([0x08, 2])
    channel.close()


def test_statuses_come_through(served):
    connection = Connection(served(Sums()))
    assert ServiceStatus.of(connection.call(STATUS, {}, 5.0)) == STATE
    with pytest.raises(ServiceError) as error:
        connection.call("no_such_endpoint", {}, 5.0)
    assert error.value.code is Code.FAILED


def test_garbage_is_refused_and_the_server_lives_on(served):
    service = Sums()
    address = served(service)
    host, port = address.rsplit(":", 1)
    channel = grpc.insecure_channel(address)

    @given(st.binary(max_size=200) | st.binary(max_size=60).map(lambda data: to_frame(request([1], [0, 1])) + data))
    @settings(max_examples=100, deadline=None)
    def frames(frame: bytes):
        try:
            channel.unary_unary(f"/aligner/{REWARD}")(frame, timeout=5)
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert error.details().startswith("INVALID: ")

    frames()
    for path in ("/aligner/reward_v0", "/other/reward_v1"):
        with pytest.raises(grpc.RpcError) as error:
            channel.unary_unary(path)(b"", timeout=5)
        assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED
    for garbage in (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01" + bytes(200), bytes(1000)):
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(garbage)
    channel.close()
    assert remote(address).score([[1, 2]]) == [3.0]
