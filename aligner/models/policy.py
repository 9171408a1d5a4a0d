"""The policy: log-probabilities of its tokens, its update, its weights for the sampler."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from torch import Tensor

from aligner import ops
from aligner.models.linear import linear
from aligner.models.lora import LoRAConfig
from aligner.models.low_rank import LowRank
from aligner.models.microbatch import Layout
from aligner.models.network import Network, OptimizerConfig, Stats
from aligner.models.shape import ModelShape
from aligner.models.sharded import sharded
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
        optimizer: OptimizerConfig | None,
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
        self._has_reference = reference or bool(self.network.adapters)
        # Where all weights are trained the reference's wait in host memory; else it is the model without adapters.
        self._reference_weights: dict[str, Tensor] = {}
        self.reference_moved = False
        if reference and optimizer and not self.network.adapters:
            self._keep_reference()

    def infer(self, rollout, temperature: float | None = None) -> tuple[Tensor, Tensor]:
        """(logprobs_N, entropy_N) of the action tokens, float32, nats; 0 elsewhere.

        temperature: None for the policy's own.
        """
        return self.network.run(rollout, partial(self._logprobs, temperature=temperature), outputs=2)

    def infer_reference(self, rollout) -> Tensor:
        """logprobs_N of the action tokens under the reference, float32, nats: the weights that training started from.

        After move_reference() it is the policy of that moment.
        """
        if not self._has_reference:
            raise ValueError("this policy keeps no reference; make it with reference=True.")
        with self.as_reference():
            return self.network.run(rollout, self._logprobs, outputs=2)[0]

    def update(self, batch, loss: Callable[[Tensor, Tensor, object], tuple[Tensor, Stats]]) -> Stats:
        """One optimizer step on `loss(logprobs_N, entropy_N, micro_batch) -> (scalar, statistics)`."""

        def on_hidden(hidden: Tensor, layout: Layout, micro):
            logprobs_A, entropy_A = self._logprobs(hidden, layout)
            return loss(layout.packed(logprobs_A), layout.packed(entropy_A), micro)

        return self.network.step(batch, on_hidden)

    def update_logits(self, batch, loss: Callable[[Tensor, Tensor, object], tuple[Tensor, Stats]]) -> Stats:
        """One optimizer step on `loss(logits_AV, index_A, micro_batch) -> (scalar, statistics)`.

        logits_AV are of action tokens, whole rows on every rank, and index_A says which of the micro-batch's packed
        tokens they predict. With context parallelism a rank has some of them: loss and statistics are added up.
        """

        def on_hidden(hidden: Tensor, layout: Layout, micro):
            value, stats = loss(self._logits(hidden, layout), layout.action_index, micro)
            return layout.total(value), {name: layout.total(x) for name, x in stats.items()}

        return self.network.step(batch, on_hidden)

    def infer_logits(self, batch, loss: Callable[[Tensor, Tensor, object], tuple[Tensor, Stats]]) -> Stats:
        """The statistics of such a loss, without an update."""

        def on_hidden(hidden: Tensor, layout: Layout, micro):
            _, stats = loss(self._logits(hidden, layout), layout.action_index, micro)
            return {name: layout.total(x) for name, x in stats.items()}

        return self.network.measure(batch, on_hidden)

    def infer_top_k(self, batch, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """(topk_ids_NK int64, topk_logits_NK float32, log_sum_N float32) of the action tokens; 0 elsewhere.

        The k largest logits of each, in falling order, and log sum_v exp(logit_v / temperature) over all of them.
        """

        def head(hidden: Tensor, layout: Layout) -> tuple[Tensor, ...]:
            logits_AV = self._logits(hidden, layout).float()
            top = logits_AV.topk(k)
            return *top.indices.float().unbind(1), *top.values.unbind(1), (logits_AV / temperature).logsumexp(1)

        columns = self.network.run(batch, head, outputs=2 * k + 1)  # float32 holds every token id exactly
        return torch.stack(columns[:k], 1).long(), torch.stack(columns[k : 2 * k], 1), columns[-1]

    def _logits(self, hidden: Tensor, layout: Layout) -> Tensor:
        """(A, V) logits of the action tokens, the whole vocabulary on every rank."""
        states_AH, weight_VH = layout.states(hidden), self._output_weight()
        if parallel_state.get_tensor_model_parallel_world_size() == 1:
            return linear(states_AH, weight_VH)
        return gather_from_tensor_model_parallel_region(
            linear(copy_to_tensor_model_parallel_region(states_AH), weight_VH)
        )

    def _output_weight(self) -> Tensor:
        last = self.network.last
        return last.shared_embedding_or_output_weight() if self.shape.tied else last.output_layer.weight

    def _logprobs(self, hidden: Tensor, layout: Layout, temperature: float | None = None) -> tuple[Tensor, Tensor]:
        group = parallel_state.get_tensor_model_parallel_group()
        return ops.linear_logprobs(
            layout.states(hidden),
            self._output_weight(),
            layout.action_tokens,
            temperature=temperature or self.temperature,
            group=group if group.size() > 1 else None,
        )

    def move_reference(self) -> None:
        """The policy as it is now becomes the reference. Checkpoints hold it from then on."""
        self._keep_reference()
        self.reference_moved = True

    def _keep_reference(self) -> None:
        self._reference_weights = {n: p.detach().to("cpu", copy=True) for n, p in self._trained()}

    def _trained(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, p) for name, p in self.network.parameters.items() if p.requires_grad)

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Within it the policy is its reference, for whoever reads its weights: those swapped in, or LoRA off."""
        parameters, adapters = self.network.parameters, self.network.adapters.values()
        trained = {name: parameters[name].detach().clone() for name in self._reference_weights}
        for adapter in adapters:
            adapter.enabled = bool(self._reference_weights)
        with torch.no_grad():
            for name, tensor in self._reference_weights.items():
                parameters[name].copy_(tensor)
        try:
            yield
        finally:
            for adapter in adapters:
                adapter.enabled = True
            with torch.no_grad():
                for name, tensor in trained.items():
                    parameters[name].copy_(tensor)

    def manifest(self) -> dict:
        """The parameters that the sampler needs, in Hugging Face coordinates (see models.weights)."""
        return self.network.manifest

    def weights(self, names: Iterable[str]) -> list[Tensor | LowRank]:
        """These parameters of the manifest, each with its adapter beside it."""
        return [self.network.weight(name) for name in names]

    def hugging_face(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of the Hugging Face checkpoint of the policy as it stands, adapters merged in.

        Every rank exhausts it; the first one gets the tensors (models.weights.export).
        """
        return export(self.manifest()["tensors"], self.network.weight, self.shape, dtype=self.network.dtype)

    def state_dict(self, *, loading: bool = False) -> dict:
        """As of Network.state_dict, with the reference once it has moved: then call move_reference() before loading."""
        state = self.network.state_dict(loading=loading)
        if self.reference_moved:
            for name, parameter in self._trained():  # which part of the whole each is
                for attribute in ("tensor_model_parallel", "partition_dim", "partition_stride", "shared"):
                    if hasattr(parameter, attribute):
                        setattr(self._reference_weights[name], attribute, getattr(parameter, attribute))
            state["reference"] = sharded(self._reference_weights.items(), prefix="reference.")
        return state

    def load_state_dict(self, state: dict) -> None:
        self.network.load_state_dict(state)
        for name, values in state.get("reference", {}).items():
            self._reference_weights[name].copy_(values)
