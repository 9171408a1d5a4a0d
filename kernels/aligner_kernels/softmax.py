"""Online softmax statistics: of z = (x - max) inverse_temperature, sum = sum e^z and weighted = sum e^z z.

The maximum and the logarithm of the sum stay apart: added up, a maximum of 1e4 would swallow the other's digits.
"""

import triton
import triton.language as tl


@triton.jit
def exp_or_zero(z):
    """e^z for z <= 0, exactly 0 below float range and NaN for NaN; and z clamped, so that 0 * z is 0."""
    underflow = z < -87.0
    return tl.where(underflow, 0.0, tl.exp(z)), tl.where(underflow, -87.0, z)


@triton.jit
def merge(max_1, sum_1, weighted_1, max_2, sum_2, weighted_2, inverse_temperature):
    """Statistics of the logits of both."""
    top = tl.maximum(max_1, max_2)
    finite = tl.where(top == float("-inf"), 0.0, top)
    scale_1, z_1 = exp_or_zero((max_1 - finite) * inverse_temperature)
    scale_2, z_2 = exp_or_zero((max_2 - finite) * inverse_temperature)
    weighted = scale_1 * (weighted_1 + sum_1 * z_1) + scale_2 * (weighted_2 + sum_2 * z_2)
    return top, scale_1 * sum_1 + scale_2 * sum_2, weighted
