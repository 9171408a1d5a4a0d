"""A reward written in Python: any callable `package.module:name` that scores prompt and response pairs."""

import importlib
import inspect
import math
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    function: str = "aligner.serving.sentiment:PositiveReview"
    """package.module:callable that gets prompts, responses, metadata (lists) and returns one float each."""


PROBE = ("The film was", " fine.", {})


class RewardFunction:
    """A user's callable behind the methods every reward has; what it returns is checked on each call.

    function: (prompts: list[str], responses: list[str], metadata: list[dict]) -> list of numbers, reward units.
    name: how errors call it.
    """

    def __init__(self, function: Callable, name: str):
        self.name = name
        self._function = function
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reward")

    def score(self, prompts: list[str], responses: list[str], metadata: list[dict]) -> list[float]:
        """Rewards of prompt and response pairs; aligned lists, one entry a pair.

        Raises ValueError when the callable raises, or returns not exactly one finite number a response.
        """
        try:
            rewards = list(self._function(prompts, responses, metadata))
        except Exception as error:  # whatever a user's code raises is told with the reward's name, and chained
            raise ValueError(
                f"reward function {self.name} raised {type(error).__name__}: {error}; "
                "it is called with (prompts, responses, metadata) and returns one number a response."
            ) from error
        if len(rewards) != len(responses):
            raise ValueError(
                f"reward function {self.name} returned {len(rewards)} numbers for {len(responses)} responses, "
                "expected one each."
            )
        return [self._number(index, value) for index, value in enumerate(rewards)]

    __call__ = score

    def submit(self, prompts: list[str], responses: list[str], metadata: list[dict]) -> Future:
        """`score` in the reward's one worker thread; the future's result is the list of rewards."""
        return self._worker.submit(self.score, prompts, responses, metadata)

    def check(self) -> None:
        """Score one tiny pair, so that a broken reward fails before the long work; raises what `score` raises."""
        prompt, response, metadata = PROBE
        self.score([prompt], [response], [metadata])

    def close(self) -> None:
        """End the worker thread, once what was submitted is done."""
        self._worker.shutdown()

    def _number(self, index: int, value) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(
                f"reward function {self.name} returned {value!r} for response {index}, expected a finite number."
            )
        return number


def load_reward(spec: str) -> RewardFunction:
    """Import `package.module:callable`, from the installed packages or the current folder; a class is constructed once.

    spec: for example my_rewards:brevity.
    Raises ValueError that says what could not be found and how to write it.
    """
    module_name, colon, name = spec.partition(":")
    if not (module_name and colon and name):
        raise ValueError(f"reward function {spec!r} is not MODULE:CALLABLE; write for example my_rewards:brevity.")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # importing runs the user's file, which may raise anything
        raise ValueError(
            f"reward function {spec!r}: importing {module_name} raised {type(error).__name__}: {error}; "
            "write MODULE:CALLABLE with a module in the current folder or an installed package."
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        found = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(f"reward function {spec!r}: {module_name} has no callable {name!r}; it has {sorted(found)}.")
    return RewardFunction(function() if inspect.isclass(function) else function, spec)
