"""Requests of many callers, worked on by a group of ranks: one thread of each runs all collectives."""

import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from aligner.models.network import Network
from aligner.run.distributed import gather, is_main
from aligner.serving.metrics import ServiceMetrics
from aligner.serving.service import Arrays, Code, ServiceError

BEAT_S = 1.0  # an idle group meets that often: no process group times out, and a wish to stop reaches all ranks
TURN_S = 30.0  # a network that takes turns with others goes on for so long while others wait
Answer = Callable[[list], list[Arrays | ServiceError]]  # a reply or an error for each request


@dataclass(frozen=True, kw_only=True)
class Work:
    """A request that waits. came: when, by the monotonic clock. changes: it changes weights, and is worked on alone."""

    endpoint: str
    request: Any
    tokens: int
    changes: bool
    future: Future
    came: float


class Group:
    """All ranks make it, say what works() on what, and run() it; the first one submits requests, from any thread.

    tokens: about as many are answered at once. queue_size: requests that may wait.
    """

    def __init__(self, tokens: int, queue_size: int):
        self.metrics = ServiceMetrics()
        self._tokens, self._most = tokens, queue_size
        self._waiting: dict[Network | None, deque[Work]] = {None: deque()}  # by who takes turns; the others by None
        self._changed = threading.Condition()
        self._beat = time.monotonic()
        self._draining = threading.Event()
        self._answers: dict[str, Answer] = {}
        self._networks: dict[str, Network] = {}  # that take turns, by endpoint
        self._present: Network | None = None  # the one whose turn it is

    def works(self, endpoint: str, answer: Answer) -> None:
        """Requests of an endpoint go to `answer`, which all ranks call together."""
        self._answers[endpoint] = answer

    def take_turns(self, networks: dict[str, Network]) -> None:
        """Let the weights of all networks but one wait in host memory: that of the endpoint which is worked on."""
        self._networks = networks
        for network in set(networks.values()):
            self._waiting[network] = deque()
            network.offload.leave(weights=True)

    def make_room(self, endpoint: str) -> None:
        """For the endpoint's network; all ranks call it."""
        mine = self._networks.get(endpoint)
        if mine is None or mine is self._present:
            return
        began = time.monotonic()
        if self._present:
            self._present.offload.leave(weights=True)
        self._present = mine
        mine.offload.weights_come_back()
        self.metrics.swap_seconds.observe(time.monotonic() - began)

    def submit(self, endpoint: str, request, tokens: int, *, changes: bool = False) -> Future:
        """The future reply. Raises ServiceError when nothing more is taken."""
        work = Work(
            endpoint=endpoint,
            request=request,
            tokens=tokens,
            changes=changes,
            future=Future(),
            came=time.monotonic(),
        )
        with self._changed:
            if self._draining.is_set():
                raise ServiceError(Code.UNAVAILABLE, "the service is about to stop.")
            if self._num_waiting() >= self._most:
                raise ServiceError(Code.BUSY, f"{self._most} requests wait already.")
            self._waiting[self._networks.get(endpoint)].append(work)
            self._changed.notify()
        return work.future

    def state(self) -> dict:
        """What ServiceStatus says of it."""
        beat_age_s = time.monotonic() - self._beat
        return {"queue": self._num_waiting(), "beat_age_s": beat_age_s, "draining": self._draining.is_set()}

    def _num_waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    def run(self, stop: threading.Event) -> None:
        """Works until `stop` is set on any rank and nothing waits; the only code that runs collectives."""
        while True:
            work = self._take() if is_main() else []
            batch = (work[0].endpoint, [w.request for w in work], work[0].changes) if work else None
            batch, leave = _from_first_rank((batch, self._draining.is_set() and not work))
            if leave:
                return
            if batch is not None:
                self._answer(work, *batch)
            if any(gather(stop.is_set)):
                with self._changed:  # whoever was taken before is answered
                    self._draining.set()
            self._beat = time.monotonic()

    def _answer(self, work: list[Work], endpoint: str, requests: list, changes: bool) -> None:
        """All ranks call it; the first one has the callers of the batch."""
        began = time.monotonic()
        for w in work:
            self.metrics.queue_seconds.observe(began - w.came)
        try:
            self.make_room(endpoint)
            replies = self._answers[endpoint](requests)
        except Exception as error:
            if work:
                print(f"error: {len(work)} {endpoint} failed: {error}", file=sys.stderr, flush=True)
            for w in work:
                w.future.set_exception(ServiceError(Code.FAILED, "the model failed; the log of the service says why."))
            if changes or not _harmless(error):
                raise
            return
        self.metrics.compute_seconds.observe(time.monotonic() - began)
        self.metrics.batch_tokens.observe(sum(w.tokens for w in work))
        self.metrics.tokens.inc(sum(w.tokens for w in work))
        for w, reply in zip(work, replies, strict=False):  # only the first rank has callers
            if isinstance(reply, ServiceError):
                w.future.set_exception(reply)
            else:
                w.future.set_result(reply)

    def _take(self) -> list[Work]:
        """Waiting requests of one endpoint, about as many tokens; the first that comes within a beat, else none."""
        taken, tokens = [], 0
        with self._changed:
            if not self._num_waiting() and not self._draining.is_set():
                self._changed.wait(BEAT_S)
            waiting = self._whose_turn()
            while waiting:
                work = waiting[0]
                full = taken and (
                    tokens + work.tokens > self._tokens
                    or work.endpoint != taken[0].endpoint
                    or work.changes
                    or taken[0].changes
                )
                if full:
                    break
                waiting.popleft()
                if work.future.set_running_or_notify_cancel():  # else its caller has gone
                    taken.append(work)
                    tokens += work.tokens
        return taken

    def _whose_turn(self) -> deque[Work]:
        """Of the network that is present as long as it has requests, since changing takes long, and nobody waits too
        long for it; else of whoever has waited longest."""
        held = [waiting for waiting in self._waiting.values() if waiting]
        mine = self._waiting.get(self._present, deque())
        longest = min(held, key=lambda waiting: waiting[0].came, default=mine)
        patient = not longest or time.monotonic() - longest[0].came < TURN_S
        return mine if mine and patient else longest


def _harmless(error: Exception) -> bool:
    """Whether the next batch may succeed: no rank waits in a collective that this one left, and the device lives."""
    return not _many() and not isinstance(error, torch.AcceleratorError)


def _many() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def _from_first_rank(value):
    """What rank 0 gives, on all ranks."""
    if not _many():
        return value
    box = [value]
    dist.broadcast_object_list(box, 0)
    return box[0]
