"""The policy: log-probabilities of its tokens, its update, its weights for the sampler."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from megatron.core import parallel_state
from torch import Tensor

from aligner import ops
from aligner.models.lora import LoRAConfig, LowRank
from aligner.models.microbatch import Layout
from aligner.models.network import Network, OptimizerConfig, Stats
from aligner.models.shape import ModelShape
from aligner.models.weights import Reader, export
from aligner.run.distributed import ParallelConfig


class Policy:
    """A causal language model that is trained. Arguments as of models.network.Network.

    temperature: dimensionless, > 0. The one that its responses are sampled with.
    reference: whether infer_reference will be asked for; without it no copy of the initial weights is kept.
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
        temperature: float = 1.0,
        reference: bool = True,
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
        )
        self.shape, self.temperature = shape, temperature
        # Where all weights are trained the reference's wait in host memory.
        self._has_reference, copied = reference or bool(lora.rank), reference and not lora.rank
        self._initial = {n: p.to("cpu", copy=True) for n, p in self.network.base.items()} if copied else {}

    def infer(self, rollout) -> tuple[Tensor, Tensor]:
        """(logprobs_N, entropy_N) of the action tokens, float32, nats; 0 elsewhere."""
        return self.network.run(rollout, self._logprobs, outputs=2)

    def infer_reference(self, rollout) -> Tensor:
        """logprobs_N of the action tokens under the weights that training started from, float32, nats."""
        if not self._has_reference:
            raise ValueError("this policy keeps no reference; make it with reference=True.")
        with self._reference():
            return self.network.run(rollout, self._logprobs, outputs=2)[0]

    def update(self, batch, loss: Callable[[Tensor, Tensor, object], tuple[Tensor, Stats]]) -> Stats:
        """One optimizer step on `loss(logprobs_N, entropy_N, micro_batch) -> (scalar, statistics)`."""

        def on_hidden(hidden: Tensor, layout: Layout, micro):
            logprobs_A, entropy_A = self._logprobs(hidden, layout)
            return loss(layout.packed(logprobs_A), layout.packed(entropy_A), micro)

        return self.network.step(batch, on_hidden)

    def _logprobs(self, hidden: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        last = self.network.last
        weight_VH = last.shared_embedding_or_output_weight() if self.shape.tied else last.output_layer.weight
        group = parallel_state.get_tensor_model_parallel_group()
        return ops.linear_logprobs(
            layout.states(hidden),
            weight_VH,
            layout.action_tokens,
            temperature=self.temperature,
            group=group if group.size() > 1 else None,
        )

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
        """(name, tensor) of the Hugging Face checkpoint of the policy as it stands, adapters merged in.

        Every rank exhausts it; the first one gets the tensors (models.weights.export).
        """
        return export(self.manifest()["tensors"], self.weight, self.shape, dtype=self.network.dtype)

    def state_dict(self, *, loading: bool = False) -> dict:
        return self.network.state_dict(loading=loading)

    def load_state_dict(self, state: dict) -> None:
        self.network.load_state_dict(state)
