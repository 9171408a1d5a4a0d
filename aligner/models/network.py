"""A trainable network: Megatron-core's model, gradient buffers, optimizer and schedule; two verbs, run and step."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from aligner.models import cpu, gpt, lora
from aligner.models.microbatch import Layout, split
from aligner.models.shape import ModelShape
from aligner.models.weights import fill, manifest, megatron_entry

Stats = dict[str, Tensor]
Head = Callable[[Tensor, Layout], Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    lr: float = 1e-4
    """Peak learning rate of AdamW."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up from 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay on matrices."""
    beta1: float = 0.9
    """Decay of the gradient's running mean."""
    beta2: float = 0.95
    """Decay of the squared gradient's running mean."""
    eps: float = 1e-8
    """Added to the root of the squared gradient's mean."""
    clip: float = 1.0
    """Global gradient norm is clipped to this."""

    def __post_init__(self):
        if self.lr <= 0 or self.clip <= 0:
            raise ValueError(f"optimizer.lr and optimizer.clip must be above 0, got {self.lr} and {self.clip}.")


class Network:
    """The decoder of `shape` with Hugging Face weights `read(name) -> tensor`, adapters, and an optional value head.

    tokens_per_micro_batch: padded tokens that one forward pass may hold.
    seed: of the adapters' initial values.
    """

    def __init__(
        self,
        shape: ModelShape,
        read: Callable[[str], Tensor],
        *,
        adapters: lora.LoRAConfig,
        optimizer: OptimizerConfig,
        tokens_per_micro_batch: int,
        seed: int,
        value_head: bool = False,
    ):
        if not torch.cuda.is_available():
            cpu.install()
        self.shape, self.tokens_per_micro_batch = shape, tokens_per_micro_batch
        model = gpt.build(shape)
        if value_head and not shape.tied:
            del model.output_layer
        parameters = dict(model.named_parameters())
        self.manifest = manifest(shape.tensors(), [megatron_entry(name, p, shape) for name, p in parameters.items()])
        fill(self.manifest["tensors"], parameters, read)
        self.base = {name: p.detach() for name, p in parameters.items()}
        self.adapters = {}
        if adapters.rank:
            self.adapters = lora.attach(model, adapters, torch.Generator().manual_seed(seed))
        if value_head:
            model.value_head = nn.Linear(shape.hidden, 1)
            nn.init.zeros_(model.value_head.weight)
            nn.init.zeros_(model.value_head.bias)
        self.model = model
        self.ddp = DistributedDataParallel(model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
        self.optimizer = get_megatron_optimizer(
            MegatronOptimizerConfig(
                lr=optimizer.lr,
                min_lr=0.0,
                weight_decay=optimizer.weight_decay,
                adam_beta1=optimizer.beta1,
                adam_beta2=optimizer.beta2,
                adam_eps=optimizer.eps,
                clip_grad=optimizer.clip,
                params_dtype=torch.float32,
            ),
            [self.ddp],
        )
        # Without the scheduler Megatron never applies wd_mult, and norms and biases would decay too.
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=optimizer.lr,
            min_lr=0.0,
            lr_warmup_steps=optimizer.warmup_steps,
            lr_decay_steps=max(optimizer.warmup_steps, 0) + 1,
            lr_decay_style="constant",
            start_wd=optimizer.weight_decay,
            end_wd=optimizer.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
        )

    def micro_batches(self, cu_seqlens: Tensor) -> list[list[int]]:
        """Sequences of each forward pass. Raises ValueError for one that is longer than the model's context."""
        lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
        for i, length in enumerate(lengths):
            if length > self.shape.context:
                raise ValueError(
                    f"sequence {i} has {length} tokens, over the model's context of {self.shape.context}; shorten it."
                )
        return split(lengths, self.tokens_per_micro_batch)

    @torch.no_grad()
    def run(self, rollout, head: Head) -> tuple[Tensor, ...]:
        """Forward only. `head(hidden, layout)` gives (A,) tensors; returns them packed, (N,), 0 outside actions."""
        groups = self.micro_batches(rollout.cu_seqlens)
        micros = [rollout.take(group) for group in groups]

        def loss(hidden: Tensor, layout: Layout, _micro):
            results = [layout.packed(x) for x in head(hidden, layout)]
            return hidden.new_zeros(()), torch.zeros((), dtype=torch.int), results

        outputs = self._schedule(micros, loss, forward_only=True)
        starts = rollout.cu_seqlens.tolist()
        index_N = torch.cat([torch.arange(starts[b], starts[b + 1]) for group in groups for b in group])
        packed = []
        for column in zip(*outputs, strict=True):
            joined = torch.cat(column)
            packed.append(torch.empty_like(joined).index_copy_(0, index_N, joined))
        return tuple(packed)

    def step(self, batch, loss: Callable[[Tensor, Layout, object], tuple[Tensor, Stats]]) -> Stats:
        """One optimizer step: micro-batches, backward, clipping, AdamW. Returns the summed statistics and grad_norm.

        `loss(hidden, layout, micro_batch)` returns a scalar that already divides by the whole step's tokens, and
        statistics that add up over micro-batches. Raises FloatingPointError before the update when the loss or the
        gradient norm is not finite.
        """
        micros = [batch.take(group) for group in self.micro_batches(batch.rollout.cu_seqlens)]
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()

        def with_total(hidden: Tensor, layout: Layout, micro):
            value, stats = loss(hidden, layout, micro)
            return value, torch.zeros((), dtype=torch.int), stats | {"loss": value.detach()}

        outputs = self._schedule(micros, with_total, forward_only=False)
        stats = {name: torch.stack([o[name] for o in outputs]).sum() for name in outputs[0]}
        self.optimizer.prepare_grads()
        stats["grad_norm"] = torch.tensor(float(self.optimizer.get_grad_norm()))
        if not (math.isfinite(stats["loss"]) and math.isfinite(stats["grad_norm"])):
            raise FloatingPointError(
                f"loss {float(stats['loss'])}, gradient norm {float(stats['grad_norm'])}: not finite, so the "
                "update was not applied; lower the learning rate or look at the rewards of this step."
            )
        self.scheduler.step(1)
        self.optimizer.step()
        return stats

    def _schedule(self, micros: list, loss, forward_only: bool) -> list:
        def forward(iterator: Iterator, model: nn.Module):
            micro = next(iterator)
            rollout = getattr(micro, "rollout", micro)
            layout = Layout.of(rollout.tokens_N, rollout.action_mask_N, rollout.cu_seqlens)
            return model(layout.tokens_BS), lambda hidden: loss(hidden, layout, micro)

        return get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter(micros),
            model=self.ddp,
            num_microbatches=len(micros),
            seq_length=self.shape.context,
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def weight(self, name: str) -> Tensor | lora.LowRank:
        """The parameter `name` as it is sampled and exported: under its adapter, which whoever reads it merges."""
        adapter = self.adapters.get(name.removesuffix(".weight"))
        return self.base[name] if adapter is None else adapter.over(self.base[name])

    def state_dict(self) -> dict:
        """What training changes: trainable parameters, optimizer, schedule."""
        trained = {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}
        return {
            "parameters": trained,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Continue from state_dict(). Raises ValueError when the checkpoint trained other parameters."""
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        if {n: p.shape for n, p in trained.items()} != {n: p.shape for n, p in state["parameters"].items()}:
            raise ValueError(
                "the checkpoint trained other parameters than this configuration does; resume with the model and the "
                "lora.* options that the run was started with (see its config.yaml)."
            )
        for name, parameter in trained.items():
            parameter.copy_(state["parameters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
