"""Rewards: options, and callables `package.module:name` that score prompt and response pairs."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from aligner.run.callables import load_callable
from aligner.serving.access import AccessConfig


@dataclass(frozen=True, kw_only=True)
class RewardConfig(AccessConfig):
    function: tuple[str, ...] = ()
    """package.module:callable, which gets prompts, responses, metadata (lists) and returns one float each; several with
    commas. Without one, and without reward models, the sentiment of movie reviews."""
    url: tuple[str, ...] = ()
    """Served reward models: host:port of `python -m aligner.serve reward`; servers of one model with + between them."""
    model: tuple[str, ...] = ()
    """Reward models: folders of runs of aligner.reward_model, or of Hugging Face sequence classifiers."""
    answer_dtype: Literal["float32", "bfloat16"] = "float32"
    """In which served reward models answer."""
    weights: tuple[float, ...] = ()
    """Of the functions, then of the served models, then of the models, in their sum; without any, all 1."""
    attribute_weights: tuple[float, ...] = ()
    """Of the attributes of a reward model that gives several."""
    mean: float = 0.0
    """Subtracted from the sum, reward units."""
    std: float = 1.0
    """The sum is divided by it, reward units."""
    clip: float | None = None
    """Then clipped to plus and minus this; none leaves it out."""
    missing_eos_penalty: float = 0.0
    """Then taken from responses that reached the length limit."""

    def __post_init__(self):
        sources = len(self.function) + len(self.model) + len(self.url) or 1
        if self.weights and len(self.weights) != sources:
            raise ValueError(f"reward.weights has {len(self.weights)} numbers for {sources} rewards; give one each.")
        if self.std <= 0 or (self.clip is not None and self.clip <= 0):
            raise ValueError(f"reward.std and reward.clip must be above 0, got {self.std} and {self.clip}.")

    def functions(self) -> tuple[str, ...]:
        return self.function if self.function or self.model or self.url else (DEFAULT_REWARD,)


DEFAULT_REWARD = "aligner.serving.sentiment:PositiveReview"
PROBE = ("The film was", " fine.", {})


class RewardFunction:
    """A user's callable behind the methods every reward has; what it returns is checked on each call.

    function: (prompts: list[str], responses: list[str], metadata: list[dict]) -> list of numbers, reward units.
    name: how errors call it.
    """

    def __init__(self, function: Callable, name: str):
        self.name = name
        self._function = function

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

    def check(self) -> None:
        """Score one tiny pair, so that a broken reward fails before the long work; raises what `score` raises."""
        prompt, response, metadata = PROBE
        self.score([prompt], [response], [metadata])

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
    """The reward `package.module:callable`; raises what run.callables.load_callable raises."""
    return RewardFunction(load_callable(spec, "reward function", "my_rewards:brevity"), spec)
