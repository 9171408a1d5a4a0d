"""Sampling and scoring side by side: rewards are asked for while other responses are still being decoded."""

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
from aligner.run.distributed import gather

RESPONSES_AT_ONCE = 8  # in one request for rewards, at least: a reward model works in batches


class Reward(Protocol):
    """Who rates responses: serving.reward.RewardFunction, or a reward model."""

    def submit(
        self, prompts: list[str], responses: list[str], metadata: list[dict], sequences: list[list[int]]
    ) -> Future:
        """The future list of their rewards, one or several each. sequences: tokens of prompt and response."""
        ...


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A rollout and its rewards to come.

    texts: (prompts, responses, metadata), one entry a sequence.
    requests: (sequence indices, future list of their rewards), of those that this rank sampled.
    """

    rollout: Rollout
    texts: Texts
    requests: list[tuple[list[int], Future]]

    def take(self, sequences: list[int]) -> "Scored":
        """The same restricted to the given sequences, whose rewards are known already."""
        texts = tuple([column[b] for b in sequences] for column in self.texts)
        return Scored(rollout=self.rollout.take(sequences), texts=texts, requests=[])

    def rewards(self) -> Tensor:
        """Waits for those of all ranks: (B, F) float32, reward units, of F functions. Raises what a request raised."""
        answers = gather(lambda: [(sequences, request.result()) for sequences, request in self.requests])
        rewards = dict(pair for rank in answers for s, given in rank for pair in zip(s, given, strict=True))
        return torch.tensor([rewards[b] for b in range(len(rewards))], dtype=torch.float32)


def join_scored(parts: list[Scored]) -> Scored:
    """All their sequences, one part after the other; the rewards are known already."""
    texts = tuple([text for part in parts for text in part.texts[i]] for i in range(3))
    return Scored(rollout=concatenate([part.rollout for part in parts]), texts=texts, requests=[])


def sample_and_score(
    sampler: Sampler | None,
    prompts: list[Prompt],
    sampling: Sampling,
    n: int,
    transcript: Transcript,
    reward: Reward | None,
    dialogue: Dialogue | None = None,
) -> Scored:
    """n responses to each prompt; `reward`, if any, gets the texts of a prompt's samples once all have finished.

    A request holds whole prompts and at least RESPONSES_AT_ONCE responses, except for the last. All ranks call it and
    get all responses: those that have a sampler, one a replica, share the prompts. A prompt that comes twice is given
    other responses the second time.

    dialogue: who goes on after a response; None leaves it at one.
    """
    here = distributed.place()
    mine = [] if sampler is None else number_repeats(prompts)[here.data :: here.replicas]
    requests: list[tuple[list[int], Future]] = []

    def sample() -> list[Conversation]:
        if not mine:
            return []
        talks = converse(sampler, mine, sampling, n, transcript.decode, dialogue)
        return _asking(talks, {i: n for i, _, _ in mine}, n, transcript, reward, requests)

    talks = sorted((talk for talks in gather(sample) for talk in talks), key=lambda t: (t.index, t.sample))
    version = max(gather(lambda: -1 if sampler is None else sampler.weights_version))
    rollout = pack_turns(
        [(talk.prompt.tokens, talk.tokens, talk.actions, talk.logprobs) for talk in talks],
        [talk.finished for talk in talks],
        version,
    )
    return Scored(rollout=rollout, texts=_columns([_row(talk, transcript) for talk in talks]), requests=requests)


def _asking(talks, unfinished: dict[int, int], n: int, transcript, reward, requests) -> list[Conversation]:
    """All of the conversations; their rewards are asked for on the way, and `requests` grows."""
    ended: list[Conversation] = []
    rows: dict[int, Conversation] = {}
    for talk in talks:
        ended.append(talk)
        rows[n * talk.index + talk.sample] = talk
        unfinished[talk.index] -= 1
        ready = [b for b in rows if not unfinished[b // n]]
        if reward and ready and (len(ready) >= RESPONSES_AT_ONCE or not any(unfinished.values())):
            texts = _columns([_row(rows[b], transcript) for b in ready])
            sequences = [[*talk.prompt.tokens, *talk.tokens] for talk in map(rows.pop, ready)]
            requests.append((ready, reward.submit(*texts, sequences)))
    return ended


def _row(talk: Conversation, transcript: Transcript) -> tuple[str, str, dict]:
    """(prompt, all that was said after it, metadata, which has the turns of a conversation)."""
    turns = {"turns": talk.turns} if len(talk.turns) > 1 else {}
    return talk.prompt.text, transcript.decode(talk.tokens), talk.prompt.metadata | turns


def _columns(rows: list[tuple[str, str, dict]]) -> Texts:
    prompts, responses, metadata = (list(column) for column in zip(*rows, strict=True))
    return prompts, responses, metadata
