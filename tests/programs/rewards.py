"""Reward callables for the tests, good and broken."""

import math
import os
import random
import signal
import time

from tests.programs.bandit import weight


def letters(prompts, responses, metadata):
    return [sum(c.isalpha() for c in text) / 20 for text in responses]


class InterruptInStep3:
    """Presses Ctrl-C while the third step is running: calls are the check, the first evaluation, then the steps."""

    when = 5

    def __init__(self):
        self.calls = 0

    def __call__(self, prompts, responses, metadata):
        self.calls += 1
        if self.calls == self.when:
            os.kill(os.getpid(), signal.SIGINT)
        return letters(prompts, responses, metadata)


class InterruptInEvaluation(InterruptInStep3):
    when = 2


def raises(prompts, responses, metadata):
    raise KeyError("no such judge")


def nan(prompts, responses, metadata):
    return [float("nan")] * len(responses)


def too_few(prompts, responses, metadata):
    return [0.0] * (len(responses) + 1)


class BreaksInStep2:
    def __init__(self):
        self.calls = 0

    def __call__(self, prompts, responses, metadata):
        self.calls += 1
        return [float("inf")] * len(responses) if self.calls == 4 else letters(prompts, responses, metadata)


def bandit(prompts, responses, metadata):
    """log w of the task in bandit.py."""
    return [math.log(weight(text.strip())) for text in responses]


def digits(prompts, responses, metadata):
    return [sum(int(c) for c in text if c.isdigit()) / 10 for text in responses]


def has_a_seven(prompts, responses, metadata):
    return [float("7" in text) for text in responses]


def digits_in_no_hurry(prompts, responses, metadata):
    """Answers come in another order every time."""
    time.sleep(random.SystemRandom().random() / 50)
    return digits(prompts, responses, metadata)
