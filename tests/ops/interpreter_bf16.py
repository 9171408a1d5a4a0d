"""Makes bfloat16 right in Triton's interpreter (triton 3.7.1), as GPUs have it.

The interpreter keeps bfloat16 as the upper half of a float32, in uint16. Its tl.dot multiplies these as integers, and
its cast from float32 cuts off instead of rounding to nearest even.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

create_dot = interpreter.InterpreterBuilder.create_dot
cast_impl = interpreter.InterpreterBuilder.cast_impl


def as_float(handle: interpreter.TensorHandle) -> np.ndarray:
    if handle.dtype.scalar == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data


def rounded(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values).view(np.uint32).astype(np.uint64)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, nearest).astype(np.uint16)


def dot(self, a, b, d, *options):
    if tl.bfloat16 not in (a.dtype.scalar, b.dtype.scalar):
        return create_dot(self, a, b, d, *options)
    product = np.matmul(as_float(a), as_float(b)) + d.data
    return interpreter.TensorHandle(product.astype(d.data.dtype), d.dtype.scalar)


def cast(self, source, dtype):
    if source.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
        return interpreter.TensorHandle(rounded(source.data), dtype.scalar)
    return cast_impl(self, source, dtype)


interpreter.InterpreterBuilder.create_dot = dot
interpreter.InterpreterBuilder.cast_impl = cast
