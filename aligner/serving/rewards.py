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

    def submit(
        self, prompts: list[str], responses: list[str], metadata: list[dict], sequences: list[list[int]]
    ) -> Future:
        """The future list of what functions and served models give to each response, a list.

        sequences: tokens of prompt and response.
        """
        called = [self._callers.submit(served.score, sequences) for served in self.served]
        return self._worker.submit(self._score, prompts, responses, metadata, called)

    def _score(self, prompts: list[str], responses: list[str], metadata: list[dict], called) -> list[list[float]]:
        columns = [function.score(prompts, responses, metadata) for function in self.functions]
        columns += [future.result() for future in called]
        return [[column[i] for column in columns] for i in range(len(responses))]

    def total(self, given_BF: Tensor, rollout: Rollout) -> Tensor:
        """The sum, (B,) float32, reward units; all ranks call it.

        given_BF: (B, F) float32, reward units, what functions and served models gave.
        """
        columns = [*given_BF.unbind(1)]
        if self.models:
            batch = last_tokens(rollout.tokens_N, rollout.cu_seqlens)
            last = rollout.cu_seqlens[1:].long() - 1
            columns += [model.infer(batch)[last] @ torch.tensor(list(weights)) for model, weights in self.models]
        return torch.stack(columns, 1) @ self.weights


def last_tokens(tokens_N: Tensor, cu_seqlens: Tensor) -> SupervisedBatch:
    """Sequences with the mask on the last token of each: what a reward model reads."""
    mask_N = torch.zeros(len(tokens_N), dtype=torch.bool)
    mask_N[cu_seqlens[1:].long() - 1] = True
    return SupervisedBatch(tokens_N=tokens_N, cu_seqlens=cu_seqlens, action_mask_N=mask_N)
