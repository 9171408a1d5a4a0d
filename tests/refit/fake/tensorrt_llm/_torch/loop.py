"""The engine's event loop: requests join and leave a batch between two iterations, in one thread."""

import threading
from collections import deque

from tensorrt_llm._torch.batch import Batch
from tensorrt_llm._torch.request import Request, draw
from tests.refit.standin import Executor


class Loop:
    """Runs until the executor is closed. max_batch: sequences; max_tokens: of the prompts of one iteration."""

    def __init__(self, batch: Batch, executor: Executor, max_batch: int, max_tokens: int):
        self.batch, self.max_batch, self.max_tokens = batch, max_batch, max_tokens
        self._executor, self._live = executor, []
        self._waiting: deque[Request] = deque()
        self._thread = threading.Thread(target=self._run, name="event loop", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        with self._executor.changed:
            self._waiting.append(request)
            self._executor.active += 1
            self._executor.changed.notify_all()

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._executor.iteration():
                if self._executor.closed:
                    self._fail(RuntimeError("the engine was shut down"))
                    return
                try:
                    self._step()
                except Exception as error:
                    self._fail(error)

    def _step(self) -> None:
        self._drop_aborted()
        new = self._admit()
        if new:
            self._live += new
            self._take(self.batch.prefill([r.prompt for r in new]), new)
        if self._live:
            self._take(self.batch.decode([r.outputs[0].token_ids[-1] for r in self._live]), list(self._live))

    def _drop_aborted(self) -> None:
        for request in [r for r in self._waiting if r.aborted()]:
            self._waiting.remove(request)
            self._end(request, "cancelled")
        for request in [r for r in self._live if r.aborted()]:
            self._remove(request, "cancelled")

    def _admit(self) -> list[Request]:
        new, left = [], self.max_tokens
        while self._waiting and len(self._live) + len(new) < self.max_batch and len(self._waiting[0].prompt) <= left:
            new.append(self._waiting.popleft())
            left -= len(new[-1].prompt)
        return new

    def _take(self, logits, requests: list[Request]) -> None:
        for request, token, nats in zip(requests, *draw(logits, requests), strict=True):
            if reason := request.push(token, nats):
                self._remove(request, reason)

    def _remove(self, request: Request, reason: str) -> None:
        """The last one takes its row, as in Batch.remove()."""
        row = self._live.index(request)
        self.batch.remove(row)
        self._live[row] = self._live[-1]
        self._live.pop()
        self._end(request, reason)

    def _end(self, request: Request, reason: str) -> None:
        with self._executor.changed:
            self._executor.active -= 1
        request.finish(reason)

    def _fail(self, error: Exception) -> None:
        lost = [*self._live, *self._waiting]
        self._live.clear()
        self._waiting.clear()
        self.batch.clear()
        with self._executor.changed:
            self._executor.active -= len(lost)
        for request in lost:
            request.fail(error)
