"""Sum and mean of the tokens of each sequence."""

# Shape suffixes: N packed tokens, B sequences.

import torch
from torch import Tensor

from aligner.ops import library


def segment_sum_reference(
    x_N: Tensor, cu_seqlens: Tensor, *, mask_N: Tensor | None = None, mean: bool = False
) -> Tensor:
    """`segment_sum` and, with `mean`, `segment_mean` in plain PyTorch: any device, any float dtype."""
    counts_B = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    sequence_N = torch.repeat_interleave(torch.arange(len(counts_B), device=x_N.device), counts_B)
    if mask_N is not None:
        x_N = torch.where(mask_N, x_N, 0)
        counts_B = torch.zeros_like(counts_B).index_add_(0, sequence_N, mask_N.long())
    sum_B = x_N.new_zeros(len(counts_B)).index_add(0, sequence_N, x_N)
    return sum_B / counts_B.clamp(min=1) if mean else sum_B


def segment_sum(x_N: Tensor, cu_seqlens: Tensor, *, mask_N: Tensor | None = None, impl: str = "auto") -> Tensor:
    r"""Sum of the tokens of each sequence.

        sum_b = sum_{t in b} m_t x_t

    Source: the definition.

    x_N: (N,) float32, any unit. Gradients flow to it.
    cu_seqlens: (B + 1,) int32, tokens. Prefix sum of sequence lengths; cu_seqlens[B] == N.
    mask_N: (N,) bool, tokens that count, or None for all. What another token holds is ignored, NaN included.
    impl: "auto" | "reference" | "cpp" | "cuda".

    Returns sum_B, (B,) float32, unit of x, 0 where no token counts. Raises ValueError for impl, RuntimeError for shapes
    and cu_seqlens.
    """
    return _segment(x_N, cu_seqlens, mask_N, False, impl)


def segment_mean(x_N: Tensor, cu_seqlens: Tensor, *, mask_N: Tensor | None = None, impl: str = "auto") -> Tensor:
    r"""Mean of the tokens of each sequence.

        mean_b = sum_{t in b} m_t x_t / max(1, sum_{t in b} m_t)

    Source: the definition.

    Arguments, result and errors as in `segment_sum`.
    """
    return _segment(x_N, cu_seqlens, mask_N, True, impl)


def _segment(x_N: Tensor, cu_seqlens: Tensor, mask_N: Tensor | None, mean: bool, impl: str) -> Tensor:
    if library.use_compiled("segment_mean" if mean else "segment_sum", impl, {"x": x_N}):
        return torch.ops.aligner.segment_sum(x_N, mask_N, cu_seqlens, mean)
    return segment_sum_reference(x_N, cu_seqlens, mask_N=mask_N, mean=mean)


def _setup_context(ctx, inputs, output) -> None:
    x, mask, cu_seqlens, ctx.mean = inputs
    ctx.tokens = x.shape[0]
    ctx.save_for_backward(mask, cu_seqlens)


def _backward(ctx, d_result):
    mask, cu_seqlens = ctx.saved_tensors
    return torch.ops.aligner.segment_sum_backward(d_result, mask, cu_seqlens, ctx.tokens, ctx.mean), None, None, None


if library.LOADED:

    @torch.library.register_fake("aligner::segment_sum")
    def _(x, mask, cu_seqlens, mean):
        return x.new_empty(cu_seqlens.shape[0] - 1)

    @torch.library.register_fake("aligner::segment_sum_backward")
    def _(d_result, mask, cu_seqlens, tokens, mean):
        return d_result.new_empty(tokens)

    torch.library.register_autograd("aligner::segment_sum", _backward, setup_context=_setup_context)
