"""Ctrl-C that loses nothing: the first one asks for a stop after the current step, the second stops at once."""

import os
import signal


class Interrupt:
    """While open, SIGINT and SIGTERM set `requested`; a second SIGINT raises KeyboardInterrupt. Main thread only.

    with Interrupt() as interrupt: ...; if interrupt.requested: save and leave
    """

    def __init__(self):
        self.requested = False

    def __enter__(self) -> "Interrupt":
        self._old = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame) -> None:
        if self.requested:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.requested = True
        # print() may not be entered twice, and the signal can arrive in the middle of one.
        os.write(2, b"\nstopping: the current step is finished and saved first; press Ctrl-C again to stop now.\n")
