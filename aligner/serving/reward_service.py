"""A reward model as a service: requests of many callers, answered in batches by a group of ranks."""

import queue
import sys
import threading
import time
from concurrent.futures import Future

import numpy as np
import torch
import torch.distributed as dist

from aligner.models.reward_model import RewardModel
from aligner.run.distributed import gather, is_main
from aligner.serving.metrics import ServiceMetrics
from aligner.serving.rewards import last_tokens
from aligner.serving.service import REWARD, STATUS, Arrays, Code, Limits, Sequences, ServiceError, ServiceStatus, expect

Work = tuple[Sequences, Future, float]  # a request, its answer, when it came by the monotonic clock
BEAT_S = 1.0  # an idle group meets that often: no process group times out, and a wish to stop reaches all ranks


class RewardService:
    """All ranks make it and call run(); the first one takes requests meanwhile, from any thread.

    digests: of the "model" and of its "tokenizer". limits: of a request; about as many tokens are answered at once.
    queue_size: requests that may wait.
    """

    def __init__(self, model: RewardModel, digests: dict[str, str], limits: Limits, queue_size: int):
        self.model, self._digests, self._limits = model, digests, limits
        self._identity = {name: np.array(digest) for name, digest in digests.items()}
        self.metrics = ServiceMetrics()
        self._waiting: queue.Queue[Work] = queue.Queue(queue_size)
        self._next: Work | None = None  # did not fit into the batch before
        self._beat = time.monotonic()
        self._draining = threading.Event()

    def call(self, endpoint: str, request: Arrays) -> Future:
        """As of serving.service.Service."""
        future: Future = Future()
        if endpoint == STATUS:
            future.set_result(self.status().arrays())
            return future
        expect(endpoint == REWARD, f"there is no endpoint {endpoint!r}, expected {REWARD} or {STATUS}")
        sequences = Sequences.of(request, self._limits)
        if self._draining.is_set():
            raise ServiceError(Code.UNAVAILABLE, "the service is about to stop.")
        try:
            self._waiting.put_nowait((sequences, future, time.monotonic()))
        except queue.Full:
            raise ServiceError(Code.BUSY, f"{self._waiting.maxsize} requests wait already.") from None
        return future

    def status(self) -> ServiceStatus:
        return ServiceStatus(
            kind="reward",
            vocabulary=self._limits.vocabulary,
            **self._digests,
            attributes=self.model.attributes,
            request_tokens=self._limits.tokens,
            context=self._limits.context,
            weights_version=0,
            queue=self._waiting.qsize(),
            beat_age_s=time.monotonic() - self._beat,
            draining=self._draining.is_set(),
        )

    def run(self, stop: threading.Event) -> None:
        """Answers until `stop` is set on any rank and nothing waits; the only code that runs collectives."""
        while True:
            work = self._take() if is_main() else []
            batch = Sequences.join([request for request, _, _ in work]) if work else None
            batch, leave = _from_first_rank((batch, self._draining.is_set() and not work))
            if leave:
                return
            if batch is not None:
                self._answer(work, batch)
            if any(gather(stop.is_set)):
                self._draining.set()
            self._beat = time.monotonic()

    def _answer(self, work: list[Work], batch: Sequences) -> None:
        """All ranks call it; the first one has the callers of the batch."""
        began = time.monotonic()
        for _, _, came in work:
            self.metrics.queue_seconds.observe(began - came)
        packed = last_tokens(torch.from_numpy(batch.tokens_N), torch.from_numpy(batch.cu_seqlens).int())
        try:
            scores_BK = self.model.infer(packed)[packed.cu_seqlens[1:].long() - 1].numpy()
        except Exception as error:
            if not _harmless(error):
                raise
            print(f"error: a batch of {len(work)} requests failed: {error}", file=sys.stderr, flush=True)
            for _, future, _ in work:
                future.set_exception(ServiceError(Code.FAILED, "the reward model failed; its log says why."))
            return
        self.metrics.compute_seconds.observe(time.monotonic() - began)
        self.metrics.batch_tokens.observe(len(batch.tokens_N))
        self.metrics.tokens.inc(len(batch.tokens_N))
        for request, future, _ in work:
            num = len(request.cu_seqlens) - 1
            future.set_result({"rewards_BK": scores_BK[:num], "weights_version": np.array(0), **self._identity})
            scores_BK = scores_BK[num:]

    def _take(self) -> list[Work]:
        """Waiting requests of about request_tokens tokens; the first one that comes within a beat, else none."""
        taken, tokens = [], 0
        while True:
            try:
                wait = not taken and not self._draining.is_set()
                request, future, came = self._next or self._waiting.get(block=wait, timeout=BEAT_S)
            except queue.Empty:
                return taken
            self._next = None
            if taken and tokens + len(request.tokens_N) > self._limits.tokens:
                self._next = request, future, came
                return taken
            if future.set_running_or_notify_cancel():  # else its caller has gone
                taken.append((request, future, came))
                tokens += len(request.tokens_N)


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
