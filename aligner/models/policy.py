"""The policy: log-probabilities of its tokens, its update, its weights for the sampler."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from aligner import ops
from aligner.models.lora import LoRAConfig, LowRank
from aligner.models.microbatch import Layout
from aligner.models.network import Network, OptimizerConfig, Stats
from aligner.models.shape import ModelShape
from aligner.models.weights import export


class Policy:
    """A causal language model that is trained. Arguments as of models.network.Network.

    temperature: dimensionless, > 0. The one that its responses are sampled with.
    """

    def __init__(
        self,
        shape: ModelShape,
        read: Callable[[str], Tensor],
        *,
        lora: LoRAConfig,
        optimizer: OptimizerConfig,
        tokens_per_micro_batch: int,
        seed: int,
        temperature: float = 1.0,
    ):
        self.network = Network(
            shape, read, adapters=lora, optimizer=optimizer, tokens_per_micro_batch=tokens_per_micro_batch, seed=seed
        )
        self.shape, self.temperature = shape, temperature
        self._initial = {} if lora.rank else {name: p.clone() for name, p in self.network.base.items()}

    def infer(self, rollout) -> tuple[Tensor, Tensor]:
        """(logprobs_N, entropy_N) of the action tokens, float32, nats; 0 elsewhere."""
        return self.network.run(rollout, self._logprobs)

    def infer_reference(self, rollout) -> Tensor:
        """logprobs_N of the action tokens under the weights that training started from, float32, nats."""
        with self._reference():
            return self.network.run(rollout, self._logprobs)[0]

    def update(self, batch, loss: Callable[[Tensor, Tensor, object], tuple[Tensor, Stats]]) -> Stats:
        """One optimizer step on `loss(logprobs_N, entropy_N, micro_batch) -> (scalar, statistics)`."""

        def on_hidden(hidden: Tensor, layout: Layout, micro):
            logprobs_A, entropy_A = self._logprobs(hidden, layout)
            return loss(layout.packed(logprobs_A), layout.packed(entropy_A), micro)

        return self.network.step(batch, on_hidden)

    def _logprobs(self, hidden: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        model = self.network.model
        weight_VH = model.shared_embedding_or_output_weight() if self.shape.tied else model.output_layer.weight
        hidden_AH = layout.predictors(hidden)
        return ops.linear_logprobs(hidden_AH, weight_VH, layout.action_tokens, temperature=self.temperature)

    @contextmanager
    def _reference(self) -> Iterator[None]:
        """LoRA off, or the initial weights swapped in."""
        adapters, base, initial = self.network.adapters.values(), self.network.base, self._initial
        for adapter in adapters:
            adapter.enabled = False
        trained = {name: base[name].clone() for name in initial}
        with torch.no_grad():
            for name, tensor in initial.items():
                base[name].copy_(tensor)
        try:
            yield
        finally:
            for adapter in adapters:
                adapter.enabled = True
            with torch.no_grad():
                for name, tensor in trained.items():
                    base[name].copy_(tensor)

    def manifest(self) -> dict:
        """The parameters that the sampler needs, in Hugging Face coordinates (see models.weights)."""
        return self.network.manifest

    def weight(self, name: str) -> Tensor | LowRank:
        """The parameter `name` of the manifest, with its adapter beside it."""
        return self.network.weight(name)

    def hugging_face(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of the Hugging Face checkpoint of the policy as it stands, adapters merged in."""

        def read(name: str) -> Tensor:
            weight = self.weight(name)
            return weight.merged() if isinstance(weight, LowRank) else weight

        return export(self.manifest()["tensors"], read, self.shape)

    def state_dict(self) -> dict:
        return self.network.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.network.load_state_dict(state)
