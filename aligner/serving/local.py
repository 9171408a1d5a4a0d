"""The critic in this process, behind the methods and futures that a remote one has."""

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import partial
from typing import Any

from aligner.data.batch import Rollout
from aligner.losses.value import clipped_value_loss
from aligner.models.critic import Critic
from aligner.models.network import Stats
from aligner.run.distributed import gather_lists


class LocalCritic:
    """Answers with futures that are already resolved: here the critic and the policy share the same cores.

    value_clip: of the loss (models.critic.CriticConfig).
    """

    def __init__(self, critic: Critic, value_clip: float | None):
        self.critic, self._clip = critic, value_clip
        self.networks = (critic.network,)
        self.state_dict, self.load_state_dict = critic.state_dict, critic.load_state_dict

    def ahead(self, _part: Rollout) -> None:
        """Nothing: policy and critic take turns here, and the policy samples."""

    def infer(self, rollout: Rollout, asked: list[tuple[list[int], None]]) -> Future:
        """values_N of the action tokens, float32, reward units.

        asked: (sequences, what ahead() gave) of each part that this rank sampled.
        """
        shares = gather_lists(lambda: [sequences for sequences, _ in asked])
        return _now(lambda: self.critic.infer(rollout, shares))

    def train(self, batch, steps: Iterable[list[int]]) -> Future:
        """One optimizer step on each list of sequences of a data.batch.ValueBatch.

        Resolves to a list of statistics, one dict an optimizer step.
        """
        return _now(lambda: [self._step(batch.take(sequences)) for sequences in steps])

    def _step(self, mini) -> Stats:
        num_tokens = float(mini.weights_N.sum())
        loss = partial(clipped_value_loss, num_tokens=num_tokens, clip=self._clip)
        return self.critic.update(mini, lambda values_N, micro: loss(values_N, micro))


def _now(compute: Callable[[], Any]) -> Future:
    future: Future = Future()
    future.set_result(compute())
    return future
