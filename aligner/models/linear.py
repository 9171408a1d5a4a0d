"""Matrix products of float32 on the CPU through oneDNN, and Megatron's linear layers on top of them.

torch multiplies float32 matrices on x86 with MKL, which runs AVX2 code on any processor that Intel has not made;
oneDNN, which every such build of torch holds as well, runs what the processor can do. On AMD's Zen 5 with AVX-512 that
is 2.3 times as fast (docs/training-speed.md). Both round as float32 does, in another order.
"""

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight^T; x: (..., in), weight: (out, in). Gradients flow to what asks for them."""
    return _Linear.apply(x, weight) if fits(x, weight) else torch.nn.functional.linear(x, weight)


def fits(x: Tensor, weight: Tensor) -> bool:
    return ONEDNN and x.dtype == weight.dtype == torch.float32 and x.is_cpu and x.numel() > 0


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b^T of strided matrices."""
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor):
        needs_x, needs_weight = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        return _product(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx, d_y: Tensor):
        x, weight = ctx.saved_tensors
        rows = d_y.flatten(0, -2)
        d_x = None if weight is None else _product(rows, weight.T).unflatten(0, d_y.shape[:-1])
        return d_x, None if x is None else _outer(rows, x.flatten(0, -2))


def _outer(d_y: Tensor, x: Tensor) -> Tensor:
    """d_y^T x. oneDNN copies a transposed first factor: where x is thin, as before an adapter's B, take that one."""
    return _product(x.T, d_y.T).T if 8 * x.shape[-1] < d_y.shape[-1] else _product(d_y.T, x.T)


class ColumnLinear(ColumnParallelLinear):
    def _forward_impl(self, input, weight, bias, allreduce_dgrad, sequence_parallel, **options):
        # With communication inside of the product Megatron's own runs.
        if allreduce_dgrad or sequence_parallel or not fits(input, weight):
            options |= {"allreduce_dgrad": allreduce_dgrad, "sequence_parallel": sequence_parallel}
            return super()._forward_impl(input, weight, bias=bias, **options)
        y = _Linear.apply(input, weight)
        return y if bias is None else y + bias


class RowLinear(RowParallelLinear):
    """Megatron communicates around the product here, and adds the bias after that."""

    def _forward_impl(self, input, weight, **options):
        return _Linear.apply(input, weight) if fits(input, weight) else super()._forward_impl(input, weight, **options)
