"""Sampling and scoring side by side: rewards and values are asked for while other responses are still being decoded.

What judges whole prompts, a callable, is asked about prompts. Models, which judge each response by itself, are asked
about parts: sequences that finished one after the other, a micro-batch's worth. Their micro-batches, and so the last
bits of what they say, are the same whether they are asked meanwhile or afterwards, here or elsewhere.
"""

from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from aligner.data.batch import Rollout, concatenate, pack_turns
from aligner.data.examples import Prompt
from aligner.rollout.conversation import Conversation, Dialogue, converse, number_repeats
from aligner.rollout.sampling import Sampler, Sampling
from aligner.rollout.transcript import Texts, Transcript
from aligner.run import distributed
from aligner.run.distributed import gather, gather_lists

RESPONSES_AT_ONCE = 8  # in one request for rewards, at least: a reward model works in batches


class Reward(Protocol):
    """Who rates responses: serving.rewards.Rewards."""

    def submit(self, prompts: list[str], responses: list[str], metadata: list[dict]) -> Future:
        """The future list of what callables give to each response, a list."""
        ...

    def ahead(self, part: Rollout) -> Future:
        """The future list of what served models give to each response, a list."""
        ...


class Values(Protocol):
    """A critic: serving.local.LocalCritic or serving.remote_critic.RemoteCritic."""

    def ahead(self, part: Rollout) -> Future:
        """What its infer() is given for the part when all sequences have finished."""
        ...


@dataclass(frozen=True, kw_only=True)
class Part:
    """What models are asked about at once.

    sequences: their indices, in the order in which they finished. rewards, values: what ahead() gave; None where nobody
        was asked.
    """

    sequences: list[int]
    rewards: Future | None
    values: Future | None


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A rollout and its rewards to come.

    texts: (prompts, responses, metadata), one entry a sequence.
    requests: (sequence indices, future list of their rewards), of those that this rank sampled.
    parts: of those too.
    """

    rollout: Rollout
    texts: Texts
    requests: list[tuple[list[int], Future]]
    parts: list[Part]

    def take(self, sequences: list[int]) -> "Scored":
        """The same restricted to the given sequences, whose rewards are known already."""
        texts = tuple([column[b] for b in sequences] for column in self.texts)
        return Scored(rollout=self.rollout.take(sequences), texts=texts, requests=[], parts=[])

    def rewards(self) -> Tensor:
        """Waits for those of all ranks: (B, F) float32, reward units, of F functions and served models.

        Raises what a request raised.
        """
        rewards: dict[int, list[float]] = {}
        for asked in (self.requests, [(part.sequences, part.rewards) for part in self.parts]):
            for sequences, rows in gather_lists(lambda asked=asked: [(s, future.result()) for s, future in asked]):
                for b, row in zip(sequences, rows, strict=True):
                    rewards.setdefault(b, []).extend(row)
        return torch.tensor([rewards[b] for b in range(len(rewards))], dtype=torch.float32)

    def shares(self) -> list[list[int]]:
        """The sequences of each part, of all ranks; all of them call it."""
        return gather_lists(lambda: [part.sequences for part in self.parts])

    def values(self) -> list[tuple[list[int], Future]]:
        """What the critic is asked about the parts of this rank: sequences, and what its ahead() gave."""
        return [(part.sequences, part.values) for part in self.parts]


def join_scored(parts: list[Scored]) -> Scored:
    """All their sequences, one part after the other; the rewards are known already."""
    texts = tuple([text for part in parts for text in part.texts[i]] for i in range(3))
    return Scored(rollout=concatenate([part.rollout for part in parts]), texts=texts, requests=[], parts=[])


def sample_and_score(
    sampler: Sampler | None,
    prompts: list[Prompt],
    sampling: Sampling,
    n: int,
    transcript: Transcript,
    reward: Reward | None,
    dialogue: Dialogue | None = None,
    critic: Values | None = None,
    part_tokens: int = 1,
) -> Scored:
    """n responses to each prompt; `reward`, if any, gets the texts of a prompt's samples once all have finished.

    A request holds whole prompts and at least RESPONSES_AT_ONCE responses, except for the last. All ranks call it and
    get all responses: those that have a sampler, one a replica, share the prompts. A prompt that comes twice is given
    other responses the second time.

    dialogue: who goes on after a response; None leaves it at one. critic: asked for values, if any.
    part_tokens: tokens of a part, at least, except for the last.
    """
    here = distributed.place()
    mine = [] if sampler is None else number_repeats(prompts)[here.data :: here.replicas]
    asking = _Asking(n, [i for i, _, _ in mine], transcript, reward, critic, part_tokens)

    def sample() -> list[Conversation]:
        if not mine:
            return []
        return asking.all(converse(sampler, mine, sampling, n, transcript.decode, dialogue))

    talks = sorted(gather_lists(sample), key=lambda t: (t.index, t.sample))
    version = max(gather(lambda: -1 if sampler is None else sampler.weights_version))
    rollout = _packed(talks, version)
    texts = _columns([_row(talk, transcript) for talk in talks])
    return Scored(rollout=rollout, texts=texts, requests=asking.requests, parts=asking.parts)


class _Asking:
    """Asks about conversations while others go on: `requests` and `parts` grow. Arguments as of sample_and_score.

    prompts: indices of those that are sampled here.
    """

    def __init__(self, n: int, prompts: list[int], transcript: Transcript, reward, critic, part_tokens: int):
        self._n, self._transcript, self._reward, self._critic = n, transcript, reward, critic
        self._part_tokens = part_tokens
        self._unfinished = dict.fromkeys(prompts, n)
        self._rows: dict[int, Conversation] = {}  # by sequence index; nobody was asked for their rewards yet
        self._part: dict[int, Conversation] = {}
        self.requests: list[tuple[list[int], Future]] = []
        self.parts: list[Part] = []

    def all(self, talks: Iterable[Conversation]) -> list[Conversation]:
        ended = []
        for talk in talks:
            ended.append(talk)
            self._unfinished[talk.index] -= 1
            last, b = not any(self._unfinished.values()), self._n * talk.index + talk.sample
            self._rows[b] = self._part[b] = talk
            if self._reward:
                self._ask_about_prompts(last)
            if self._reward or self._critic:
                self._ask_about_part(last)
        return ended

    def _ask_about_prompts(self, last: bool) -> None:
        ready = [b for b in self._rows if not self._unfinished[b // self._n]]
        if ready and (last or len(ready) >= RESPONSES_AT_ONCE):
            texts = _columns([_row(self._rows.pop(b), self._transcript) for b in ready])
            self.requests.append((ready, self._reward.submit(*texts)))

    def _ask_about_part(self, last: bool) -> None:
        talks = list(self._part.values())
        if last or sum(len(talk.prompt.tokens) + len(talk.tokens) for talk in talks) >= self._part_tokens:
            rollout, sequences = _packed(talks, 0), list(self._part)
            rewards, values = (asked and asked.ahead(rollout) for asked in (self._reward, self._critic))
            self.parts.append(Part(sequences=sequences, rewards=rewards, values=values))
            self._part = {}


def _packed(talks: list[Conversation], version: int) -> Rollout:
    turns = [(talk.prompt.tokens, talk.tokens, talk.actions, talk.logprobs) for talk in talks]
    return pack_turns(turns, [talk.finished for talk in talks], version)


def _row(talk: Conversation, transcript: Transcript) -> tuple[str, str, dict]:
    """(prompt, all that was said after it, metadata, which has the turns of a conversation)."""
    turns = {"turns": talk.turns} if len(talk.turns) > 1 else {}
    return talk.prompt.text, transcript.decode(talk.tokens), talk.prompt.metadata | turns


def _columns(rows: list[tuple[str, str, dict]]) -> Texts:
    prompts, responses, metadata = (list(column) for column in zip(*rows, strict=True))
    return prompts, responses, metadata
