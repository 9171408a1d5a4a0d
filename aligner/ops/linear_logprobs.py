"""Log-probability of each token and entropy of its distribution, from the last hidden states."""

# Shape suffixes: N packed tokens, H hidden, V vocabulary (of this rank's shard).

import functools
import importlib.util

import torch
import torch.distributed as dist
from torch import Tensor

from aligner.ops import library, vocab_parallel
from aligner.ops.logprobs import DTYPES, logprobs_reference

TRITON_DTYPES = (torch.float32, torch.bfloat16)  # a float16 gradient of logits would underflow
TRITON = importlib.util.find_spec("triton") is not None  # imported only where it is used: it takes a second


def linear_logprobs_reference(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    *,
    mask_N: Tensor | None = None,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """`linear_logprobs` in plain PyTorch, with all the logits in memory: any device, any float dtype."""
    if hidden_NH.dtype != torch.float64:
        hidden_NH, weight_VH = hidden_NH.float(), weight_VH.float()
    if mask_N is not None:
        hidden_NH, targets_N = torch.where(mask_N[:, None], hidden_NH, 0), torch.where(mask_N, targets_N, 0)
    if group is not None:
        hidden_NH = vocab_parallel.SumGradient.apply(hidden_NH, group)
    logits_NV = hidden_NH @ weight_VH.T
    logprobs_N, entropy_N = logprobs_reference(logits_NV, targets_N, temperature=temperature, group=group)
    if mask_N is not None:
        logprobs_N, entropy_N = logprobs_N * mask_N, entropy_N * mask_N
    return logprobs_N, entropy_N


def linear_logprobs(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    *,
    mask_N: Tensor | None = None,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    r"""Log-probability of each row's target and entropy of each row, never holding the (N, V) logits.

        logprob_n = z_{n, target} - log sum_v e^{z_{n,v}},    H_n = -sum_v p_{n,v} log p_{n,v}
        z = hidden @ weight^T / temperature

    Source: Wijmans et al. 2024, arXiv:2411.09009, section 4: the logits are made a tile at a time, twice.

    hidden_NH: (N, H) float32, bfloat16 or, not with triton, float16, dimensionless. Gradients flow to it.
    weight_VH: (V, H) of the same dtype, dimensionless. Gradients flow to it when it asks for them.
    targets_N: (N,) int64, token ids of the whole vocabulary.
    mask_N: (N,) bool, or None for all. A row left out costs nothing and gives 0, whatever it holds.
    temperature: dimensionless, > 0.
    group: ranks that hold the rows of weight, equal contiguous shards in rank order; None when not sharded.
    impl: "auto" | "reference" | "cpp" | "triton". "auto" is cpp on CPU and triton on CUDA.

    Returns logprobs_N and entropy_N, (N,) float32, nats; gradients flow through both. Raises ValueError for temperature
    or impl, RuntimeError for shapes and targets out of range (of the latter impl triton makes NaN, and no host waits).
    """
    if not temperature > 0:
        raise ValueError(f"linear_logprobs: temperature is {temperature}, expected more than 0.")
    tensors = {"hidden": hidden_NH, "weight": weight_VH}
    triton = _use_triton(impl, tensors)
    if not triton and not library.use_compiled("linear_logprobs", impl, tensors, DTYPES, ("cpp",)):
        return linear_logprobs_reference(
            hidden_NH, weight_VH, targets_N, mask_N=mask_N, temperature=temperature, group=group
        )
    if group is not None:
        return _Sharded.apply(hidden_NH, weight_VH, targets_N, mask_N, temperature, group, triton)
    operator, _ = _operators(triton)
    return operator(hidden_NH, weight_VH, targets_N, mask_N, temperature, 0, len(weight_VH))[:2]


def _use_triton(impl: str, tensors: dict[str, Tensor]) -> bool:
    """Whether the Triton kernels run; ValueError for tensors that impl "triton" cannot take."""
    if impl not in ("auto", "triton"):
        return False
    unfit = [
        f"{name} is {str(t.dtype).removeprefix('torch.')} on {t.device.type}"
        for name, t in tensors.items()
        if t.dtype not in TRITON_DTYPES or not t.is_cuda
    ]
    if impl == "auto":
        return TRITON and not unfit
    if not TRITON:
        raise ValueError("linear_logprobs: impl triton needs the package triton; install it or pass impl='reference'.")
    if unfit and not (all(t.dtype in TRITON_DTYPES and t.is_cpu for t in tensors.values()) and _interpreted()):
        raise ValueError(
            f"linear_logprobs: {unfit[0]}, impl triton takes float32 or bfloat16 on cuda, or on cpu in Triton's "
            "interpreter (TRITON_INTERPRET=1 from the start); convert it or pass impl='auto'."
        )
    return True


def _interpreted() -> bool:
    from aligner_kernels.tiles import INTERPRETED

    return INTERPRETED


def _operators(triton: bool) -> tuple:
    """The torch operator and its backward."""
    ops = torch.ops.aligner
    if triton:
        return ops.linear_logprobs_triton, ops.linear_logprobs_triton_backward
    return ops.linear_logprobs, ops.linear_logprobs_backward


class _Sharded(torch.autograd.Function):
    """The operator on this rank's rows of weight, its statistics and its gradient combined over the group."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, mask, temperature, group, triton):
        ctx.bounds = vocab_parallel.shard_bounds(weight.shape[0], group)
        operator, ctx.backward_operator = _operators(triton)
        outputs = operator(hidden, weight, targets, mask, temperature, *ctx.bounds)
        here = (targets >= ctx.bounds[0]) & (targets < ctx.bounds[0] + weight.shape[0])
        outputs = vocab_parallel.combine(*outputs, here, temperature, group)
        if mask is not None:
            outputs = tuple(torch.where(mask, x, 0) for x in outputs)
        ctx.temperature, ctx.group = temperature, group
        ctx.save_for_backward(hidden, weight, targets, mask, *outputs[1:])
        ctx.set_materialize_grads(False)
        return outputs[0], outputs[1]

    @staticmethod
    def backward(ctx, d_logprobs, d_entropy):
        hidden, weight, targets, mask, entropy, maximum, log_sum = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        d_hidden, d_weight = ctx.backward_operator(
            hidden,
            weight,
            targets,
            mask,
            ctx.temperature,
            *ctx.bounds,
            maximum,
            log_sum,
            entropy,
            d_logprobs,
            d_entropy,
            need_hidden,
            need_weight,
        )
        if need_hidden:
            d_sum = d_hidden.float()
            dist.all_reduce(d_sum, group=ctx.group)
            d_hidden = d_sum.to(hidden.dtype)
        return d_hidden if need_hidden else None, d_weight if need_weight else None, None, None, None, None, None


def _setup_context(ctx, inputs, output) -> None:
    hidden, weight, targets, mask, ctx.temperature, ctx.vocab_start, ctx.vocab_size = inputs
    _, entropy, maximum, log_sum = output
    ctx.mark_non_differentiable(maximum, log_sum)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, targets, mask, maximum, log_sum, entropy)


def _backward(triton, ctx, d_logprobs, d_entropy, d_max, d_log_sum):
    hidden, weight, targets, mask, maximum, log_sum, entropy = ctx.saved_tensors
    need_hidden, need_weight = ctx.needs_input_grad[:2]
    d_hidden, d_weight = _operators(triton)[1](
        hidden,
        weight,
        targets,
        mask,
        ctx.temperature,
        ctx.vocab_start,
        ctx.vocab_size,
        maximum,
        log_sum,
        entropy,
        d_logprobs,
        d_entropy,
        need_hidden,
        need_weight,
    )
    return d_hidden if need_hidden else None, d_weight if need_weight else None, None, None, None, None, None


def _fake(hidden, weight, targets, mask, temperature, vocab_start, vocab_size):
    return tuple(hidden.new_empty(hidden.shape[0], dtype=torch.float32) for _ in range(4))


def _fake_backward(hidden, weight, *arguments):
    need_hidden, need_weight = arguments[-2:]
    d_hidden = hidden.new_empty((hidden.shape[0] if need_hidden else 0, hidden.shape[1]))
    return d_hidden, weight.new_empty((weight.shape[0] if need_weight else 0, hidden.shape[1]))


_INPUTS = "Tensor hidden, Tensor weight, Tensor targets, Tensor? mask, float temperature, "
_INPUTS += "SymInt vocab_start, SymInt vocab_size"
_STATISTICS = "Tensor max, Tensor log_sum, Tensor entropy, Tensor? d_logprobs, Tensor? d_entropy"


@torch.library.custom_op(
    "aligner::linear_logprobs_triton",
    mutates_args=(),
    schema=f"({_INPUTS}) -> (Tensor logprobs, Tensor entropy, Tensor max, Tensor log_sum)",
)
def _triton(*arguments):
    from aligner_kernels import linear_logprobs

    with torch.cuda.device_of(arguments[0]):
        return linear_logprobs.linear_logprobs(*arguments)


@torch.library.custom_op(
    "aligner::linear_logprobs_triton_backward",
    mutates_args=(),
    schema=f"({_INPUTS}, {_STATISTICS}, bool need_hidden, bool need_weight) -> (Tensor d_hidden, Tensor d_weight)",
)
def _triton_backward(*arguments):
    from aligner_kernels import linear_logprobs

    with torch.cuda.device_of(arguments[0]):
        return linear_logprobs.linear_logprobs_backward(*arguments)


def _register(name: str, *, triton: bool) -> None:
    torch.library.register_fake(f"aligner::{name}", _fake)
    torch.library.register_fake(f"aligner::{name}_backward", _fake_backward)
    backward = functools.partial(_backward, triton)
    torch.library.register_autograd(f"aligner::{name}", backward, setup_context=_setup_context)


_register("linear_logprobs_triton", triton=True)
if library.LOADED:
    _register("linear_logprobs", triton=False)
