"""Sampling and scoring side by side: rewards are asked for while other responses are still being decoded."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from aligner.data.batch import Rollout
from aligner.data.prompts import Prompt
from aligner.rollout.sampling import Response, Sampler, Sampling, pack_responses
from aligner.rollout.transcript import Texts, Transcript

RESPONSES_AT_ONCE = 8  # in one request for rewards, at least: a reward model works in batches


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A rollout and its rewards to come.

    texts: (prompts, responses, metadata), one entry a sequence.
    requests: (sequence indices, future list of their rewards).
    """

    rollout: Rollout
    texts: Texts
    requests: list[tuple[list[int], Future]]

    def rewards(self) -> Tensor:
        """Waits for all of them: (B,) float32, reward units. Raises what a request raised."""
        rewards_B = torch.empty(len(self.rollout.finished_B))
        for sequences, request in self.requests:
            rewards_B[sequences] = torch.tensor(request.result(), dtype=torch.float32)
        return rewards_B


def sample_and_score(
    sampler: Sampler,
    prompts: list[Prompt],
    sampling: Sampling,
    n: int,
    transcript: Transcript,
    submit: Callable[[list[str], list[str], list[dict]], Future],
) -> Scored:
    """n responses to each prompt; `submit` gets the texts of a prompt's samples once all of them have finished.

    A request holds whole prompts and at least RESPONSES_AT_ONCE responses, except for the last.
    """
    ids = [list(p.tokens) for p in prompts]
    responses: list[Response] = []
    unfinished = [n] * len(prompts)
    texts: list[tuple[str, str, dict] | None] = [None] * (n * len(prompts))
    ready: list[int] = []
    requests: list[tuple[list[int], Future]] = []
    for response in sampler.stream(ids, sampling, n):
        responses.append(response)
        i = response.prompt
        text = transcript.decode(response.tokens)
        texts[n * i + response.sample] = (prompts[i].text, text, prompts[i].metadata)
        unfinished[i] -= 1
        if unfinished[i]:
            continue
        ready += range(n * i, n * (i + 1))
        if len(ready) >= RESPONSES_AT_ONCE or len(responses) == len(texts):
            requests.append((ready, submit(*_columns([texts[b] for b in ready]))))
            ready = []
    rollout = pack_responses(ids, responses, sampler.weights_version)
    return Scored(rollout=rollout, texts=_columns(texts), requests=requests)


def _columns(rows: list[tuple[str, str, dict]]) -> Texts:
    prompts, responses, metadata = (list(column) for column in zip(*rows, strict=True))
    return prompts, responses, metadata
