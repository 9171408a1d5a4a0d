"""Three processes in a loop of all_reduce: whatever ends one of them, the others name it and stop."""

import itertools
import multiprocessing
import os
import signal
import socket
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from aligner.run.watch import Watch

SILENCE = 2.0


def rank_main(rank: int, port: int, case: str, folder: Path) -> None:
    for number, stream in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{rank}.{stream}", os.O_CREAT | os.O_WRONLY), number)
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, 3, rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=3, timeout=timedelta(minutes=30))
    with Watch(store, rank, 3, interval=0.1, silence=SILENCE):
        for step in itertools.count() if case == "forever" else range(20):
            dist.all_reduce(torch.ones(1))
            if step == 10:
                (folder / f"{rank}.ready").touch()
                if case == f"raise on {rank}":
                    raise ValueError("the reward is a banana\nsecond line")
                if case == "busy" and rank == 1:  # for longer than the silence, and the others wait in all_reduce
                    end = time.monotonic() + 1.5 * SILENCE
                    while time.monotonic() < end:
                        torch.randn(500, 500) @ torch.randn(500, 500)
        if case == "late" and rank == 2:  # the others are at the end of the block
            time.sleep(1.5 * SILENCE)
    print("end", flush=True)


def start(case: str, folder: Path) -> list[multiprocessing.Process]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    ranks = [context.Process(target=rank_main, args=(r, port, case, folder)) for r in range(3)]
    for process in ranks:
        process.start()
    while not all((folder / f"{r}.ready").exists() for r in range(3)):
        assert all(p.is_alive() for p in ranks) or "raise" in case
        if not any(p.is_alive() for p in ranks):
            break
        time.sleep(0.02)
    return ranks


def finish(process: multiprocessing.Process) -> int:
    process.join(60)
    assert process.exitcode is not None, "still running"
    return process.exitcode


def alarms(folder: Path, rank: int) -> list[str]:
    return [line for line in (folder / f"{rank}.err").read_text().splitlines() if line.startswith("error: rank")]


@pytest.mark.parametrize(
    ("victim", "sign"),
    [(2, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGSTOP), (0, signal.SIGSTOP)],
)
@pytest.mark.slow
def test_the_others_name_a_rank_that_died_or_hangs(tmp_path, victim: int, sign: signal.Signals):
    ranks = start("forever", tmp_path)
    os.kill(ranks[victim].pid, sign)
    try:
        statuses = {r: finish(p) for r, p in enumerate(ranks) if r != victim}
    finally:
        ranks[victim].kill()
    lost = " or its torchrun stopped: the key-value store that it keeps does not answer"
    reason = lost if victim == 0 else f" stopped: no sign of life for {SILENCE:g} s"
    for rank, status in statuses.items():
        assert status == 1
        (line,) = alarms(tmp_path, rank)
        assert line.startswith(f"error: rank {victim} of 3 (host ") and f"pid {ranks[victim].pid}){reason}" in line
        assert line.endswith("; this rank stops too, the last checkpoint is untouched; start again with --resume")
        assert "Traceback" not in (tmp_path / f"{rank}.err").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_the_others_tell_what_a_rank_raised(tmp_path, victim: int):
    ranks = start(f"raise on {victim}", tmp_path)
    for rank, process in enumerate(ranks):
        assert finish(process) == 1
        if rank == victim:
            assert "ValueError: the reward is a banana" in (tmp_path / f"{rank}.err").read_text()
            assert not alarms(tmp_path, rank)
        else:
            (line,) = alarms(tmp_path, rank)
            assert f"pid {ranks[victim].pid}) stopped: ValueError: the reward is a banana; this rank" in line


@pytest.mark.slow
@pytest.mark.parametrize("case", ["busy", "late"])
def test_no_alarm_without_a_reason(tmp_path, case: str):
    for rank, process in enumerate(start(case, tmp_path)):
        assert (finish(process), alarms(tmp_path, rank)) == (0, [])
        assert (tmp_path / f"{rank}.out").read_text() == "end\n"


def test_a_world_of_one_has_no_thread():
    before = threading.active_count()
    with Watch(None, 0, 1):
        assert threading.active_count() == before
