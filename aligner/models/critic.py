"""The critic: the value of each action token, and its update."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from aligner.models.lora import LoRAConfig
from aligner.models.microbatch import Layout
from aligner.models.network import Network, OptimizerConfig, Stats
from aligner.models.shape import ModelShape
from aligner.models.weights import Reader
from aligner.run.distributed import ParallelConfig


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    layers: int = 6
    """Layers of the policy's initial network that the critic starts from; 0 keeps all."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-3))
    value_clip: float | None = None
    """A value moves at most this far from the old one in a step, reward units; none leaves it out."""

    def shape(self, policy: ModelShape) -> ModelShape:
        """The critic's network. Raises ValueError when the policy has fewer layers."""
        if not 0 <= self.layers <= policy.num_layers:
            raise ValueError(
                f"critic.layers is {self.layers}, expected 0 (all) to {policy.num_layers}, the layers of the model."
            )
        return replace(policy, num_layers=self.layers or policy.num_layers)


class Critic:
    """A language model's network under a linear value head that starts at 0.

    V_t = w . h_{t-1} + b: the value of the state in which token t is chosen, so V_t never sees token t.
    Arguments as of models.network.Network.
    """

    def __init__(
        self,
        shape: ModelShape,
        read: Reader,
        *,
        lora: LoRAConfig,
        optimizer: OptimizerConfig,
        tokens_per_micro_batch: int,
        seed: int,
        parallel: ParallelConfig | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        self.network = Network(
            shape,
            read,
            adapters=lora,
            optimizer=optimizer,
            tokens_per_micro_batch=tokens_per_micro_batch,
            seed=seed,
            parallel=parallel,
            dtype=dtype,
            value_head=zero_head(shape.hidden, 1, bias=True),
        )

    def infer(self, rollout, parts: Sequence[Sequence[int]] | None = None) -> Tensor:
        """values_N of the action tokens, float32, reward units; 0 elsewhere.

        parts: as of models.network.Network.run.
        """
        return self.network.run(rollout, lambda hidden, layout: (self._values(hidden, layout),), 1, parts)[0]

    def update(self, batch, loss: Callable[[Tensor, object], tuple[Tensor, Stats]]) -> Stats:
        """One optimizer step on `loss(values_N, micro_batch) -> (scalar, statistics)`."""
        return self.network.step(
            batch, lambda hidden, layout, micro: loss(layout.packed(self._values(hidden, layout)), micro)
        )

    def _values(self, hidden: Tensor, layout: Layout) -> Tensor:
        return self.network.last.value_head(layout.states(hidden))[:, 0]

    def state_dict(self, *, loading: bool = False) -> dict:
        return self.network.state_dict(loading=loading)

    def load_state_dict(self, state: dict) -> None:
        self.network.load_state_dict(state)


def zero_head(hidden: int, outputs: int, *, bias: bool) -> nn.Linear:
    """A linear layer whose outputs are 0 until it is trained."""
    head = nn.Linear(hidden, outputs, bias=bias)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
    return head
