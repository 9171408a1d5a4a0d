"""Calls in threads that no process waits for."""

import subprocess
import sys
import threading
import time

import pytest

from aligner.run.background import Background


def test_calls_are_made_in_order_by_that_many_threads():
    gate, seen = threading.Event(), []

    def call(i: int) -> int:
        gate.wait(10)
        seen.append((i, threading.get_ident()))
        return 2 * i

    one = Background("one")
    futures = [one.submit(call, i) for i in range(5)]
    gate.set()
    assert [future.result(10) for future in futures] == [0, 2, 4, 6, 8]
    assert [i for i, _ in seen] == [0, 1, 2, 3, 4] and len({thread for _, thread in seen}) == 1
    both, barrier = Background("two", 2), threading.Barrier(2, timeout=10)
    assert {both.submit(barrier.wait), both.submit(barrier.wait)} and both.submit(int).result(10) == 0


def test_what_a_call_raises_is_raised_and_the_next_one_is_made():
    background = Background("x")
    failed, cancelled = background.submit(int, "x"), background.submit(time.sleep, 0)
    cancelled.cancel()
    with pytest.raises(ValueError, match="invalid literal"):
        failed.result(10)
    assert background.submit(int, "7").result(10) == 7


def test_a_process_that_ends_waits_for_nobody():
    program = "import time\nfrom aligner.run.background import Background\nBackground('x').submit(time.sleep, 60)"
    began = time.monotonic()
    assert subprocess.run([sys.executable, "-c", program], timeout=50).returncode == 0
    assert time.monotonic() - began < 40
