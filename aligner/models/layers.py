"""Norm and activation of a layer, with backward passes of their own on the CPU.

There every elementwise operation is a pass over memory, and what autograd keeps of each is the activations' largest
part. These keep what cannot be made again in one pass.
"""

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.RMSNorm):
    """Megatron's own wrapper of torch.nn.RMSNorm refuses sequence parallelism; this one marks its weight for it."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cpu and x.dtype == torch.float32:
            return _RMSNorm.apply(x, self.weight, self.eps)
        return super().forward(x)


class _RMSNorm(torch.autograd.Function):
    """y = w * r * x, r = (mean(x^2) + eps)^(-1/2); dx = r * (w * dy - x * r^2 * mean(w * dy * x))."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float):
        r = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        return (x * r).mul_(weight)

    @staticmethod
    def backward(ctx, d_y: Tensor):
        x, weight, r = ctx.saved_tensors
        product = d_y * x
        d_weight = r.flatten() @ product.flatten(0, -2) if ctx.needs_input_grad[1] else None
        mean = (product @ weight).unsqueeze(-1).div_(x.shape[-1])
        d_x = torch.mul(d_y, weight, out=product).mul_(r)
        return d_x.addcmul_(x, mean.mul_(r.pow(3)), value=-1), d_weight, None


class SwiGLU(MegatronModule):
    """silu(gate) * up of (..., gate and up), as the submodule that Megatron's MLP has for an activation."""

    def forward(self, gate_up: Tensor) -> Tensor:
        return _SwiGLU.apply(gate_up)


class _SwiGLU(torch.autograd.Function):
    """Keeps what it is given, and makes silu(gate) again."""

    @staticmethod
    def forward(ctx, gate_up: Tensor):
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, d_y: Tensor):
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        d_gate_up = torch.empty_like(gate_up)
        d_gate, d_up = d_gate_up.chunk(2, dim=-1)
        torch.mul(F.silu(gate), d_y, out=d_up)
        torch.ops.aten.silu_backward(d_y * up, gate, grad_input=d_gate)
        return d_gate_up
