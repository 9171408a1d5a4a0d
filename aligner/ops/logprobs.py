"""Log-probability of each token and entropy of its distribution, from logits."""

# Shape suffixes: N packed tokens, V vocabulary (of this rank's shard).

import torch
import torch.distributed as dist
from torch import Tensor

from aligner.ops import library, vocab_parallel

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def logprobs_reference(
    logits_NV: Tensor, targets_N: Tensor, *, temperature: float = 1.0, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """`logprobs` in plain PyTorch: any device, any float dtype; float64 in gives float64 out."""
    logits_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    if group is not None:
        logits_NV = vocab_parallel.GatherColumns.apply(logits_NV, group)
    log_p_NV = torch.log_softmax(logits_NV / temperature, dim=-1)
    terms_NV = log_p_NV.exp() * torch.where(log_p_NV == -torch.inf, 0, log_p_NV)  # 0 log 0 = 0
    return log_p_NV.gather(1, targets_N[:, None]).squeeze(1), -terms_NV.sum(-1)


def logprobs(
    logits_NV: Tensor,
    targets_N: Tensor,
    *,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    inplace_backward: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    r"""Log-probability of each row's target and entropy of each row, in one pass over the logits.

        logprob_n = z_{n, target} - log sum_v e^{z_{n,v}},    H_n = -sum_v p_{n,v} log p_{n,v}
        z = logits / temperature

    Source: Milakov and Gimelshein 2018, arXiv:1805.02867, algorithm 3.

    logits_NV: (N, V) float32, bfloat16 or float16, dimensionless; rows may be any distance apart, -inf is allowed.
    targets_N: (N,) int64, token ids of the whole vocabulary.
    temperature: dimensionless, > 0.
    group: ranks that hold the vocabulary's columns, equal contiguous shards in rank order; None when not sharded.
    inplace_backward: the gradient overwrites logits_NV, which must not be used again; eager and compiled only.
    impl: "auto" | "reference" | "cpp" | "cuda".

    Returns logprobs_N and entropy_N, (N,) float32, nats; gradients flow through both. Raises ValueError for
    temperature, impl or an in-place backward that cannot be, RuntimeError for shapes and targets out of range
    (on a GPU a target out of range gives NaN, for which no host has to wait).
    """
    if not temperature > 0:
        raise ValueError(f"logprobs: temperature is {temperature}, expected more than 0.")
    compiled = library.use_compiled("logprobs", impl, {"logits": logits_NV}, DTYPES)
    if inplace_backward and not compiled:
        raise ValueError("logprobs: inplace_backward needs impl cpp or cuda and a dtype they take; pass False.")
    if not compiled:
        return logprobs_reference(logits_NV, targets_N, temperature=temperature, group=group)
    if group is not None or inplace_backward:
        if inplace_backward and logits_NV.is_leaf and logits_NV.requires_grad:
            raise ValueError("logprobs: inplace_backward got a leaf tensor, expected a computed one; pass False.")
        return _Logprobs.apply(logits_NV, targets_N, temperature, group, inplace_backward)
    return torch.ops.aligner.logprobs(logits_NV, targets_N, temperature, 0, logits_NV.shape[-1])[:2]


class _Logprobs(torch.autograd.Function):
    """What the plain operator cannot do: talk to other ranks, and overwrite its input in backward."""

    @staticmethod
    def forward(ctx, logits, targets, temperature, group, inplace):
        ctx.bounds = vocab_parallel.shard_bounds(logits.shape[1], group)
        outputs = torch.ops.aligner.logprobs(logits, targets, temperature, *ctx.bounds)
        if group is not None:
            here = (targets >= ctx.bounds[0]) & (targets < ctx.bounds[0] + logits.shape[1])
            outputs = vocab_parallel.combine(*outputs, here, temperature, group)
        ctx.temperature, ctx.inplace = temperature, inplace
        ctx.save_for_backward(logits, targets, *outputs[1:])
        ctx.set_materialize_grads(False)
        return outputs[0], outputs[1]

    @staticmethod
    def backward(ctx, d_logprobs, d_entropy):
        logits, targets, entropy, maximum, log_sum = ctx.saved_tensors
        arguments = (logits, targets, ctx.temperature, *ctx.bounds, maximum, log_sum, entropy, d_logprobs, d_entropy)
        if not ctx.inplace:
            return torch.ops.aligner.logprobs_backward(*arguments), None, None, None, None
        torch.ops.aligner.logprobs_backward_(*arguments)
        torch.autograd.graph.increment_version(logits)  # so that any other use of the overwritten logits raises
        return logits.detach(), None, None, None, None


def _setup_context(ctx, inputs, output) -> None:
    logits, targets, ctx.temperature, ctx.vocab_start, ctx.vocab_size = inputs
    _, entropy, maximum, log_sum = output
    ctx.mark_non_differentiable(maximum, log_sum)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, targets, maximum, log_sum, entropy)


def _backward(ctx, d_logprobs, d_entropy, d_max, d_log_sum):
    logits, targets, maximum, log_sum, entropy = ctx.saved_tensors
    d_logits = torch.ops.aligner.logprobs_backward(
        logits,
        targets,
        ctx.temperature,
        ctx.vocab_start,
        ctx.vocab_size,
        maximum,
        log_sum,
        entropy,
        d_logprobs,
        d_entropy,
    )
    return d_logits, None, None, None, None


if library.LOADED:

    @torch.library.register_fake("aligner::logprobs")
    def _(logits, targets, temperature, vocab_start, vocab_size):
        return tuple(logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(4))

    @torch.library.register_fake("aligner::logprobs_backward")
    def _(logits, targets, temperature, vocab_start, vocab_size, maximum, log_sum, entropy, d_logprobs, d_entropy):
        return logits.new_empty(logits.shape)

    @torch.library.register_fake("aligner::logprobs_backward_")
    def _(logits, targets, temperature, vocab_start, vocab_size, maximum, log_sum, entropy, d_logprobs, d_entropy):
        return None

    torch.library.register_autograd("aligner::logprobs", _backward, setup_context=_setup_context)
