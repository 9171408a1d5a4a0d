"""Conversations of several turns: an environment, any callable, goes on with what the policy said.

A turn of the environment is part of the sequence but no action: losses, advantages and log-probabilities skip it.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from aligner.data.encoder import Encoder
from aligner.data.examples import Prompt
from aligner.rollout.sampling import Response, Sampler, Sampling
from aligner.run.callables import load_callable

Asked = TypeVar("Asked")
# (prompts, turns so far of each: response, message, response, ..., metadata) -> next message of each, None at its end
Environment = Callable[[list[str], list[list[str]], list[dict]], list[str | None]]


@dataclass(frozen=True, kw_only=True)
class EnvironmentConfig:
    function: str = ""
    """package.module:callable that continues a conversation; none leaves it at one response (docs/rewards.md)."""
    max_turns: int = 4
    """Responses in a conversation, at most."""

    def __post_init__(self):
        if self.max_turns < 1:
            raise ValueError(f"environment.max-turns is {self.max_turns}, expected 1 or more.")


@dataclass(frozen=True, kw_only=True)
class Dialogue:
    """Who goes on after a response.

    environment: the callable. encoder: tokenises what it says, in the chat's template where the prompt is a chat.
    max_turns: responses in a conversation, at most.
    """

    environment: Environment
    encoder: Encoder
    max_turns: int


@dataclass(kw_only=True)
class Conversation:
    """One sample of a prompt while it goes on.

    index: of the prompt. again: how many like it come before it. sample: which of its samples.
    tokens, logprobs, actions: of all that was said after the prompt; logprobs are 0 where it was no action.
    turns: texts, the policy's first. finished: whether the last response ended by itself.
    """

    index: int
    again: int
    sample: int
    prompt: Prompt
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    actions: list[bool] = field(default_factory=list)
    turns: list[str] = field(default_factory=list)
    finished: bool = False

    def said(self, response: Response, text: str) -> None:
        self.tokens += response.tokens
        self.logprobs += response.logprobs
        self.actions += [True] * len(response.tokens)
        self.turns.append(text)
        self.finished = response.finished

    def told(self, tokens: tuple[int, ...], text: str) -> None:
        self.tokens += tokens
        self.logprobs += [0.0] * len(tokens)
        self.actions += [False] * len(tokens)
        self.turns.append(text)


def load_environment(spec: str) -> Environment:
    """The environment `package.module:callable`; raises what run.callables.load_callable raises."""
    return load_callable(spec, "environment", "my_environments:quiz")


Numbered = tuple[int, int, Prompt]  # index of a prompt, how many like it come before it, the prompt


def number_repeats(prompts: Sequence[Prompt]) -> list[Numbered]:
    """Random streams come from a prompt's tokens; where it comes again, they must come from something else too."""
    seen: Counter = Counter()
    numbered = []
    for i, prompt in enumerate(prompts):
        numbered.append((i, seen[prompt.tokens], prompt))
        seen[prompt.tokens] += 1
    return numbered


def converse(
    sampler: Sampler,
    prompts: Sequence[Numbered],
    sampling: Sampling,
    n: int,
    decode: Callable[[list[int]], str],
    dialogue: Dialogue | None,
) -> Iterator[Conversation]:
    """n conversations from each prompt, as they end; without a dialogue each is one response.

    One ends when the environment returns None, a response is cut off, max_turns are over, or the next turn would not
    fit into the context.
    """
    going = []
    for talk in _open(sampler, prompts, sampling, n, decode):
        if dialogue is None:
            yield talk
        going.append(talk)
    for turn in range(1, dialogue.max_turns) if dialogue else ():
        following = _continued(dialogue, [talk for talk in going if talk.finished], sampler, sampling)
        yield from (talk for talk in going if not any(talk is other for other in following))
        going = following
        groups: dict[tuple[int, int], list[Conversation]] = {}
        for talk in going:  # samples of one prompt that are still alike must not draw alike
            groups.setdefault((talk.again, talk.sample), []).append(talk)
        streams = [
            (group, sampler.stream([[*t.prompt.tokens, *t.tokens] for t in group], _seeded(sampling, *key, turn)))
            for key, group in groups.items()
        ]
        for talk, response in _in_turns(streams):
            talk.said(response, decode(response.tokens))
    if dialogue:
        yield from going


def _open(sampler: Sampler, prompts: Sequence[Numbered], sampling: Sampling, n: int, decode) -> Iterator[Conversation]:
    """The first response of each conversation, as they end."""
    rounds: dict[int, list[Numbered]] = {}
    for item in prompts:
        rounds.setdefault(item[1], []).append(item)
    streams = [
        (members, sampler.stream([list(p.tokens) for *_, p in members], _seeded(sampling, again), n))
        for again, members in sorted(rounds.items())
    ]
    for (index, again, prompt), response in _in_turns(streams):
        talk = Conversation(index=index, again=again, sample=response.sample, prompt=prompt)
        talk.said(response, decode(response.tokens))
        yield talk


def _seeded(sampling: Sampling, *key: int) -> Sampling:
    """Another seed for another key; the sampling's own for one of zeros."""
    if not any(key):
        return sampling
    digest = hashlib.sha256(repr((sampling.seed, *key)).encode()).digest()
    return replace(sampling, seed=int.from_bytes(digest[:8], "big") >> 1)


def _in_turns(streams: list[tuple[list[Asked], Iterator[Response]]]) -> Iterator[tuple[Asked, Response]]:
    """(who asked, response) of all streams: read in turns they decode in one batch."""
    while streams:
        for pair in list(streams):
            asked, stream = pair
            response = next(stream, None)
            if response is None:
                streams.remove(pair)
            else:
                yield asked[response.prompt], response


def _continued(dialogue: Dialogue, talks: list[Conversation], sampler, sampling: Sampling) -> list[Conversation]:
    """Those that the environment has more to say to, with what it said."""
    following = []
    messages = _asked(dialogue.environment, talks) if talks else []
    for talk, message in zip(talks, messages, strict=True):
        if message is not None:
            closed = talk.tokens[-1] == dialogue.encoder.eos
            added = dialogue.encoder.follow(talk.prompt.given, talk.turns, message, closed=closed)
            size = len(talk.prompt.tokens) + len(talk.tokens) + len(added)
            if size + sampling.max_tokens <= sampler.shape.context:
                talk.told(added, message)
                following.append(talk)
    return following


def _asked(environment: Environment, talks: list[Conversation]) -> list[str | None]:
    prompts, metadata = [t.prompt.text for t in talks], [t.prompt.metadata for t in talks]
    try:
        messages = list(environment(prompts, [t.turns for t in talks], metadata))
    except Exception as error:  # whatever a user's code raises is told with the environment's name, and chained
        raise ValueError(f"the environment raised {type(error).__name__}: {error}.") from error
    if len(messages) != len(prompts) or not all(m is None or isinstance(m, str) for m in messages):
        raise ValueError(
            f"the environment returned {str(messages)[:80]} for {len(prompts)} conversations, expected a string or "
            "None for each."
        )
    return messages
