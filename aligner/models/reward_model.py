"""The reward model: one number for a whole response, and its training."""

from collections.abc import Callable

import torch
from torch import Tensor

from aligner.models.lora import LoRAConfig
from aligner.models.microbatch import Layout
from aligner.models.network import Network, OptimizerConfig, Stats
from aligner.models.shape import ModelShape
from aligner.models.weights import Reader
from aligner.run.distributed import ParallelConfig


class RewardModel:
    """A language model's network under a linear head that starts at 0, read after the tokens that the mask names.

    r = w . h_T + b,   T the last token of the response
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
            value_head=True,
            shift=0,
        )

    def infer(self, batch) -> Tensor:
        """scores_N at the tokens of action_mask_N, float32, reward units; 0 elsewhere."""
        return self.network.run(batch, lambda hidden, layout: (self._scores(hidden, layout),), outputs=1)[0]

    def update(self, batch, loss: Callable[[Tensor, object], tuple[Tensor, Stats]]) -> Stats:
        """One optimizer step on `loss(scores_N, micro_batch) -> (scalar, statistics)`."""
        return self.network.step(
            batch, lambda hidden, layout, micro: loss(layout.packed(self._scores(hidden, layout)), micro)
        )

    def _scores(self, hidden: Tensor, layout: Layout) -> Tensor:
        return self.network.last.value_head(layout.states(hidden))[:, 0]
