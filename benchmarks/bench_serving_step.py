"""What the requests of a PPO step of 1024 responses of 1024 tokens cost, over both transports and links of many speeds.

Rewards and values, eight requests of each at a time, then a training. Rows in results/serving_step.csv:

* against a service that works for nothing, in a network namespace whose loopback carries so much and no more (tc's
  token bucket, which both directions share), as root: seconds of all requests, of which frames are made and read in
  "serialise" and the rest is "wire". The kernel here has no netem, so a delay is that of a relay between the two, which
  holds every byte back for as long, both ways.
* "at work": `aligner.serve both` with models of one layer on one core, unshaped: seconds of all requests, of which the
  service says how many it computed, and how long a request waited for that.

Draws docs/images/serving.png; needs matplotlib.
"""

import asyncio
import csv
import datetime
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from bench_serving import Idle, reward_request, seconds, served, train_request
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from aligner.checkpoint.model_folder import model_folder
from aligner.data.tokenizer import load_tokenizer
from aligner.serving.access import AccessConfig
from aligner.serving.grpc_transport import from_frame, to_frame
from aligner.serving.service import REWARD, TRAIN, VALUES, Arrays, Sequences, ValuesRequest

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "serving_step.csv"
# Links: what tc is told, and milliseconds of delay each way.
LINKS = {
    "no shaping": ("", 0),
    "400 Gbit/s": ("400gbit burst 64mb", 0),
    "100 Gbit/s": ("100gbit burst 64mb", 0),
    "10 Gbit/s": ("10gbit burst 16mb", 0),
    "1 Gbit/s": ("1gbit burst 2mb", 0),
    "1 Gbit/s + 1 ms": ("1gbit burst 2mb", 1),
}
AT_ONCE = 8  # requests of a kind, as aligner.serving.rewards and remote_critic send them
SEQUENCES = 8  # of a request
ROUNDS = 5
STEPS_S = (56.9, 366.7)  # of published PPO steps, arXiv:2405.01481
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}


def step_requests() -> list[list[tuple[str, Arrays]]]:
    """Rewards, values and the training of 1024 responses of 512 tokens to prompts of 512."""
    mask_N = np.tile(np.arange(1024) >= 512, SEQUENCES)
    sequences = Sequences.pack([[7] * 1024] * SEQUENCES)
    values = ValuesRequest(sequences=sequences, action_mask_N=mask_N, weights_version=0).arrays()
    mask_N = np.tile(mask_N, 1024 // SEQUENCES)
    numbers = {f"{name}_A": np.ones(int(mask_N.sum()), np.float32) for name in ("old_values", "returns", "weights")}
    trained = train_request(1024) | {"action_mask_N": mask_N} | numbers
    num = 1024 // SEQUENCES
    return [[(REWARD, reward_request(SEQUENCES))] * num, [(VALUES, values)] * num, [(TRAIN, trained)]]


def ask_all(requests: list[list[tuple[str, Arrays]]], reward, critic) -> None:
    """As a run does: rewards and values side by side, then the training."""
    rewards, values, (training,) = requests
    with ThreadPoolExecutor(AT_ONCE) as ours, ThreadPoolExecutor(AT_ONCE) as others:
        waiting = [ours.submit(reward.call, *asked, 600) for asked in rewards]
        waiting += [others.submit(critic.call, *asked, 600) for asked in values]
        for future in waiting:
            future.result()
    critic.call(*training, 600)


def relay(ports, to: list[int], delay_s: float) -> None:
    """Passes bytes on to each port after a while."""

    async def passes(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        held: asyncio.Queue = asyncio.Queue()

        async def takes() -> None:
            while data := await reader.read(1 << 18):
                held.put_nowait((time.monotonic() + delay_s, data))
            held.put_nowait((time.monotonic() + delay_s, b""))

        taking = asyncio.create_task(takes())
        data = b"begin"
        while data:
            due, data = await held.get()
            await asyncio.sleep(max(due - time.monotonic(), 0))
            writer.write(data)
            await writer.drain()
        writer.close()
        await taking

    async def run() -> None:
        servers = []
        for port in to:

            async def connected(reader, writer, port=port):
                far = await asyncio.open_connection("127.0.0.1", port)
                await asyncio.gather(passes(reader, far[1]), passes(far[0], writer))

            servers.append(await asyncio.start_server(connected, "127.0.0.1", 0))
        ports.send([server.sockets[0].getsockname()[1] for server in servers])
        await asyncio.Event().wait()

    asyncio.run(run())


@contextmanager
def delayed(addresses: list[str], delay_ms: float) -> Iterator[list[str]]:
    """The same addresses behind a relay."""
    if not delay_ms:
        yield addresses
        return
    near, far = multiprocessing.Pipe()
    to = [int(address.rpartition(":")[2]) for address in addresses]
    process = multiprocessing.get_context("spawn").Process(target=relay, args=(far, to, delay_ms / 1e3))
    process.start()
    yield [f"127.0.0.1:{port}" for port in near.recv()]
    process.kill()
    process.join()


def measure_link(link: str) -> None:
    """In the namespace: rows of one link."""
    requests, what = step_requests(), f"1024 x 1024 tokens, {link}"
    flat = [asked for kind in requests for asked in kind]
    frames = [to_frame(request) for _, request in flat]
    replies = [to_frame(Idle().call(*asked).result()) for asked in flat]

    def serialise() -> None:  # on both sides
        for (_, request), frame, reply in zip(flat, frames, replies, strict=True):
            to_frame(request), from_frame(frame), to_frame(from_frame(reply)), from_frame(reply)

    making = statistics.median(seconds(serialise) for _ in range(ROUNDS))
    rows = [(what, "both", "sent and received", "MB", sum(map(len, frames + replies)) / 1e6)]
    with served() as addresses, delayed(list(addresses), LINKS[link][1]) as (over_grpc, over_triton):
        connect = AccessConfig().connect
        sides = {"grpc": connect(over_grpc), "pytriton": connect(f"triton://{over_triton}")}
        times = {name: [] for name in sides}
        for round in range(ROUNDS + 1):
            for name, side in sides.items():
                taken = seconds(lambda side=side: ask_all(requests, side, side))
                if round:
                    times[name].append(taken)
    for name, taken in times.items():
        whole = statistics.median(taken)
        rows += [(what, name, "all", "s", whole), (what, name, "serialise", "s", making)]
        rows += [(what, name, "wire", "s", whole - making)]
        rows += [(what, name, f"of a step of {s} s", "%", 100 * whole / s) for s in STEPS_S]
    record(rows)


def measure_links() -> None:
    for link, (words, _) in LINKS.items():
        shape = f"tc qdisc add dev lo root tbf rate {words} latency 50ms && " if words else ""
        again = f"ip link set lo up && {shape}exec {sys.executable} {__file__} '{link}'"
        if subprocess.run(["unshare", "--net", "bash", "-c", again], check=False).returncode:
            print(f"{link}: left out; it needs root, unshare, ip, and tc with tbf in the kernel")


def save_models(folder: Path) -> None:
    """A language model and a reward model of one layer, with SmolLM2's tokenizer."""
    tokenizer = load_tokenizer(model_folder("SmolLM2-135M-Instruct"))
    config = LlamaConfig(**SIZES, vocab_size=len(tokenizer), max_position_embeddings=1024, pad_token_id=0, num_labels=1)
    torch.manual_seed(0)
    for name, model in (("model", LlamaForCausalLM(config)), ("reward", LlamaForSequenceClassification(config))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def counted(metrics: str) -> dict[str, float]:
    with urllib.request.urlopen(metrics, timeout=60) as answer:
        lines = [line.split() for line in answer.read().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


def measure_at_work(transport: str) -> None:
    """One step: the critic trains."""
    with tempfile.TemporaryDirectory() as folder:
        save_models(Path(folder))
        options = {"model": f"{folder}/model", "reward-model": f"{folder}/reward", "output": f"{folder}/critic"}
        options |= {"threads": 1, "critic.layers": 0, "batch.tokens-per-micro-batch": 8192}
        options |= {"serve.transport": transport, "serve.port": 8600, "serve.metrics-port": 9400}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        command = [sys.executable, "-m", "aligner.serve", "both", *words]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        addresses = []
        while len(addresses) < 2:
            line = process.stdout.readline()
            addresses += [line.split()[1]] if line.startswith("ready: ") else []
        critic, reward = (AccessConfig().connect(address) for address in addresses)
        requests = step_requests()
        for kind, side in ((0, reward), (1, critic)):
            side.call(*requests[kind][0], 600)  # the first takes longer
        before = counted("http://127.0.0.1:9400/metrics")
        whole = seconds(lambda: ask_all(requests, reward, critic))
        after = counted("http://127.0.0.1:9400/metrics")
        process.terminate()
        process.wait()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    compute = grown["aligner_compute_seconds_sum"]
    mean = grown["aligner_queue_seconds_sum"] / grown["aligner_queue_seconds_count"]
    batches = grown["aligner_compute_seconds_count"]
    what = "1024 x 1024 tokens, at work"
    rows = [(what, transport, "all", "s", whole), (what, transport, "compute", "s", compute)]
    rows += [(what, transport, "all but compute", "s", whole - compute), (what, transport, "batches", "", batches)]
    record([*rows, (what, transport, "queue, mean of a request", "s", mean)])


def record(rows: list[tuple[str, str, str, str, float]]) -> None:
    load = os.getloadavg()[0]
    with RESULTS.open("a", newline="") as file:
        writer = csv.writer(file)
        if file.tell() == 0:
            writer.writerow(["date", "what", "transport", "part", "unit", "value", "cores", "load"])
        for row in rows:
            print(f"{row[0]}: {row[1]}: {row[2]}: {row[4]:.3f} {row[3]}")
            writer.writerow([datetime.date.today(), *row[:4], f"{row[4]:.4g}", os.cpu_count(), f"{load:.1f}"])


def draw() -> None:
    """Bars of the newest rows: what a step's requests take over each link."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    newest = {}
    with RESULTS.open() as file:
        for row in csv.DictReader(file):
            newest[row["what"].removeprefix("1024 x 1024 tokens, "), row["transport"], row["part"]] = float(
                row["value"]
            )
    figure, axes = plt.subplots(figsize=(7.5, 3.6))
    for i, (transport, colors) in enumerate(
        {"grpc": ("#0b5394", "#6fa8dc"), "pytriton": ("#38761d", "#93c47d")}.items()
    ):
        places = [x + 0.38 * (i - 0.5) for x in range(len(LINKS))]
        making = [newest[link, transport, "serialise"] for link in LINKS]
        wire = [newest[link, transport, "wire"] for link in LINKS]
        axes.bar(places, making, 0.36, color=colors[0], label=f"{transport}, serialise")
        axes.bar(places, wire, 0.36, bottom=making, color=colors[1], label=f"{transport}, wire")
    axes.set_xticks(range(len(LINKS)), LINKS, fontsize=8)
    axes.set_ylabel("seconds")
    top = axes.get_ylim()[1]
    share = axes.twinx()
    share.set_ylim(0, 100 * top / STEPS_S[0])
    share.set_ylabel(f"% of a step of {STEPS_S[0]} s")
    axes.set_title("Requests of one PPO step, 1024 responses of 1024 tokens", fontsize=10)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(ROOT / "docs/images/serving.png", dpi=110)


def main() -> None:
    if sys.argv[1:]:
        return measure_link(sys.argv[1])
    measure_links()
    for transport in ("grpc", "pytriton"):
        measure_at_work(transport)
    draw()


if __name__ == "__main__":
    main()
