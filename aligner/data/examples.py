"""What a line of data becomes: one frozen class per way of training."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

Tokens = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt.

    text: what the model reads, chat template applied.
    tokens: ids of `text`.
    given: text or messages, as the line has them.
    metadata: the other keys of the line, handed to the reward function untouched.
    """

    text: str
    tokens: Tokens
    given: str | list[dict] = ""
    metadata: dict

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.tokens)


@dataclass(frozen=True, kw_only=True)
class Example:
    """One sequence of which a model learns some tokens.

    tokens: token ids.
    mask: True where the token is learnt; never for the first, which nothing predicts.
    metadata: the other keys of the line.
    """

    tokens: Tokens
    mask: tuple[bool, ...]
    metadata: dict = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.tokens)

    @staticmethod
    def of(prompt: Sequence[int], response: Sequence[int]) -> "Example":
        """A prompt and the response that is learnt."""
        return Example(tokens=(*prompt, *response), mask=(False,) * len(prompt) + (True,) * len(response))

    def split(self) -> tuple[Tokens, Tokens]:
        """(prompt, response): the response is the last run of learnt tokens, the prompt all that stands before it."""
        runs = [(learnt, len(list(run))) for learnt, run in itertools.groupby(self.mask)]
        after = 0 if runs[-1][0] else runs[-1][1]
        end = len(self.tokens) - after
        begin = end - next(num for learnt, num in reversed(runs) if learnt)
        return self.tokens[:begin], self.tokens[begin:end]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two responses to one prompt.

    chosen, rejected: the sequences; learnt tokens are the response's.
    chosen_reward, rejected_reward: reward units, what a judge gave; 1 and 0 where the data says nothing.
    margin: by how much the chosen one is better; 0 where the data does not say.
    metadata: the other keys of the line.
    """

    chosen: Example
    rejected: Example
    chosen_reward: float = 1.0
    rejected_reward: float = 0.0
    margin: float = 0.0
    metadata: dict = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Tokens of the longer sequence."""
        return max(self.chosen.length, self.rejected.length)


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One response with a verdict.

    prompt, response: token ids.
    desirable: whether the response is one to imitate.
    metadata: the other keys of the line.
    """

    prompt: Tokens
    response: Tokens
    desirable: bool
    metadata: dict = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Tokens of prompt and response."""
        return len(self.prompt) + len(self.response)


@dataclass(frozen=True, kw_only=True)
class Rated:
    """One sequence with marks.

    tokens: token ids; the last one is where a reward model reads.
    attributes: the marks; -100 says that one is missing.
    metadata: the other keys of the line.
    """

    tokens: Tokens
    attributes: tuple[float, ...]
    metadata: dict = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.tokens)


@dataclass(frozen=True, kw_only=True)
class Weighted:
    """Several responses y to one prompt x with wanted attributes a, for SteerLM 2.

    responses: sequences; learnt tokens are the response's.
    log_p_attributes: nats. log P(a | x, y) of each response, by the attribute model.
    log_p: nats. log P(y | x) of each, by the model that was not told of attributes.
    log_q: nats. log Q(y | a, x) of each, by the model that drew it.
    metadata: the other keys of the line.
    """

    responses: tuple[Example, ...]
    log_p_attributes: tuple[float, ...]
    log_p: tuple[float, ...]
    log_q: tuple[float, ...]
    metadata: dict = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Tokens of the longest response with its prompt."""
        return max(response.length for response in self.responses)


@dataclass(frozen=True, kw_only=True)
class Taught:
    """One sequence with a teacher's logits; entry t of every field is about token t, given the tokens before it.

    tokens: token ids.
    mask: True where the token is learnt; never for the first.
    topk_ids: ids of the teacher's most likely tokens at each place, equally many everywhere; zeros at the first.
    topk_logits: their logits; zeros at the first.
    log_sum: nats. log of the sum of exp over all logits at each place, or None when the data does not have it.
    metadata: the other keys of the line.
    """

    tokens: Tokens
    mask: tuple[bool, ...]
    topk_ids: tuple[Tokens, ...]
    topk_logits: tuple[tuple[float, ...], ...]
    log_sum: tuple[float, ...] | None = None
    metadata: dict = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.tokens)
