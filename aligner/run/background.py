"""Work beside the main thread that does not keep a process alive which is about to end."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future


class Background:
    """Threads that take calls in order; unlike a ThreadPoolExecutor's, nobody waits for them when the process ends.

    name: of the threads. threads: calls at once; they start with the first call.
    """

    def __init__(self, name: str, threads: int = 1):
        self._name, self._num = name, threads
        self._calls: queue.SimpleQueue[tuple[Future, Callable, tuple]] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def submit(self, call: Callable, *arguments) -> Future:
        """The future of `call(*arguments)`; called by one thread only."""
        future: Future = Future()
        self._calls.put((future, call, arguments))
        if len(self._threads) < self._num:
            thread = threading.Thread(target=self._run, name=f"{self._name}-{len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()
        return future

    def _run(self) -> None:
        while True:
            future, call, arguments = self._calls.get()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call(*arguments))
            except BaseException as error:  # whoever waits for the future is told
                future.set_exception(error)
