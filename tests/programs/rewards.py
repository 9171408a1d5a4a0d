"""Reward callables for the tests, good and broken."""

import os
import signal


def letters(prompts, responses, metadata):
    return [sum(c.isalpha() for c in text) / 20 for text in responses]


class InterruptInStep3:
    """Presses Ctrl-C while the third step is running: calls are the check, the first evaluation, then the steps."""

    def __init__(self):
        self.calls = 0

    def __call__(self, prompts, responses, metadata):
        self.calls += 1
        if self.calls == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return letters(prompts, responses, metadata)


def raises(prompts, responses, metadata):
    raise KeyError("no such judge")


def nan(prompts, responses, metadata):
    return [float("nan")] * len(responses)


def too_few(prompts, responses, metadata):
    return [0.0] * (len(responses) + 1)


class BreaksLater(InterruptInStep3):
    def __call__(self, prompts, responses, metadata):
        self.calls += 1
        if self.calls == 4:
            return [float("inf")] * len(responses)
        return letters(prompts, responses, metadata)
