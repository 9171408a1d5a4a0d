"""A trainable network: Megatron-core's model, gradient buffers, optimizer and schedule; two verbs, run and step.

On every layout each rank is given the same whole batch and gets the same whole result: which sequences, layers, heads
and tokens it computes is decided here.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import clip_grads, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch import Tensor, nn

from aligner.models import cpu, gpt, lora, optimizer_state
from aligner.models.attention import Segments
from aligner.models.microbatch import Layout, deal, deal_parts
from aligner.models.offload import Offload
from aligner.models.parallel import check
from aligner.models.shape import ModelShape
from aligner.models.sharded import sharded
from aligner.models.weights import Reader, fill, manifest, megatron_axis, megatron_entry
from aligner.run.distributed import ParallelConfig

Stats = dict[str, float]
Head = Callable[[Tensor, Layout], Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    lr: float = 1e-4
    """Peak learning rate of AdamW."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up from 0."""
    decay_steps: int = 0
    """Optimizer steps, warm-up included, until the learning rate is at min_lr; 0 keeps it constant."""
    decay: Literal["cosine", "linear"] = "cosine"
    """How it falls."""
    min_lr: float = 0.0
    """Where it ends."""
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
    non_finite: Literal["stop", "skip"] = "stop"
    """When the loss or the gradient is not finite: end the run, or leave this update out, on every rank."""

    def __post_init__(self):
        if self.lr <= 0 or self.clip <= 0:
            raise ValueError(f"optimizer.lr and optimizer.clip must be above 0, got {self.lr} and {self.clip}.")
        if self.decay_steps and self.decay_steps <= self.warmup_steps:
            raise ValueError(
                f"optimizer.decay-steps is {self.decay_steps}, expected 0 or more than warmup-steps, which is "
                f"{self.warmup_steps}."
            )


class Network:
    """The decoder of `shape` with the Hugging Face weights of `read`, adapters, and an optional value head.

    tokens_per_micro_batch: tokens of all sequences in one forward pass; a longer sequence stands alone.
    optimizer: None for a network that is never trained, which then has no adapters and no gradient buffers.
    seed: of the adapters' initial values.
    parallel: the layout, which run.distributed.initialize was given too.
    dtype: float32, or bfloat16 with float32 masters in the optimizer.
    value_head: the last linear layer, in place of the output layer.
    shift: 1 reads the state that predicts an action token, 0 the state after it.
    """

    def __init__(
        self,
        shape: ModelShape,
        read: Reader,
        *,
        adapters: lora.LoRAConfig,
        optimizer: OptimizerConfig | None,
        tokens_per_micro_batch: int,
        seed: int,
        parallel: ParallelConfig | None = None,
        dtype: torch.dtype = torch.float32,
        value_head: nn.Linear | None = None,
        shift: int = 1,
    ):
        if not torch.cuda.is_available():
            cpu.install()
        self.shape, self.tokens_per_micro_batch, self.shift = shape, tokens_per_micro_batch, shift
        self.parallel, self.non_finite = parallel or ParallelConfig(), optimizer and optimizer.non_finite
        check(self.parallel, shape)
        model_parallel_cuda_manual_seed(seed)  # nothing is drawn from it, but Megatron wants it under sequence parallel
        self.dtype = dtype
        self.device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
        self.chunks = gpt.build(shape, self.parallel, dtype=dtype, output_layer=value_head is None)
        self.last = self.chunks[-1] if self.chunks[-1].post_process else None  # the chunk that the heads read
        base = {name: p.detach() for name, p in self._named("parameters")}
        self.manifest = manifest(shape.tensors(), [self._entry(name, p) for name, p in base.items()])
        fill(self.manifest["tensors"], base, read)
        for name, p in self._named("parameters"):
            axis = megatron_axis(name, shape)
            # Megatron sets these where it draws initial weights, and without them it counts one rank's gradient norm.
            if axis is not None and not hasattr(p, "tensor_model_parallel"):
                set_tensor_model_parallel_attributes(p, True, axis, 1)
        self.adapters = {}
        if adapters.rank and optimizer:
            linears = dict(self._named("modules"))
            self.adapters = lora.attach(linears, adapters, sequence=self.parallel.sequence, seed=seed)
            for name, p in self._named("parameters"):
                p.requires_grad_(name not in base)
        if value_head is not None and self.last:
            self.last.value_head = value_head.to(dtype)
        for chunk in self.chunks:
            chunk.to(self.device)
        self._start_training(optimizer)
        self.parameters = dict(self._named("parameters"))
        self.base = {name: self.parameters[name].detach() for name in base}  # which the buffers may have moved

    def _start_training(self, config: OptimizerConfig | None) -> None:
        """Gradient buffers, optimizer, schedule."""
        self.ddp, self.optimizer = self.chunks, None
        if config is None:
            for chunk in self.chunks:
                chunk.requires_grad_(False)
        else:
            self.ddp = [_buffered(chunk, self.parallel) for chunk in self.chunks]
            self.optimizer, self.scheduler = _optimizer(config, self.parallel, self.dtype, self.ddp)
            optimizer_state.start(self.optimizer)
        self.offload = Offload(self.ddp, self.optimizer)

    def _named(self, kind: str) -> Iterator[tuple[str, Tensor | nn.Module]]:
        """(name, parameter or module) of this rank's chunks, layers counted over the whole network."""
        for chunk in self.chunks:
            for name, item in getattr(chunk, f"named_{kind}")():
                if name.startswith("decoder.layers."):
                    local, _, rest = name.removeprefix("decoder.layers.").partition(".")
                    layer = chunk.decoder.layers[int(local)].layer_number - 1
                    name = f"decoder.layers.{layer}.{rest}"
                yield name, item

    def _entry(self, name: str, parameter: Tensor) -> dict:
        rank = parallel_state.get_tensor_model_parallel_rank()
        return megatron_entry(name, parameter, self.shape, rank=rank, ranks=self.parallel.tensor)

    def _micro_batches(self, batch, parts: Sequence[Sequence[int]] | None = None) -> list[list[int]]:
        """Sequences of each of this data-parallel rank's micro-batches, some of which may be empty.

        parts: as of run(). Raises ValueError for a sequence that is longer than the model's context.
        """
        cu_seqlens = _sequences(batch).cu_seqlens
        lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
        for i, length in enumerate(lengths):
            if length > self.shape.context:
                raise ValueError(
                    f"sequence {i} has {length} tokens, over the model's context of {self.shape.context}; shorten it."
                )
        ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
        shared = {
            "quadratic": self.shape.heads * self.shape.head_dim / self.shape.layer_weights(),
            "multiple": self.parallel.pipeline if self.parallel.virtual_pipeline > 1 else 1,
        }
        if parts is not None:
            return deal_parts(lengths, parts, ranks, self.tokens_per_micro_batch, **shared)[rank]
        n = batch.together
        units = [sum(lengths[i : i + n]) for i in range(0, len(lengths), n)]
        mine = deal(units, ranks, self.tokens_per_micro_batch, **shared)[rank]
        return [[i * n + j for i in units for j in range(n)] for units in mine]

    @torch.no_grad()
    def run(
        self, rollout, head: Head, outputs: int, parts: Sequence[Sequence[int]] | None = None
    ) -> tuple[Tensor, ...]:
        """Forward only. `head(hidden, layout)` gives `outputs` (A,) tensors; returns them packed on the CPU.

        Each is (N,) float32 and 0 outside of action tokens, the same on every rank.
        parts: sequence indices; those of two parts share no micro-batch, so that a part's numbers do not depend on what
            else is asked for. None packs all of them as tightly as it can.
        """
        groups = self._micro_batches(rollout, parts)

        def loss(hidden: Tensor, layout: Layout, _micro):
            return hidden.new_zeros(()), torch.stack([layout.packed(x.float()) for x in head(hidden, layout)])

        columns = torch.zeros(outputs, len(_sequences(rollout).tokens_N))
        starts = _sequences(rollout).cu_seqlens.tolist()
        filled = [group for group in groups if group]
        outputs_A = self._schedule(self._prepared(rollout, groups), loss, forward_only=True)
        for group, values in zip(filled, outputs_A, strict=False):  # only the last stage has values
            index_N = torch.cat([torch.arange(starts[b], starts[b + 1]) for b in group])
            columns.index_copy_(1, index_N, values.cpu())
        return self._sum_over_ranks(columns).unbind()

    @torch.no_grad()
    def measure(self, batch, statistics: Callable[[Tensor, Layout, object], dict[str, Tensor]]) -> Stats:
        """Forward only: sums over micro-batches and ranks of what `statistics(hidden, layout, micro_batch)` returns."""

        def loss(hidden: Tensor, layout: Layout, micro):
            return hidden.new_zeros(()), statistics(hidden, layout, micro)

        return self._add_up(self._schedule(self._prepared(batch, self._micro_batches(batch)), loss, forward_only=True))

    def step(self, batch, loss: Callable[[Tensor, Layout, object], tuple[Tensor, dict[str, Tensor]]]) -> Stats:
        """One optimizer step: micro-batches, backward, clipping, AdamW.

        `loss(hidden, layout, micro_batch)` returns a scalar that already divides by the whole step's tokens, and
        statistics that add up over micro-batches. Returns their sums over all ranks, with loss, grad_norm and padding,
        the share of the computed tokens that were padding. Raises FloatingPointError on every rank, before the update,
        when the loss or the gradient norm is not finite; with optimizer.non_finite "skip" there is no update, and
        `skipped` is 1.
        """
        self.offload.come_back()
        for ddp in self.ddp:
            ddp.zero_grad_buffer()
        self.optimizer.zero_grad()

        def with_total(hidden: Tensor, layout: Layout, micro):
            value, stats = loss(hidden, layout, micro)
            return value, stats | {"loss": value.detach()}

        micros = self._prepared(batch, self._micro_batches(batch))
        outputs = self._schedule(micros, with_total, forward_only=False)
        rows = sum(len(m.layout.tokens_T) for m in micros) * self.parallel.context
        stats = self._add_up([*outputs, {"rows": rows, "tokens": sum(m.layout.num_packed for m in micros)}])
        stats["padding"] = 1 - stats.pop("tokens") / stats.pop("rows")
        self.optimizer.prepare_grads()
        stats["grad_norm"] = float(self.optimizer.get_grad_norm())
        if not (math.isfinite(stats["loss"]) and math.isfinite(stats["grad_norm"])):
            if self.non_finite == "skip":
                return stats | {"skipped": 1.0}
            raise FloatingPointError(
                f"loss {stats['loss']}, gradient norm {stats['grad_norm']}: not finite, so the "
                "update was not applied; lower the learning rate or look at the rewards of this step."
            )
        self.scheduler.step(1)
        self._clip(stats["grad_norm"])
        self.optimizer.step_with_ready_grads()
        return stats | {"skipped": 0.0}

    def _clip(self, norm: float) -> None:
        """As the optimizer's step() does, which would prepare the gradients and ask all ranks for their norm again."""
        for single in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
            clip_grads.clip_grad_by_total_norm_fp32(single.get_parameters(), single.config.clip_grad, norm)

    def _prepared(self, batch, groups: list[list[int]]) -> list["_MicroBatch"]:
        micros = []
        for group in groups:
            micro = batch.take(group).to(self.device) if group else None
            layout = Layout.of(
                None if micro is None else _sequences(micro),
                context_group=parallel_state.get_context_parallel_group(),
                tensor=self.parallel.tensor if self.parallel.sequence else 1,
                shift=self.shift,
            )
            layout = layout.to(self.device)
            segments = Segments.of(layout, self.dtype)
            micros.append(_MicroBatch(batch=micro, layout=layout, segments=segments))
        return micros

    def _schedule(self, micros: list["_MicroBatch"], loss, forward_only: bool) -> list:
        """Megatron's schedule; what `loss` returns second, of micro-batches that are not empty, on the last stage."""

        def forward(iterator: Iterator, model: nn.Module):
            micro = next(iterator)

            def on_hidden(hidden: Tensor):
                empty = micro.batch is None
                value, result = (0 * hidden.sum(), None) if empty else loss(hidden, micro.layout, micro.batch)
                return value, torch.zeros((), dtype=torch.int), result

            return model(micro.layout, micro.segments), on_hidden

        self.offload.weights_come_back()
        many = len(self.ddp) > 1
        results = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=[iter(micros) for _ in self.ddp] if many else iter(micros),
            model=self.ddp if many else self.ddp[0],
            num_microbatches=len(micros),
            seq_length=self.shape.context,
            micro_batch_size=1,
            forward_only=forward_only,
        )
        return [r for r in results if r is not None]

    def _reports(self) -> bool:
        """Whether this rank's results count: each one is known to every tensor and context rank of the last stage."""
        ranks = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_context_parallel_rank()
        return self.last is not None and ranks == (0, 0)

    def _sum_over_ranks(self, x: Tensor) -> Tensor:
        """x of the ranks that report, added up, on every rank."""
        if dist.get_world_size() == 1:
            return x
        x = (x if self._reports() else torch.zeros_like(x)).to(self.device)
        dist.all_reduce(x)
        return x.cpu()

    def _add_up(self, outputs: list[dict[str, Tensor | float]]) -> Stats:
        """Sums over micro-batches and ranks, on every rank, although only some know what there is to report."""
        mine: Stats = {}
        for output in outputs:
            for name, value in output.items():
                mine[name] = mine.get(name, 0.0) + float(value)
        everyone = [mine]
        if dist.get_world_size() > 1:
            everyone = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, mine if self._reports() else {})
        names = dict.fromkeys(name for stats in everyone for name in stats)
        return {name: sum(stats.get(name, 0.0) for stats in everyone) for name in names}

    def weight(self, name: str) -> Tensor | lora.LowRank:
        """The parameter `name` as it is sampled and exported: under its adapter, which whoever reads it merges."""
        adapter = self.adapters.get(name.removesuffix(".weight"))
        return adapter.over(self.base[name]) if adapter and adapter.enabled else self.base[name]

    def state_dict(self, *, loading: bool = False) -> dict:
        """What training changes, as checkpoint.training saves it, or with `loading` reads it: on any layout.

        Trainable parameters, optimizer, schedule. Every rank calls it.
        """
        self.offload.come_back()
        parameters = sharded((name, p) for name, p in self.parameters.items() if p.requires_grad)
        return {
            "parameters": parameters,
            "optimizer": optimizer_state.sharded(self.optimizer, parameters, loading=loading),
            "scheduler": self.scheduler.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Continue from what checkpoint.training has loaded."""
        for name, values in state["parameters"].items():
            self.parameters[name].copy_(values)
        optimizer_state.load(self.optimizer, state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])


@dataclass(frozen=True, kw_only=True)
class _MicroBatch:
    batch: object  # None where there is only padding
    layout: Layout
    segments: Segments


def _sequences(batch):
    """The part of a batch that holds tokens_N, cu_seqlens and action_mask_N."""
    return getattr(batch, "rollout", batch)


def _buffered(chunk: nn.Module, parallel: ParallelConfig) -> DistributedDataParallel:
    fixed = {"grad_reduce_in_fp32": True, "overlap_param_gather": False}  # a refit reads what a step has left
    config = DistributedDataParallelConfig(**fixed, use_distributed_optimizer=parallel.distributed_optimizer)
    return DistributedDataParallel(chunk.config, config, chunk)


def _optimizer(config: OptimizerConfig, parallel: ParallelConfig, dtype: torch.dtype, chunks: list[nn.Module]):
    """AdamW and its schedule."""
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.beta1,
            adam_beta2=config.beta2,
            adam_eps=config.eps,
            clip_grad=config.clip,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=parallel.distributed_optimizer,
        ),
        chunks,
    )
    # Without the scheduler Megatron never applies wd_mult, and norms and biases would decay too.
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=config.decay_steps or config.warmup_steps + 1,
        lr_decay_style=config.decay if config.decay_steps else "constant",
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    return optimizer, scheduler
