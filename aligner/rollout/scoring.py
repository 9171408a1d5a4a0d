"""Sampling and scoring side by side: rewards are asked for while other responses are still being decoded."""

from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from aligner.data.batch import Rollout, concatenate
from aligner.data.examples import Prompt
from aligner.rollout.sampling import Response, Sampler, Sampling, pack_responses
from aligner.rollout.transcript import Texts, Transcript
from aligner.run import distributed
from aligner.run.distributed import gather

RESPONSES_AT_ONCE = 8  # in one request for rewards, at least: a reward model works in batches


class Reward(Protocol):
    """Who rates responses: serving.reward.RewardFunction, or a reward model."""

    def submit(self, prompts: list[str], responses: list[str], metadata: list[dict]) -> Future:
        """The future list of their rewards, one or several each."""
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
) -> Scored:
    """n responses to each prompt; `reward`, if any, gets the texts of a prompt's samples once all have finished.

    A request holds whole prompts and at least RESPONSES_AT_ONCE responses, except for the last. All ranks call it and
    get all responses: those that have a sampler, one a replica, share the prompts. A prompt that comes twice is given
    other responses the second time.
    """
    here = distributed.place()
    mine = [] if sampler is None else list(range(here.data, len(prompts), here.replicas))
    requests: list[tuple[list[int], Future]] = []

    def sample() -> list[tuple[Response, str]]:
        return _sample(sampler, mine, prompts, sampling, n, transcript, reward, requests) if mine else []

    sampled = [pair for pairs in gather(sample) for pair in pairs]
    texts: list = [None] * (n * len(prompts))
    for response, text in sampled:
        prompt = prompts[response.prompt]
        texts[n * response.prompt + response.sample] = (prompt.text, text, prompt.metadata)
    version = max(gather(lambda: -1 if sampler is None else sampler.weights_version))
    rollout = pack_responses([list(p.tokens) for p in prompts], [response for response, _ in sampled], version)
    return Scored(rollout=rollout, texts=_columns(texts), requests=requests)


def _sample(sampler, mine, prompts, sampling, n, transcript, reward, requests) -> list[tuple[Response, str]]:
    """(response, its text) to the prompts of the indices `mine`; appends to `requests`."""
    sampled: list[tuple[Response, str]] = []
    unfinished = dict.fromkeys(mine, n)
    texts: dict[int, tuple[str, str, dict]] = {}
    for i, response in _streams(sampler, mine, prompts, sampling, n):
        text = transcript.decode(response.tokens)
        sampled.append((replace(response, prompt=i), text))
        texts[n * i + response.sample] = (prompts[i].text, text, prompts[i].metadata)
        unfinished[i] -= 1
        ready = [b for b in texts if not unfinished[b // n]]
        if reward and ready and (len(ready) >= RESPONSES_AT_ONCE or not any(unfinished.values())):
            requests.append((ready, reward.submit(*_columns([texts.pop(b) for b in ready]))))
    return sampled


def _streams(sampler, mine: list[int], prompts: list[Prompt], sampling: Sampling, n: int):
    """(prompt index, response). Random streams come from a prompt's tokens: where it comes again, the seed changes."""
    seen: Counter = Counter()
    rounds: dict[int, list[int]] = {}
    wanted = set(mine)
    for i, prompt in enumerate(prompts):  # of all ranks, so that the layout changes nothing
        if i in wanted:
            rounds.setdefault(seen[prompt.tokens], []).append(i)
        seen[prompt.tokens] += 1
    for again, members in sorted(rounds.items()):
        settings = replace(sampling, seed=sampling.seed ^ (again << 48))
        for response in sampler.stream([list(prompts[i].tokens) for i in members], settings, n):
            yield members[response.prompt], response


def _columns(rows: list[tuple[str, str, dict]]) -> Texts:
    prompts, responses, metadata = (list(column) for column in zip(*rows, strict=True))
    return prompts, responses, metadata
