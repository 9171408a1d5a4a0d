"""Calls of a service that works for nothing, over both transports and over their bare clients: `bench_serving.py`.

Rows in results/serving.csv: medians of calls that take turns, one client; calls a second of 16 clients; bytes. The bare
clients send a frame that was made before and do not read the answer, so that "ours over bare" is what our own client
costs. The service is a process of its own on this machine; loopback.
bench_serving_step.py has the requests of a whole PPO step.
"""

import csv
import datetime
import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import tritonclient.grpc as triton

from aligner.serving import grpc_transport
from aligner.serving.grpc_transport import CALLER_OPTIONS, OPTIONS, PATH, Connection, to_frame
from aligner.serving.metrics import ServiceMetrics
from aligner.serving.service import (
    REWARD,
    STATUS,
    TRAIN,
    VALUES,
    Arrays,
    Sequences,
    TrainRequest,
    resolved,
)
from aligner.serving.triton_transport import TritonConnection, TritonServer

RESULTS = Path(__file__).parent / "results" / "serving.csv"
CLIENTS, SECONDS, TURNS = 16, 2.0, 9
SMALL, LARGE = 8, 3800  # sequences of 1024 tokens: a reward request, and a training of 64 MiB
ROUNDS = {SMALL: 60, LARGE: 6}


class Idle:
    """Answers with as many zeros as there are sequences."""

    endpoints, request_bytes = (REWARD, VALUES, TRAIN, STATUS), grpc_transport.MAX_BYTES

    def __init__(self):
        self.metrics = ServiceMetrics()

    def call(self, endpoint: str, request: Arrays):
        if endpoint == VALUES:
            return resolved({"values_A": np.zeros(int(request["action_mask_N"].sum()), np.float32)})
        return resolved({"rewards_BK": np.zeros((len(request["cu_seqlens"]) - 1, 1), np.float32)})


def serve(ports) -> None:
    over_grpc = grpc_transport.serve(Idle(), Idle.endpoints, host="127.0.0.1", port=0)
    over_triton = TritonServer(Idle(), Idle.endpoints, host="127.0.0.1", port=0)
    ports.send((over_grpc.port, over_triton.port))
    ports.recv()
    over_triton.stop()


def reward_request(num: int) -> Arrays:
    return Sequences.pack([[7] * 1024] * num).arrays()


def train_request(num: int) -> Arrays:
    tokens, ends = num * 1024, np.arange(num + 1, dtype=np.int32) * 1024
    return TrainRequest(
        sequences=Sequences(tokens_N=np.full(tokens, 7, np.int32), cu_seqlens=ends),
        action_mask_N=np.ones(tokens, bool),
        **{f"{name}_A": np.ones(tokens, np.float32) for name in ("old_values", "returns", "weights")},
        order_I=np.arange(num, dtype=np.int32),
        order_ends=np.array([num], np.int32),
        run_id="run",
        weights_version=0,
    ).arrays()


class Bare:
    """The transports' own clients."""

    def __init__(self, over_grpc: str, over_triton: str):
        channel = grpc.insecure_channel(over_grpc, [*OPTIONS, *CALLER_OPTIONS])
        self.methods = {name: channel.unary_unary(f"/{PATH}/{name}") for name in (REWARD, TRAIN)}
        self.client = triton.InferenceServerClient(over_triton)

    def grpc(self, endpoint: str, frame: bytes) -> None:
        self.methods[endpoint](frame, timeout=60)

    def triton(self, endpoint: str, frame: bytes) -> None:
        given = triton.InferInput("frame", [1, 1], "BYTES")
        given.set_data_from_numpy(np.array([[frame]], dtype=object))
        self.client.infer(endpoint, [given], client_timeout=60)


def seconds(action) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def calls_a_second(action) -> float:
    """Of CLIENTS threads of this process."""
    end, lock, counts = time.perf_counter() + SECONDS, threading.Lock(), []

    def client() -> None:
        num = 0
        while time.perf_counter() < end:
            action()
            num += 1
        with lock:
            counts.append(num)

    with ThreadPoolExecutor(CLIENTS) as pool:
        for future in [pool.submit(client) for _ in range(CLIENTS)]:
            future.result()
    return sum(counts) / SECONDS


def bytes_of(num: int = 1024, longest: int = 1024) -> tuple[int, int]:
    """Of a request for values and its answer: ours, and padded to one length in int64 with float32 answers."""
    lengths = np.random.default_rng(0).integers(longest // 8, longest + 1, num)
    tokens, answers = int(lengths.sum()), int((lengths // 2).sum())
    sequences = {"tokens_N": np.zeros(tokens, np.int32), "cu_seqlens": np.zeros(num + 1, np.int32)}
    request = sequences | {"action_mask_N": np.zeros(tokens, bool), "weights_version": np.array(0)}
    ours = len(to_frame(request)) + len(to_frame({"values_A": np.zeros(answers, np.float32)}))
    return ours, num * longest * (8 + 4) + num * 8


@contextmanager
def served() -> Iterator[tuple[str, str]]:
    """Addresses over gRPC and over Triton."""
    near, far = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(far,))
    server.start()
    yield tuple(f"127.0.0.1:{port}" for port in near.recv())
    near.send(None)
    server.join()


def record(rows: list[tuple[str, str, str, float]]) -> None:
    load = os.getloadavg()[0]
    with RESULTS.open("a", newline="") as file:
        writer = csv.writer(file)
        if file.tell() == 0:
            writer.writerow(["date", "what", "side", "unit", "value", "cores", "load"])
        for row in rows:
            print(f"{row[0]}: {row[1]}: {row[3]:.3f} {row[2]}")
            writer.writerow([datetime.date.today(), *row[:3], f"{row[3]:.4g}", os.cpu_count(), f"{load:.1f}"])


def main() -> None:
    with served() as addresses:
        rows = measure(*addresses)
    packed, padded = bytes_of()
    what = "bytes for values of 1024 sequences of 128 to 1024 tokens"
    record([*rows, (what, "packed over padded int64", "ratio", packed / padded)])


def measure(over_grpc: str, over_triton: str) -> list[tuple[str, str, str, float]]:
    """Ours and the bare clients."""
    ours, bare = (Connection(over_grpc), TritonConnection(over_triton)), Bare(over_grpc, over_triton)
    rows = []
    for endpoint, num, request in ((REWARD, SMALL, reward_request(SMALL)), (TRAIN, LARGE, train_request(LARGE))):
        frame = to_frame(request)
        actions = {
            "grpc, bare": lambda e=endpoint, f=frame: bare.grpc(e, f),
            "grpc, ours": lambda e=endpoint, r=request: ours[0].call(e, r, 60),
            "pytriton, bare": lambda e=endpoint, f=frame: bare.triton(e, f),
            "pytriton, ours": lambda e=endpoint, r=request: ours[1].call(e, r, 60),
        }
        times = {name: [] for name in actions}
        for round in range(ROUNDS[num] + 1):
            for name, action in actions.items():
                taken = seconds(action)
                if round:
                    times[name].append(taken)
        what = f"{endpoint}, {num} x 1024 tokens, {len(frame) / 2**20:.2f} MiB"
        for name, taken in times.items():
            rows.append((what, name, "ms, median", 1e3 * statistics.median(taken)))
        for transport in ("grpc", "pytriton"):
            ratio = statistics.median(times[f"{transport}, ours"]) / statistics.median(times[f"{transport}, bare"])
            rows.append((what, f"{transport}, ours over bare", "ratio", ratio))
        if num == SMALL:
            speeds = {name: [] for name in actions}
            for _ in range(TURNS):
                for name, action in actions.items():
                    speeds[name].append(calls_a_second(action))
            for name, speed in speeds.items():
                rows.append(
                    (what, f"{name}, {CLIENTS} clients", f"calls/s, median of {TURNS}", statistics.median(speed))
                )
            for transport in ("grpc", "pytriton"):
                ratio = statistics.median(speeds[f"{transport}, ours"]) / statistics.median(
                    speeds[f"{transport}, bare"]
                )
                rows.append((what, f"{transport}, ours over bare, {CLIENTS} clients", "ratio", ratio))
    return rows


if __name__ == "__main__":
    main()
