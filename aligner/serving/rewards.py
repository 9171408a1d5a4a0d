"""What a run's responses are worth: callables and reward models, here or served, each with a weight."""

from collections.abc import Sequence
from concurrent.futures import Future

import torch
from torch import Tensor

from aligner.data.batch import Rollout, SupervisedBatch
from aligner.models.reward_model import RewardModel
from aligner.run.background import Background
from aligner.serving.remote import RemoteReward
from aligner.serving.reward import RewardFunction
from aligner.serving.service import resolved

AT_ONCE = 8  # requests to served reward models


class Rewards:
    """A weighted sum of rewards; functions and served models are asked while others are sampled, models here after it.

    functions, served: on the ranks that sample; empty on the others.
    models: on all ranks, each with the weights of its attributes.
    weights: of the functions, then of the served models, then of the models here.
    """

    def __init__(
        self,
        functions: Sequence[RewardFunction],
        models: Sequence[tuple[RewardModel, Sequence[float]]],
        weights: Sequence[float],
        served: Sequence[RemoteReward] = (),
    ):
        self.functions, self.models, self.weights = list(functions), list(models), torch.tensor(list(weights))
        self.served = list(served)
        self._worker = Background("rewards")
        self._callers = Background("served-rewards", AT_ONCE)

    def submit(self, prompts: list[str], responses: list[str], metadata: list[dict]) -> Future:
        """The future list of what the functions give to each response, a list."""
        return self._worker.submit(self._score, prompts, responses, metadata)

    def _score(self, prompts: list[str], responses: list[str], metadata: list[dict]) -> list[list[float]]:
        columns = [function.score(prompts, responses, metadata) for function in self.functions]
        return [[column[i] for column in columns] for i in range(len(responses))]

    def ahead(self, part: Rollout) -> Future:
        """The future list of what the served models give to each response, a list."""
        if not self.served:
            return resolved([[] for _ in part.finished_B])
        return self._callers.submit(self._ask, part)

    def _ask(self, part: Rollout) -> list[list[float]]:
        sequences = [tokens.tolist() for tokens in part.tokens_N.tensor_split(part.cu_seqlens[1:-1].long())]
        return list(map(list, zip(*[served.score(sequences) for served in self.served], strict=True)))

    def total(self, given_BF: Tensor, rollout: Rollout, parts: list[list[int]] | None = None) -> Tensor:
        """The sum, (B,) float32, reward units; all ranks call it.

        given_BF: (B, F) float32, reward units, what functions and served models gave.
        parts: for the models here, as of models.network.Network.run.
        """
        columns = [*given_BF.unbind(1)]
        if self.models:
            batch = last_tokens(rollout.tokens_N, rollout.cu_seqlens)
            last = rollout.cu_seqlens[1:].long() - 1
            for model, weights in self.models:
                columns.append(model.infer(batch, parts)[last] @ torch.tensor(list(weights)))
        return torch.stack(columns, 1) @ self.weights


def last_tokens(tokens_N: Tensor, cu_seqlens: Tensor) -> SupervisedBatch:
    """Sequences with the mask on the last token of each: what a reward model reads."""
    mask_N = torch.zeros(len(tokens_N), dtype=torch.bool)
    mask_N[cu_seqlens[1:].long() - 1] = True
    return SupervisedBatch(tokens_N=tokens_N, cu_seqlens=cu_seqlens, action_mask_N=mask_N)
