"""A rank that dies is noticed: the others say which one and why, and stop, even in the middle of a collective."""

import os
import socket
import sys
import threading
import time
from typing import NoReturn

import torch.distributed as dist


class Watch:
    """While open, every rank shows the next one in a ring that it lives; when one does not, or raises, all stop.

    A rank that learns of it writes one line to stderr and leaves its process with status 1, whatever its main thread
    does. The end of the block waits until every rank has come to it.

    store: a TCPStore that all ranks share. Its server is a thread of rank 0 or of torchrun.
    rank, world: of this process, and their number; a world of one is not watched.
    interval: seconds between two signs of life.
    silence: seconds without one after which a rank counts as dead, so also a stopped one. Only time in which this
        process runs counts: a machine that sleeps raises no alarm.
    """

    def __init__(self, store: dist.Store, rank: int, world: int, *, interval: float = 5.0, silence: float = 20.0):
        self.rank, self.world, self.interval, self.silence = rank, world, interval, silence
        self._name = f"rank {rank} of {world} (host {socket.gethostname()}, pid {os.getpid()})"
        self._ticks = 0
        self._leaving, self._over = threading.Event(), threading.Event()
        if world > 1:
            self._store = dist.PrefixStore("watch", store.clone())  # no wait of the main thread blocks this connection

    def __enter__(self) -> "Watch":
        if self.world > 1:
            self._store.set(f"name/{self.rank}", self._name)
            self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, _kind, error: BaseException | None, _trace) -> None:
        if self.world == 1:
            return
        if error is None or (isinstance(error, SystemExit) and not error.code):
            self._leaving.set()
            self._thread.join()
            self._over.set()
            return
        if _lost_connection(error):  # of a rank that died, most likely: leave it to the thread to find out which
            self._thread.join(2 * self.silence + 2 * self.interval)
        self._over.set()
        try:
            line = (str(error).splitlines() or [""])[0]
            self._store.compare_set("stopped", "", f"{self._name} stopped: {type(error).__name__}: {line}")
            self._wait_for_the_others()
        except RuntimeError:
            return  # no store, no news; what this rank raised goes on from here

    def _watch(self) -> None:
        """Body of the thread."""
        first = f"rank 0 of {self.world}"
        try:
            first, following = (self._store.get(f"name/{r}").decode() for r in (0, (self.rank + 1) % self.world))
            threading.Thread(target=self._watch_the_store, args=(first,), name="watch-store", daemon=True).start()
            self._until_all_are_done(following)
        except RuntimeError:
            if not (self._leaving.is_set() or self._over.is_set()):
                self._stop(_no_store(first), ask_store=False)
            # Otherwise rank 0 has seen that all are done, and took the store with it.

    def _until_all_are_done(self, following: str) -> None:
        store, seen, silent, counted = self._store, None, 0.0, False
        while True:
            self._ticks += 1
            store.set(f"beat/{self.rank}", str(self._ticks))
            stopped = store.check(["stopped"])
            if self._over.is_set():  # it was this rank, which goes on with what it raised
                return
            if stopped:
                self._stop(store.get("stopped").decode())
            key = f"beat/{(self.rank + 1) % self.world}"
            beat = store.get(key) if store.check([key]) else None
            if self._leaving.is_set():
                if store.add("done", 0 if counted else 1) == self.world:
                    return
                counted = True
            pause = min(0.1, self.interval) if counted else self.interval
            silent = silent + pause if beat == seen else 0.0
            seen = beat
            if silent > self.silence:
                reason = f"no sign of life for {self.silence:g} s"
                store.compare_set("stopped", "", f"{following} stopped: {reason}")
            elif counted:
                time.sleep(pause)
            else:
                self._leaving.wait(pause)

    def _watch_the_store(self, first: str) -> None:
        """The other thread's calls never come back when the machine of the store's server is gone."""
        seen, silent = 0, 0.0
        while self._thread.is_alive():
            silent = silent + self.interval if self._ticks == seen else 0.0
            seen = self._ticks
            if silent > self.silence:
                self._stop(_no_store(first), ask_store=False)
            self._over.wait(self.interval)
            if self._over.is_set():
                return

    def _stop(self, what: str, ask_store: bool = True) -> NoReturn:
        line = f"error: {what}; this rank stops too, the last checkpoint is untouched; start again with --resume\n"
        os.write(2, line.encode())  # print() could wait for a lock that the main thread holds
        try:
            if ask_store:
                self._wait_for_the_others()
            sys.stdout.flush()
        finally:
            os._exit(1)

    def _wait_for_the_others(self) -> None:
        """Count this rank as informed; rank 0, which may be the store's server, stays until the others are, too."""
        informed, end = self._store.add("informed", 1), time.monotonic() + 1.5 * self.interval
        while self.rank == 0 and informed < self.world and time.monotonic() < end:
            time.sleep(0.05)
            informed = self._store.add("informed", 0)


def _no_store(first: str) -> str:
    return f"{first} or its torchrun stopped: the key-value store that it keeps does not answer"


def _lost_connection(error: BaseException) -> bool:
    """Whether a collective failed, as it does at once on all ranks when one dies."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
