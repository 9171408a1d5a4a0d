"""A reward model as a service: requests of many callers, answered in batches by a group of ranks."""

from concurrent.futures import Future

import numpy as np
import torch

from aligner.data.encoder import Encoder
from aligner.models.reward_model import RewardModel
from aligner.serving.group import Group
from aligner.serving.rewards import last_tokens
from aligner.serving.service import (
    REWARD,
    STATUS,
    Arrays,
    Limits,
    RewardRequest,
    Sequences,
    ServiceStatus,
    expect,
    resolved,
    to_answer,
)
from aligner.serving.text import in_tokens


class RewardService:
    """All ranks make it and run its group; the first one takes requests meanwhile, from any thread.

    group: that works on its requests, with other services' or alone.
    digests: of the "model" and of its "tokenizer". limits: of a request. encoder: of requests in words.
    """

    endpoints = (REWARD, STATUS)

    def __init__(self, group: Group, model: RewardModel, digests: dict[str, str], limits: Limits, encoder: Encoder):
        self.model, self._digests, self._limits, self._encoder = model, digests, limits, encoder
        self._identity = {name: np.array(digest) for name, digest in digests.items()}
        self._group, self.metrics = group, group.metrics
        group.works(REWARD, self._answer)
        self.request_bytes = 16 * limits.tokens + (1 << 16)

    def call(self, endpoint: str, request: Arrays) -> Future:
        """As of serving.service.Service."""
        if endpoint == STATUS:
            return resolved(self.status().arrays())
        expect(endpoint == REWARD, f"there is no endpoint {endpoint!r}, expected {' or '.join(self.endpoints)}")
        asked = RewardRequest.of(in_tokens(request, self._encoder, actions=False), self._limits)
        return self._group.submit(endpoint, asked, len(asked.sequences.tokens_N))

    def status(self) -> ServiceStatus:
        return ServiceStatus(
            kind="reward",
            vocabulary=self._limits.vocabulary,
            **self._digests,
            attributes=self.model.attributes,
            request_tokens=self._limits.tokens,
            request_bytes=self.request_bytes,
            context=self._limits.context,
            weights_version=0,
            **self._group.state(),
        )

    def finish(self) -> None:
        """Nothing: its weights never change."""

    def _answer(self, requests: list[RewardRequest]) -> list[Arrays]:
        asked = [request.sequences for request in requests]
        batch = Sequences.join(asked)
        packed = last_tokens(torch.from_numpy(batch.tokens_N), torch.from_numpy(batch.cu_seqlens).int())
        scores_NK = self.model.infer(packed, Sequences.shares(asked))
        scores_BK = scores_NK[packed.cu_seqlens[1:].long() - 1].numpy()
        parts = np.split(scores_BK, np.cumsum([len(sequences.cu_seqlens) - 1 for sequences in asked])[:-1])
        answers = [to_answer(part, request.dtype) for part, request in zip(parts, requests, strict=True)]
        return [{"rewards_BK": answer, "weights_version": np.array(0), **self._identity} for answer in answers]
