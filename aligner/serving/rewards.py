"""What a run's responses are worth: callables and reward models, each with a weight."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from aligner.data.batch import Rollout, SupervisedBatch
from aligner.models.reward_model import RewardModel
from aligner.serving.reward import RewardFunction


class Rewards:
    """A weighted sum of rewards; functions are asked while others are still sampled, models once all are there.

    functions: on the ranks that sample; empty on the others.
    models: on all ranks, each with the weights of its attributes.
    weights: of the functions, then of the models.
    """

    def __init__(
        self,
        functions: Sequence[RewardFunction],
        models: Sequence[tuple[RewardModel, Sequence[float]]],
        weights: Sequence[float],
    ):
        self.functions, self.models, self.weights = list(functions), list(models), torch.tensor(list(weights))
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rewards")

    def submit(self, prompts: list[str], responses: list[str], metadata: list[dict]) -> Future:
        """The future list of what every function gives to each response, a list."""
        return self._worker.submit(self._score, prompts, responses, metadata)

    def _score(self, prompts: list[str], responses: list[str], metadata: list[dict]) -> list[list[float]]:
        columns = [function.score(prompts, responses, metadata) for function in self.functions]
        return [[column[i] for column in columns] for i in range(len(responses))]

    def total(self, given_BF: Tensor, rollout: Rollout) -> Tensor:
        """The sum, (B,) float32, reward units; all ranks call it.

        given_BF: (B, F) float32, reward units, what the functions gave.
        """
        columns = [*given_BF.unbind(1)]
        if self.models:
            batch = last_tokens(rollout)
            last = rollout.cu_seqlens[1:].long() - 1
            columns += [model.infer(batch)[last] @ torch.tensor(list(weights)) for model, weights in self.models]
        return torch.stack(columns, 1) @ self.weights


def last_tokens(rollout: Rollout) -> SupervisedBatch:
    """The rollout's sequences with the mask on the last token of each: what a reward model reads."""
    mask_N = torch.zeros_like(rollout.action_mask_N)
    mask_N[rollout.cu_seqlens[1:].long() - 1] = True
    return SupervisedBatch(tokens_N=rollout.tokens_N, cu_seqlens=rollout.cu_seqlens, action_mask_N=mask_N)
