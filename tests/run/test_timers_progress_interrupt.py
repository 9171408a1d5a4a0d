"""Timers add up and reset; progress prints what it was given; the first Ctrl-C waits and the second does not."""

import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

from aligner.run import progress as progress_module
from aligner.run.interrupt import Interrupt
from aligner.run.progress import Progress
from aligner.run.timers import Timers


def test_timers_add_up_and_reset(monkeypatch):
    clock = iter([0.0, 1.5, 10.0, 10.25, 20.0, 23.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    timers = Timers()
    for phase in ("sample", "update", "sample"):
        with timers(phase):
            pass
    assert timers.take() == {"time/sample": 4.5, "time/update": 0.25}
    assert timers.take() == {}


def test_timers_count_a_phase_that_raises():
    timers = Timers()
    with pytest.raises(RuntimeError), timers("sample"):
        raise RuntimeError
    assert list(timers.take()) == ["time/sample"]


def test_peak_memory_follows_an_allocation_and_outlives_it():
    code = (
        "from aligner.run.timers import peak_memory_bytes\n"
        "before = peak_memory_bytes()\n"
        "block = b'x' * 300_000_000\n"
        "del block\n"
        "print(before, peak_memory_bytes())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert 5e6 < before < 2e8
    assert 290e6 < after - before < 310e6


def test_progress_prints_one_plain_line_a_step_without_a_terminal(capsys, monkeypatch):
    clock = iter([100.0, 110.0, 120.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with Progress(375, 3) as progress:
        progress.step(4, {"reward/mean": 0.5, "kl/mean": 0.25, "tokens_per_second": 1234.4, "other": 1.0})
        progress.step(5, {"loss": 2.0})
        progress.message("[saved]")
    assert capsys.readouterr().out.splitlines() == [
        "step 4/375  reward +0.500  kl 0.250  tokens/s 1,234  ETA 1:01:50",
        "step 5/375  loss 2.0000  ETA 1:01:40",
        "[saved]",
    ]


def test_progress_draws_a_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(progress_module, "Console", lambda file: Console(file=file, force_terminal=True, width=110))
    with Progress(4) as progress:
        progress.step(1, {"reward/mean": 0.5})
        progress.message("[saved]")
    text = capsys.readouterr().out
    assert "1/4" in text and "reward +0.500" in text and "[saved]" in text


def test_the_first_interrupt_waits_and_the_second_stops(capfd):
    old = signal.getsignal(signal.SIGINT)
    with Interrupt() as interrupt:
        assert not interrupt.requested
        signal.raise_signal(signal.SIGINT)
        assert interrupt.requested
        assert "press Ctrl-C again to stop now" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is old


def test_a_repeated_sigterm_only_asks(capfd):
    old = signal.getsignal(signal.SIGTERM)
    with Interrupt() as interrupt:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert interrupt.requested
    assert capfd.readouterr().err.count("press Ctrl-C again") == 1
    assert signal.getsignal(signal.SIGTERM) is old


def test_handlers_are_restored_after_an_error():
    old = signal.getsignal(signal.SIGINT)
    with pytest.raises(RuntimeError), Interrupt():
        raise RuntimeError
    assert signal.getsignal(signal.SIGINT) is old
