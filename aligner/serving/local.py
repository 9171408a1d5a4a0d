"""The critic in this process, behind the methods and futures that a remote one has."""

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

from torch import Tensor

from aligner.models.critic import Critic


class LocalCritic:
    """Answers with futures that are already resolved: here the critic and the policy share the same cores."""

    def __init__(self, critic: Critic):
        self.critic = critic

    def infer(self, rollout) -> Future:
        """values_N of the action tokens, float32, reward units."""
        return _now(lambda: self.critic.infer(rollout))

    def train(self, batch, steps: Iterable[list[int]], loss: Callable) -> Future:
        """One optimizer step on each list of sequences; `loss(values_N, micro_batch, num_tokens)`.

        Resolves to a list of statistics, one dict an optimizer step.
        """
        return _now(lambda: [self._step(batch.take(sequences), loss) for sequences in steps])

    def _step(self, mini, loss: Callable) -> dict[str, Tensor]:
        num_tokens = float(mini.weights_N.sum())
        return self.critic.update(mini, lambda values_N, micro: loss(values_N, micro, num_tokens))


def _now(compute: Callable[[], Any]) -> Future:
    future: Future = Future()
    future.set_result(compute())
    return future
